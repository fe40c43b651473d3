"""``hat calibrate``: thresholds for every capacity, from text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.options import option
from hat_lib.config import HatConfig, check_capacity, check_count


def calibrate(
    save: Annotated[Path, option("Folder to write the checkpoint to; an older one in it is replaced.")],
    base: take.BundledBase = "bundled",
    text: Annotated[str, option(f"Measure on its train and validation splits: {take.TEXT_HELP}.")] = "bundled",
    granularity: take.Granularity = HatConfig.granularity,
    tokens: Annotated[
        int, option("Tokens of text for the scores, at least 256; more is steadier and slower.")
    ] = 12_000,
    probe_tokens: Annotated[
        int, option("Tokens for how sensitive the output is to each layer (backward passes), at least 16.")
    ] = 4096,
    dtype: Annotated[str, option(f"Of the passes: {take.DTYPES_HELP}. The thresholds serve every dtype.")] = "fp32",
    capacity: Annotated[
        str | None,
        option(
            f"Default of the checkpoint, which serves every capacity: {take.CAPACITY_HELP}. [default: 0.75 for "
            "channel, 0.55 for token]",
            metavar="SHARE",
        ),
    ] = None,
) -> None:
    """Measure thresholds on held-out text, write a checkpoint.

    One checkpoint serves every capacity. Nothing is trained. With the bundled base it takes minutes on a CPU.
    """
    changes = {} if capacity is None else {"capacity": check_capacity(capacity)}
    given.grain_names(granularity, "granularity")
    check_count("tokens", tokens, 256)
    check_count("probe tokens", probe_tokens, 16)
    given.check_writable(save)
    given.check_dtype(dtype)
    given.check_text(text, "validation")

    from hat_lib.backbone.base import load_base
    from hat_lib.calibration.capacity import calibrate as measure
    from hat_lib.model.transformer import HierarchicalTransformer
    from hat_lib.text.blocks import held_out, text_hash

    loaded = load_base(base, dtype=dtype)
    blocks = held_out(text, loaded.tokenizer, tokens)
    shape = HatConfig.published if granularity == "token" else HatConfig.default
    hat = HierarchicalTransformer(loaded, shape(loaded, **changes))
    found = sum(map(len, blocks["input_ids"]))
    source = f"{text}, train and validation splits, {found} tokens, SHA-256 {text_hash(blocks)[:16]}"
    calibration = measure(hat, blocks["input_ids"], probe_tokens=probe_tokens, text=source)
    hat.save_pretrained(save)

    typer.echo(f"calibrated on {source}")
    low = calibration.capacities[0]
    typer.echo(f"{len(calibration.capacities)} capacities from {low:.3f} to 1, thresholds interpolated between them")
    typer.echo(f"wrote {save}, default capacity {hat.config.capacity}")
