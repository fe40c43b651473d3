"""What several commands take, and how a model is loaded. torch is imported inside functions: help answers at once."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer

from hat_lib.config import HatConfig, HatError, check_capacity, check_count, check_exit_rate
from hat_lib.text.plain import check_whole

DEFAULT = Path("default")
"""the trained channel-grain checkpoint of the bundled base, which comes with the library"""

BASES = "bundled, a Hub id (owner/name), a folder with safetensors, a .gguf file, or random:tiny"
TEXTS = (
    "addresses, docstrings, encyclopedia, news, reserve, a .txt, .md, .jsonl or .parquet file, or a Hub dataset "
    "(owner/name[:config])"
)
CAPACITIES = "share of the routable work to execute, 0.1-1.0, where 1.0 runs everything"
DTYPES = "fp32, bf16 or fp16"


def option(default, words: str, *names: str, check: Callable | None = None, **settings):
    """``check`` is called with a value that is given, before the command, and returns what the command gets."""
    if check is not None:
        settings["callback"] = lambda value: value if value is None else check(value)
    return typer.Option(default, *names, help=words, **settings)


def check_dtype(name: str) -> str:
    if name.lower() not in ("auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"):
        raise HatError(f"dtype must be {DTYPES}, got {name!r}")
    return name


# A number is a string to typer, so that a wrong one gets the library's own message.
share = partial(option, None, metavar="SHARE")
dtype = partial(option, check=check_dtype)

BASE = option(None, f"The frozen base: {BASES}. [default: the one the checkpoint names, or bundled]")
BUNDLED = option("bundled", f"The frozen base: {BASES}.")
CHECKPOINT = option(
    None,
    "Folder of `hat calibrate` or `hat train`, one that comes with the library (default, calibrated, token, ...), or "
    "owner/name on the Hub. [default: default, trained, for the bundled base; none at capacity 1.0 without exits]",
)
CAPACITY = share(f"Compute per token: {CAPACITIES}. [default: the checkpoint's]", check=check_capacity)
EXIT_RATE = share(
    "Share of tokens to leave before the last layer, 0-1, where 0 is off; above 0 needs a checkpoint with trained exit "
    "gates. [default: the checkpoint's]",
    check=check_exit_rate,
)
DTYPE = dtype(None, f"{DTYPES}. [default: bf16 where the hardware computes in it, else fp32]")
THREADS = option(None, "Threads to use. [default: one a core]", check=partial(check_count, "threads", low=1, high=1024))
TEXT = option("addresses", f"What to measure on: {TEXTS}.")
SPLIT = option(
    None, "train, validation, test (5 % of a file) or all of it. [default: test; all of a file new to the checkpoint]"
)
MAX_TOKENS = option(4000, "Tokens of text, at least 2; more makes the interval narrower.", min=2)


def load(
    base: str | None = BASE,
    checkpoint: Path | None = CHECKPOINT,
    capacity: str | None = CAPACITY,
    exit_rate: str | None = EXIT_RATE,
    dtype: str | None = DTYPE,
):
    """The `HierarchicalTransformer` that a command runs."""
    from hat_lib.base.load import config_of, load_base
    from hat_lib.hat import HierarchicalTransformer

    if checkpoint is None and capacity == 1.0 and not exit_rate:
        loaded = load_base(base or "bundled", dtype=dtype)
        return HierarchicalTransformer(loaded, HatConfig.default(loaded))
    if checkpoint is None and base not in (None, "bundled"):
        config_of(base)  # a base that is not there is what is wrong
        raise HatError(
            f"no checkpoint for {base}: make one with `hat calibrate --base {base} --save DIR` and pass --checkpoint "
            "DIR, or run everything with --capacity 1.0"
        )
    hat = HierarchicalTransformer.from_pretrained(checkpoint or DEFAULT, base, dtype=dtype)
    for name, value in {"capacity": capacity, "exit_rate": exit_rate}.items():
        if value is not None:
            setattr(hat, name, value)
    return hat


def with_model(command: Callable) -> Callable:
    """``command`` with the options of `load` in the place of its ``**model``."""
    *own, _ = inspect.signature(command, eval_str=True).parameters.values()
    shared = inspect.signature(load, eval_str=True).parameters.values()
    command.__signature__ = inspect.Signature([*shared, *own])
    return command


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


def check_grain(name: str) -> str:
    if name not in ("channel", "token"):
        raise HatError(f"granularity must be among channel, token, got {name!r}")
    return name


def check_prompt(command: str, text: str | None) -> None:
    """Raise for a prompt in which there is nothing to read, or half a character."""
    if not text or not text.strip():
        raise HatError(f'expected a prompt, as in: hat {command} "The future of AI is" (see --help), got {text!r}')
    check_whole("the prompt", text)
