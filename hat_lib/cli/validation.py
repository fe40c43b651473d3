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


def names(option: str, text: str) -> list[str]:
    """``"a,b"`` as names, at least one."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise HatError(f"{option} takes NAME[,NAME], got {text!r}")
    return found


def grain_names(text: str, what: str = "grains") -> list[str]:
    """``"channel,token"`` as names of grains."""
    wanted = [name.strip() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in GRANULARITIES]:
        raise HatError(f"{what} must be among {', '.join(GRANULARITIES)}, got {unknown[0]!r}")
    return wanted


def check_dtype(dtype: str | None) -> None:
    from hat_lib.backbone.base import parse_dtype

    if dtype is not None:
        parse_dtype(dtype)


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


def check_text(source: str, split: str | None) -> None:
    """Raise as `load_text` would, before the base is loaded: read the source with a stand-in tokenizer.

    Without a split, raise where no split has anything to read.
    """
    from hat_lib.text.blocks import load_text, names_file

    def two_tokens(text: str, **_):
        return SimpleNamespace(input_ids=list(text.encode()[:2]))

    load_text(source, two_tokens, split=split or ("all" if names_file(source) else "test"), max_tokens=2)


def measured(source: str, split: str, tokens: int, n_bytes: int) -> tuple[float | None, str]:
    """How much of a whole text ``n_bytes`` are, None where nobody knows; and that in words, which every report has."""
    from hat_lib.text.blocks import source_bytes

    whole = source_bytes(source, "all")
    of_split = whole if split == "all" else source_bytes(source, split)
    if not whole or not n_bytes:
        return None, f"{tokens:,} tokens, split {split}"
    share = min(1.0, n_bytes / whole)
    if share > 0.995:
        return share, f"{tokens:,} tokens, the whole text"
    more = "--max-tokens measures" if whole == of_split else "--split all and --max-tokens measure"
    about = f"{float(f'{tokens / share:.2g}'):,.0f}"
    return share, f"{tokens:,} of about {about} tokens ({share:.1%} of the text), split {split}; {more} more"


def read_prompt(prompt: str) -> str:
    """The prompt, from stdin if it is ``-``; raises if there is nothing to continue."""
    try:
        if prompt == "-":
            if sys.stdin is None:
                raise HatError("--prompt - reads stdin, which is closed")
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the terminal's own is
            prompt = sys.stdin.read()
        prompt.encode()
    except UnicodeError as error:
        raise HatError(f"the prompt is not UTF-8 text: {error}") from error
    if not prompt.strip():
        raise HatError(f"the prompt is empty: expected text to continue, got {prompt!r}")
    return prompt


def load(
    base: str | None, checkpoint: Path | None, capacity: str | None, exit_rate: str | None, dtype: str | None
) -> HierarchicalTransformer:
    """The model that the options of `generate` and `evaluate` ask for, with everything checked first."""
    share = None if capacity is None else check_capacity(capacity)
    rate = None if exit_rate is None else check_exit_rate(exit_rate)
    if checkpoint is None and (share != 1.0 or rate):
        checkpoint = _reference_checkpoint(base)
    check_dtype(dtype)

    from hat_lib.backbone.base import load_base
    from hat_lib.model.transformer import HierarchicalTransformer

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
    if base in (None, "bundled"):
        if CALIBRATED.exists():
            return CALIBRATED
        missing, of = f"at {CALIBRATED}", ""
    else:
        missing, of = f"for {base}", f"--base {base} "
    raise HatError(
        f"no checkpoint {missing}: make one with `hat calibrate {of}--save DIR` and pass --checkpoint DIR, or run "
        "everything with --capacity 1.0"
    )
