"""What a HAT is: one frozen dataclass, the words it uses, and where files live.

- ``capacity``: executed / routable work, in [0.1, 1.0]; 1.0 runs everything.
- ``exit_rate``: requested share of tokens that leave before the last layer, in [0, 1]; 0 is off.
- ``granularity``: what a router decides about, per token: ``channel`` (an input channel of a linear layer; the default)
  or ``token`` (the whole FFN; the published method).
"""

from __future__ import annotations

import ast
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Self

from filelock import lock_descriptor
from platformdirs import user_cache_path

CAPACITY_MIN, CAPACITY_MAX = 0.1, 1.0

# Exit depths of the published method, in layers already run, out of TinyLlama's 22.
PUBLISHED_EXITS, PUBLISHED_DEPTH = (4, 8, 12, 16, 19), 22


class HatError(ValueError):
    """Bad input: one line that names the culprit and what was expected."""


def data_folder() -> Path:
    """Results and reference checkpoints: ``$HAT_DATA``, else the clone's folder data, else the installed package's."""
    if own := os.environ.get("HAT_DATA"):
        return Path(own).expanduser()
    return REPO / "data" if NOTEBOOKS.is_dir() else Path(__file__).with_name("data")


REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = REPO / "notebooks"
DATA = data_folder()
RUNS = (REPO if NOTEBOOKS.is_dir() else Path.cwd()) / "runs"
# Where notebooks draw. Only `hat_lib.workbook execute` and `python -m studies --figures` change the committed figures/.
FIGURES = Path(os.environ.get("HAT_FIGURES", RUNS / "figures"))


def cache_dir() -> Path:
    """Where downloads and dequantised weights are kept: ``$HAT_CACHE``, else the user cache folder. Raises `HatError`
    for a relative ``$HAT_CACHE``, which each kernel would take for another folder."""
    if own := os.environ.get("HAT_CACHE"):
        folder = Path(own).expanduser()
        if not folder.is_absolute():
            raise HatError(f"HAT_CACHE must be an absolute path, got {own!r}")
        return folder
    return user_cache_path("hat_lib", appauthor=False)


def lock(file, taken: str) -> None:
    """Lock an open file until it is closed or its process ends; `HatError` ``taken`` if it already is. On Windows, only
    this file object can then read it."""
    if not lock_descriptor(file.fileno(), blocking=False):
        raise HatError(taken)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Context: a file to write, which takes the place of ``path`` at the end; a kill leaves the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield (written := path.with_name(f"{path.name}.part"))
    os.replace(written, path)


def check_writable(folder: Path, what: str = "a checkpoint") -> None:
    """Raise unless ``what`` can be written to ``folder``; leaves nothing behind."""
    folder = folder.expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise HatError(f"cannot write {what} to {folder}: {error.strerror or error}") from error


def shown(value: object) -> str:
    """``repr`` for an error message: one line of at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes out no whole number of more than 4,300 digits
        text = f"a number too long to print ({type(value).__name__})"
    return text if len(text) <= 80 else f"{text[:77]}..."


def literal(text: str) -> object:
    """The number, list or other value that ``text`` is in Python, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_fraction(name: str, value: object, low: float, high: float) -> float:
    """``value``, a finite number (no bool) or numeric string in [low, high], as a float; else `HatError`."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value  # of numpy and torch
    try:
        number = float(plain) if isinstance(plain, Real | Decimal | str) and not isinstance(plain, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        expected = f"finite number of at least {low}" if high == math.inf else f"number in [{low}, {high}]"
        raise HatError(f"{name} must be a {expected}, got {shown(value)}")
    return number


check_capacity = partial(check_fraction, "capacity", low=CAPACITY_MIN, high=CAPACITY_MAX)
check_exit_rate = partial(check_fraction, "exit rate", low=0.0, high=1.0)


def check_count(name: str, value: object, low: int, high: int = 2**63 - 1) -> int:
    """``value``, a whole number (no bool) of at least ``low`` and at most ``high``, as an int; else `HatError`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        most = " and less than 2**63" if high == 2**63 - 1 else f", at most {high}"  # what an int64 holds
        raise HatError(f"{name} must be a whole number of at least {low}{most}, got {shown(value)}")
    return int(value)


