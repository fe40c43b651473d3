"""``hat cost``: what a base needs in memory, from its config alone."""

from __future__ import annotations

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option

CONTEXT, RANK = 1024, 4
SAVED = {"hidden_size": 12.2, "intermediate_size": 5.4}
"""fp32 numbers that a layer keeps of a token for the backward pass of a routers' step, by the widths of its config"""


def cost(
    base: str = option("bundled", f"The base: {options.BASE_HELP}."),
    dtype: str | None = options.DTYPE,
    threads: int | None = options.THREADS,
) -> None:
    """Memory that a base and its adapter need.

    Reads the base's config and no weights. The engine's copy of the weights comes beside the base's own, and serves all
    capacities.
    """
    options.start(threads)
    from hat_lib.base.load import default_dtype, parse_dtype

    parts = needs(base, default_dtype("cpu") if dtype in (None, "auto") else parse_dtype(dtype))
    for part, size in parts.items():
        typer.echo(f"{part:56} {f'{size / 2**30:.2f} GiB' if size >= 2**30 else f'{size / 2**20:.1f} MiB':>12}")


def needs(name: str, dtype) -> dict[str, float]:
    """Bytes, by what they are for, with the base's weights in a torch dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    from hat_lib.base.families import head_size, linears
    from hat_lib.base.load import Base, config_of
    from hat_lib.calibration.token_sensitivity import TOKENS
    from hat_lib.config import HatConfig
    from hat_lib.engine.four_bits import GROUP, GROUP_ROWS
    from hat_lib.hat import HierarchicalTransformer
    from hat_lib.training.recipe import Recipe

    config, recipe = config_of(name), Recipe.named("default", "channel")
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config).to(dtype)
    hat = HierarchicalTransformer(Base(lm, None, "", name), HatConfig.default(config, correction_rank=RANK))
    parameters, adapter = (sum(p.numel() for p in some) for some in (lm.parameters(), hat.hat_parameters().values()))
    products, head = sum(linear.weight.numel() for linear in linears(lm)), lm.lm_head.weight.numel()
    size, shown, layers = dtype.itemsize, str(dtype).removeprefix("torch."), config.num_hidden_layers
    saved = layers * sum(number * getattr(config, field) for field, number in SAVED.items()) + config.vocab_size
    return {
        f"the base, {parameters:,} parameters in {shown}": parameters * size,
        f"the adapter, {adapter:,}, with corrections of rank {RANK}": adapter * 4,
        f"keys and values of {CONTEXT} tokens": (
            CONTEXT * 2 * layers * config.num_key_value_heads * head_size(config) * size
        ),
        f"the engine's copy, {shown}": (products + head) * size,
        "the engine's copy, int8": products + 2 * head,
        "the engine's copy, q4": products * GROUP_ROWS / GROUP / 2 + 2 * head,
        f"`hat calibrate`: states of up to {TOKENS:,} tokens": TOKENS * layers * config.hidden_size * 2,
        "`hat train`: gradients and Adam's moments": adapter * 12,
        f"`hat train`: a batch of {recipe.batch_size} x {recipe.block_size} tokens": (
            recipe.batch_size * recipe.block_size * saved * 4
        ),
    }
