"""What a base and its adapter need in memory, from the base's config alone."""

import torch
from transformers import AutoModelForCausalLM

from hat_lib.base.families import head_size, linears
from hat_lib.base.load import Base, config_of
from hat_lib.calibration.token_sensitivity import TOKENS
from hat_lib.config import HatConfig
from hat_lib.engine.arrays import GROUP, GROUP_ROWS
from hat_lib.hat import HierarchicalTransformer
from hat_lib.training.recipe import Recipe

CONTEXT, RANK = 1024, 4
SAVED = {"hidden_size": 12.2, "intermediate_size": 5.4}
"""fp32 numbers that a layer keeps of a token for the backward pass of a routers' step, by the widths of its config"""


def needs(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes, by what they are for, with the base's weights in ``dtype``."""
    config, recipe = config_of(name), Recipe.named("default", "channel")
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config).to(dtype)
    hat = HierarchicalTransformer(Base(lm, None, "", name), HatConfig.default(config, correction_rank=RANK))
    parameters, adapter = (sum(p.numel() for p in some) for some in (lm.parameters(), hat.hat_parameters().values()))
    products, head = sum(linear.weight.numel() for linear in linears(lm)), lm.lm_head.weight.numel()
    size, shown, layers = dtype.itemsize, str(dtype).removeprefix("torch."), config.num_hidden_layers
    saved = layers * sum(number * getattr(config, field) for field, number in SAVED.items()) + config.vocab_size
    batch, block = recipe.batch_size, recipe.block_size
    four = GROUP_ROWS / GROUP / 2  # bytes a weight, with scales; of the head and its preview:
    heads = head * (1 + 2 / GROUP + four)
    cached = CONTEXT * 2 * layers * config.num_key_value_heads * head_size(config)
    return {
        f"the base, {parameters:,} parameters in {shown}": parameters * size,
        f"the adapter, {adapter:,}, with corrections of rank {RANK}": adapter * 4,
        f"keys and values of {CONTEXT} tokens": cached * size,
        f"the engine's copy, {shown}": (products + head) * size,
        "the engine's copy, int8": products + heads,
        "the engine's copy, q4": products * four + heads,
        f"`hat calibrate`: states of up to {TOKENS:,} tokens": TOKENS * layers * config.hidden_size * 2,
        "`hat train`: gradients and Adam's moments": adapter * 12,
        f"`hat train`: a batch of {batch} x {block} tokens": batch * block * saved * 4,
    }
