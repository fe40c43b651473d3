"""What several commands take: options with their help, and the checks before a model is loaded.

torch is only imported inside functions, so that help answers at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import typer

from hat_lib.config import HatConfig, HatError, check_capacity, check_count, check_exit_rate
from hat_lib.text.plain import check_whole, printable

if TYPE_CHECKING:
    from hat_lib.hat import HierarchicalTransformer

DEFAULT = Path("default")
"""the trained channel-grain checkpoint of the bundled base, which comes with the library"""

BASE_HELP = "bundled, a Hub id (owner/name), a folder with safetensors, a .gguf file, or random:tiny"
TEXT_HELP = (
    "addresses, docstrings, encyclopedia, news, reserve, a .txt, .md, .jsonl or .parquet file, or a Hub dataset "
    "(owner/name[:config])"
)
CAPACITY_HELP = "share of the routable work to execute, 0.1-1.0, where 1.0 runs everything"
DTYPES_HELP = "fp32, bf16 or fp16"


def option(default, words: str, *names: str, check: Callable | None = None, **settings):
    """``check`` is called with a value that is given, before the command, and returns what the command gets."""
    if check is not None:
        settings["callback"] = lambda value: value if value is None else check(value)
    return typer.Option(default, *names, help=words, **settings)


def check_dtype(name: str) -> str:
    if name.lower() not in ("auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"):
        raise HatError(f"dtype must be {DTYPES_HELP}, got {name!r}")
    return name


BASE = option(None, f"The frozen base: {BASE_HELP}. [default: the one the checkpoint names, or bundled]")
CHECKPOINT = option(
    None,
    "Folder of `hat calibrate` or `hat train`, one that comes with the library (default, calibrated, token, ...), or "
    "owner/name on the Hub. [default: default, trained, for the bundled base; none at capacity 1.0 without exits]",
)
# Strings, so that an invalid number gets the library's own message.
CAPACITY = option(
    None, f"Compute per token: {CAPACITY_HELP}. [default: the checkpoint's]", check=check_capacity, metavar="SHARE"
)
EXIT_RATE = option(
    None,
    "Share of tokens to leave before the last layer, 0-1, where 0 is off; above 0 needs a checkpoint with trained exit "
    "gates. [default: the checkpoint's]",
    check=check_exit_rate,
    metavar="SHARE",
)
DTYPE = option(None, f"{DTYPES_HELP}. [default: bf16 where the hardware computes in it, else fp32]", check=check_dtype)
TEXT = option("addresses", f"What to measure on: {TEXT_HELP}.")
SPLIT = option(
    None,
    "Part of the text: train, validation, test (5 % of a file), or all. [default: test; all of a file that the "
    "checkpoint was not made with]",
)
MAX_TOKENS = option(4000, "Tokens of text, at least 2; more makes the interval narrower.", min=2)
THREADS = option(
    None,
    "Threads to compute with. [default: one a core]",
    check=partial(check_count, "threads", low=1, high=1024),
)


def say(kind: str, message: object) -> None:
    """One line on stderr, without active control characters."""
    typer.echo(f"{kind}: {printable(str(message).replace(chr(10), ' '))}", err=True)


def start(threads: int | None) -> None:
    """Say that something happens, because importing torch takes seconds, and set the threads."""
    typer.echo("loading ...", err=True)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def names(option: str, text: str) -> list[str]:
    """``"a,b"`` as names, at least one."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise HatError(f"{option} takes NAME[,NAME], got {text!r}")
    return found


def check_prompt(command: str, text: str | None) -> None:
    """Raise for a prompt in which there is nothing to read, or half a character."""
    if not text or not text.strip():
        raise HatError(f'expected a prompt, as in: hat {command} "The future of AI is" (see --help), got {text!r}')
    check_whole("the prompt", text)


def check_grains(what: str, wanted: list[str]) -> None:
    from hat_lib.method.grain import GRAINS

    for name in wanted:
        if name not in GRAINS:
            raise HatError(f"{what} must be among {', '.join(GRAINS)}, got {name!r}")


def check_writable(folder: Path, what: str = "a checkpoint") -> None:
    """Raise unless ``what`` can be written to ``folder``; leaves nothing behind."""
    folder = folder.expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise HatError(f"cannot write {what} to {folder}: {error.strerror or error}") from error


def check_text(source: str, split: str | None) -> None:
    """Raise as `load_text` would, before the base is loaded, by reading the source with a stand-in tokenizer.

    Without a split, a file is checked as a whole and any other text by its test split.
    """
    from hat_lib.text.blocks import load_text, names_file

    def two_tokens(text: str, **_):
        return SimpleNamespace(input_ids=list(text.encode()[:2]))

    load_text(source, two_tokens, split=split or ("all" if names_file(source) else "test"), max_tokens=2)


def measured(source: str, split: str, tokens: int, n_bytes: int) -> tuple[float | None, str]:
    """The share of the whole text that ``n_bytes`` are, None if unknown; and the same in words."""
    from hat_lib.text.blocks import source_bytes

    whole = source_bytes(source, "all")
    if not whole or not n_bytes:
        return None, f"{tokens:,} tokens, split {split}"
    share = min(1.0, n_bytes / whole)
    if share > 0.995:
        return share, f"{tokens:,} tokens, the whole text"
    return share, f"{tokens:,} tokens, {share:.1%} of the text, split {split}; see --split and --max-tokens"


def load(
    base: str | None, checkpoint: Path | None, capacity: float | None, exit_rate: float | None, dtype: str | None
) -> HierarchicalTransformer:
    """The model requested by the options of `generate`, `evaluate` and `analyze`."""
    from hat_lib.base.load import load_base
    from hat_lib.hat import HierarchicalTransformer

    if checkpoint is None and capacity == 1.0 and not exit_rate:
        loaded = load_base(base or "bundled", dtype=dtype)
        return HierarchicalTransformer(loaded, HatConfig.default(loaded))
    if checkpoint is None and base not in (None, "bundled"):
        raise HatError(
            f"no checkpoint for {base}: make one with `hat calibrate --base {base} --save DIR` and pass --checkpoint "
            "DIR, or run everything with --capacity 1.0"
        )
    hat = HierarchicalTransformer.from_pretrained(checkpoint or DEFAULT, base, dtype=dtype)
    if capacity is not None:
        hat.capacity = capacity
    if exit_rate is not None:
        hat.exit_rate = exit_rate
    return hat