# Why a realised capacity differs from the requested one.
WHY = "thresholds were set on other text, and the first tokens of a block run in full"


def work_text(*, requested_capacity, capacity, requested_exit_rate, exit_rate, model_share, **_) -> str:
    """What was requested and what was realised, in words, with the reason if the capacities differ."""
    why = f" ({WHY})" if abs(capacity - requested_capacity) >= 0.005 else ""
    return (
        f"capacity {requested_capacity:.2f} requested, {capacity:.3f} realised{why}; "
        f"exit rate {requested_exit_rate:.2f} requested, {exit_rate:.3f} realised; model share {model_share:.3f}"
    )


def scaled_exits(n_layers: int) -> tuple[int, ...]:
    """The published exit depths, scaled to ``n_layers``; distinct, in [1, n_layers - 1]."""
    depths = {round(e * n_layers / PUBLISHED_DEPTH) for e in PUBLISHED_EXITS}
    return tuple(sorted(d for d in depths if 1 <= d < n_layers))


@dataclass(frozen=True)
class HatConfig:
    """The method's shape on one base. Everything here is saved in a checkpoint's ``hat_config.json``.

    >>> HatConfig.published(load_base("random:tiny"))
    HatConfig(n_layers=4, granularity='token', exit_layers=(1, 2, 3), capacity=0.55, exit_rate=0.0, translator_rank=1,
    protected_tokens=2, correction_rank=None)
    """

    n_layers: int
    granularity: str = "channel"  #: one of `hat_lib.method.grain.GRAINS`
    exit_layers: tuple[int, ...] = ()  #: depths at which a token may leave, after so many layers; 1 .. n_layers - 1
    capacity: float = 0.75  #: of a freshly loaded model
    exit_rate: float = 0.0  #: of a freshly loaded model
    translator_rank: int = 1  #: of the correction that an exiting hidden state gets, besides a diagonal one and a bias
    protected_tokens: int = 2  #: at the start of each document, which run in full and never exit (attention sinks)
    correction_rank: int | None = None  #: of the corrections for what is skipped; 0: constant vectors; None: none

    def __post_init__(self):
        layers = check_count("n_layers", self.n_layers, 1)
        try:
            exits = tuple(check_count("each of the exit layers", e, 1, layers - 1) for e in self.exit_layers)
        except TypeError as error:
            raise HatError(f"exit layers must be a list of depths, got {shown(self.exit_layers)}") from error
        if exits != tuple(sorted(set(exits))):
            raise HatError(f"exit layers must be distinct and rising, got {shown(list(exits))}")
        checked = {"n_layers": layers, "exit_layers": exits}
        checked |= {"capacity": check_capacity(self.capacity), "exit_rate": check_exit_rate(self.exit_rate)}
        for name in ("translator_rank", "protected_tokens", "correction_rank"):
            if (value := getattr(self, name)) is not None or name != "correction_rank":
                checked[name] = check_count(name, value, 0)
        vars(self).update(checked)  # the class is frozen

    @classmethod
    def default(cls, base, **changes) -> Self:
        """Channel grain at capacity 0.75, with five exits scaled to the depth of a `Base`, a Llama or its config."""
        n = getattr(getattr(base, "model", base), "config", base).num_hidden_layers
        return cls(**{"n_layers": n, "exit_layers": scaled_exits(n), **changes})

    @classmethod
    def published(cls, base, **changes) -> Self:
        """The published shape: whole-FFN token routing at capacity 0.55, with five exits. On TinyLlama-1.1B (22 layers)
        they are at 4, 8, 12, 16 and 19, and about 100K parameters are trained."""
        return cls.default(base, **{"granularity": "token", "capacity": 0.55, **changes})
