"""What the commands were given: checked and read before torch is imported or a model is loaded.

A wrong value raises `HatError`, which `hat_lib.cli.console` tells in one line; `load` comes last and brings the model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from hat_lib.cli.options import CALIBRATED
from hat_lib.config import GRANULARITIES, HatConfig, HatError, check_capacity, check_exit_rate

if TYPE_CHECKING:
    from hat_lib.model.transformer import HierarchicalTransformer


def recipe_changes(settings: list[str] | None) -> dict:
    """``["router_lr=1e-3"]`` as ``{"router_lr": 0.001}``; the recipe checks names and ranges."""
    out = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise HatError(f"--set takes NAME=VALUE, got {setting!r}")
        for kind in (int, float, str):
            try:
                out[name] = kind(value)
                break
            except ValueError:
                continue
    return out


def names(option: str, text: str) -> list[str]:
    """``"a,b"`` as names, at least one."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise HatError(f"{option} takes NAME[,NAME], got {text!r}")
    return found


def numbers(option: str, text: str, kind: type = float) -> list:
    """``"0.4,0.7"`` as numbers, at least one."""
    try:
        return [kind(part) for part in names(option, text)]
    except ValueError:
        raise HatError(f"{option} takes numbers, comma-separated, got {text!r}") from None


def grain_names(text: str) -> list[str]:
    """``"channel,token"`` as names of grains."""
    wanted = [name.strip() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in GRANULARITIES]:
        raise HatError(f"grains must be among {', '.join(GRANULARITIES)}, got {unknown[0]!r}")
    return wanted


def capacities(text: str) -> list[float]:
    """``"1.0,0.75"`` as capacities; the empty string is none."""
    return [check_capacity(part.strip()) for part in text.split(",") if part.strip()]


def check_shares(capacity: str | None, exit_rate: str | None) -> tuple[float | None, float | None]:
    """Both as numbers; None stays None."""
    return (
        None if capacity is None else check_capacity(capacity),
        None if exit_rate is None else check_exit_rate(exit_rate),
    )


def check_count(name: str, value: int, low: int) -> None:
    if value < low:
        raise HatError(f"{name} must be a whole number of at least {low}, got {value}")


def check_writable(folder: Path, what: str = "a checkpoint") -> None:
    """Raise unless ``what`` can be written to ``folder``; creates nothing that stays."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise HatError(f"cannot write {what} to {folder}: {there} is not a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise HatError(f"cannot write {what} to {folder}: {error.strerror or error}") from error


def check_text(source: str, split: str) -> None:
    """Raise as `load_text` would, before the base is loaded: read the source with a stand-in tokenizer."""
    from hat_lib.text.blocks import load_text

    def two_tokens(text: str, **_):
        return SimpleNamespace(input_ids=list(text.encode()[:2]))

    load_text(source, two_tokens, split=split, max_tokens=2)


def read_prompt(prompt: str) -> str:
    """The prompt, from stdin if it is ``-``; raises if there is nothing to continue."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise HatError(f"the prompt is not UTF-8 text: {error}") from error
    if not text.strip():
        raise HatError(f"the prompt is empty: expected text to continue, got {text!r}")
    return text


def load(
    base: str | None, checkpoint: Path | None, capacity: str | None, exit_rate: str | None, dtype: str | None
) -> HierarchicalTransformer:
    """The model that the options of `generate` and `evaluate` ask for, with everything checked first."""
    share, rate = check_shares(capacity, exit_rate)
    if checkpoint is None and (share != 1.0 or rate):
        checkpoint = _reference_checkpoint(base)

    from hat_lib.backbone.base import load_base, parse_dtype
    from hat_lib.model.transformer import HierarchicalTransformer

    if dtype is not None:
        parse_dtype(dtype)
    if checkpoint is None:
        loaded = load_base(*[base] if base else [], dtype=dtype)
        return HierarchicalTransformer(loaded, HatConfig.default(loaded))
    hat = HierarchicalTransformer.from_pretrained(checkpoint, base, dtype=dtype)
    if share is not None:
        hat.capacity = share
    if rate is not None:
        hat.exit_rate = rate
    return hat


def _reference_checkpoint(base: str | None) -> Path:
    if base not in (None, "bundled"):
        raise HatError(
            f"no checkpoint for {base}: make one with `hat calibrate --base {base} --save DIR` and pass "
            "--checkpoint DIR, or run everything with --capacity 1.0"
        )
    if not CALIBRATED.exists():
        raise HatError(
            f"no checkpoint at {CALIBRATED}: make one with `hat calibrate --save DIR` and pass --checkpoint "
            "DIR, or run everything with --capacity 1.0"
        )
    return CALIBRATED
