"""From a text to a calibrated model: `hat calibrate`."""

from __future__ import annotations

import warnings

from hat_lib.base.load import Base
from hat_lib.calibration.capacity import calibrate
from hat_lib.calibration.quantiles import LEAST_TOKENS
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.grain import GRAINS
from hat_lib.text.blocks import held_out, load_text, text_hash


def calibrate_on(
    text: str, base: Base, granularity: str, *, tokens: int = 12_000, probe_tokens: int = 4096, **changes
) -> HierarchicalTransformer:
    """``base`` with routers calibrated on about ``tokens`` tokens of the train and validation splits of ``text``.

    ``changes`` are fields of the grain's `HatConfig`. Warns of a text that is too short to train on, too. Raises
    `HatError` as `load_text` and `calibrate` do.
    """
    rows = load_text(text, base.tokenizer, split="validation", max_tokens=2 * LEAST_TOKENS)
    if (held := sum(map(len, rows["input_ids"]))) < LEAST_TOKENS:
        warnings.warn(
            f"{text} is too short for `hat train`, which needs {LEAST_TOKENS} tokens in the validation split (5 % of a "
            f"file), got {held}",
            stacklevel=2,
        )
    blocks = held_out(text, base.tokenizer, tokens)
    hat = HierarchicalTransformer(base, GRAINS[granularity].config(base, **changes))
    found = sum(map(len, blocks["input_ids"]))
    source = f"{text}, train and validation splits, {found} tokens, SHA-256 {text_hash(blocks)[:16]}"
    calibrate(hat, blocks["input_ids"], probe_tokens=probe_tokens, text=source)
    return hat
