"""What a HAT is: one frozen dataclass, the words it uses, and where files live.

``capacity``   executed / routable work, in [0.1, 1.0]; 1.0 runs everything.
``exit_rate``  requested share of tokens that leave before the last layer, in [0, 1]; 0 is off.
``granularity``  what a router decides about: ``channel`` (an input channel of a linear layer, per
token; the default) or ``token`` (the whole FFN, per token; the published method).
"""

from __future__ import annotations

import math
import os
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path

CAPACITY_MIN, CAPACITY_MAX = 0.1, 1.0
GRANULARITIES = ("channel", "token")

# Exit depths of the published method, in layers already run, out of TinyLlama's 22.
PUBLISHED_EXITS, PUBLISHED_DEPTH = (4, 8, 12, 16, 19), 22

REPO = Path(__file__).resolve().parent.parent
# Results and reference checkpoints, which come with the repository, not with an installed package.
DATA = Path(os.environ.get("HAT_DATA", REPO / "data")).expanduser()
NOTEBOOKS = REPO / "notebooks"
RUNS = (REPO if NOTEBOOKS.is_dir() else Path.cwd()) / "runs"
NO_DATA = (
    "reference checkpoints, results and notebooks come with a clone of the repository alone: clone it, and install it "
    "with pip install -e or set HAT_DATA to its folder data"
)
# Where notebooks draw. Only `hat_lib.workbook execute` and `python -m studies --figures` change the committed figures/.
FIGURES = Path(os.environ.get("HAT_FIGURES", RUNS / "figures"))


class HatError(ValueError):
    """Bad input, reported in one line that names the culprit and what was expected."""


def outside_repository(message: str) -> bool:
    """Whether ``message`` names a folder that only a clone of the repository has, and which is missing here."""
    return any(str(place) in message and not place.is_dir() for place in (DATA, NOTEBOOKS))


def cache_dir() -> Path:
    """Where downloads and dequantised weights are kept: ``$HAT_CACHE``, else the user cache folder.

    An empty variable counts as unset. Raises `HatError` for a relative ``$HAT_CACHE``: each kernel and process has a
    working directory of its own, and would fill another folder.
    """
    if own := os.environ.get("HAT_CACHE"):
        folder = Path(own).expanduser()
        if not folder.is_absolute():
            raise HatError(f"HAT_CACHE must be an absolute path, got {own!r}")
        return folder
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hat_lib"


def lock(file, taken: str) -> None:
    """Lock an open file until it is closed (`flock`, so not on Windows); `HatError` ``taken`` if it already is."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HatError(taken) from error
    except OSError as error:
        raise HatError(f"cannot lock {file.name}: {error.strerror or error}") from error


def check_fraction(name: str, value: object, low: float, high: float) -> float:
    """``value``, a number or numeric string in [low, high], as a float; else `HatError`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not low <= number <= high:  # nan fails the comparison too
        raise HatError(f"{name} must be a number in [{low}, {high}], got {value!r}")
    return number


check_capacity = partial(check_fraction, "capacity", low=CAPACITY_MIN, high=CAPACITY_MAX)
check_exit_rate = partial(check_fraction, "exit rate", low=0.0, high=1.0)


def check_count(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value``, a whole number of at least ``low`` and at most ``high``; else `HatError`."""
    if not _is_int(value) or value < low or (high is not None and value > high):
        most = "" if high is None else f", at most {high}"
        raise HatError(f"{name} must be a whole number of at least {low}{most}, got {value!r}")
    return value


WHY = "thresholds were set on other text, and the first tokens of a block run in full"
"""why a realised capacity differs from the requested one"""


def work_text(capacity: float, realised: float, exit_rate: float, realised_exit: float, model_share: float) -> str:
    """What was requested and what was realised, in words, with the reason if the capacities differ."""
    why = f" ({WHY})" if abs(realised - capacity) >= 0.005 else ""
    return (
        f"capacity {capacity:.2f} requested, {realised:.3f} realised{why}; exit rate {exit_rate:.2f} requested, "
        f"{realised_exit:.3f} realised; model share {model_share:.3f}"
    )


def scaled_exits(n_layers: int) -> tuple[int, ...]:
    """The published exit depths, scaled to ``n_layers``; distinct, in [1, n_layers - 1].

    >>> scaled_exits(22), scaled_exits(30)
    ((4, 8, 12, 16, 19), (5, 11, 16, 22, 26))
    """
    depths = {round(e * n_layers / PUBLISHED_DEPTH) for e in PUBLISHED_EXITS}
    return tuple(sorted(d for d in depths if 1 <= d < n_layers))


@dataclass(frozen=True)
class HatConfig:
    """The method's shape on one base. Everything here is saved in a checkpoint's ``hat_config.json``."""

    n_layers: int
    granularity: str = "channel"
    exit_layers: tuple[int, ...] = ()
    """depths at which a token may leave: at exit ``e``, ``e`` layers have run; 1 .. n_layers - 1"""
    capacity: float = 0.75
    exit_rate: float = 0.0
    """both: the settings of a freshly loaded model"""
    translator_rank: int = 1
    """rank of the correction that an exiting hidden state gets, besides a diagonal one and a bias"""
    protected_tokens: int = 2
    """real tokens at the start of each document that run in full and never exit (attention sinks)"""
    correction_rank: int | None = None
    """rank of the corrections for what is skipped; 0: constant vectors only; None: no corrections"""

    def __post_init__(self):
        object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        check_count("n_layers", self.n_layers, 1)
        if self.granularity not in GRANULARITIES:
            raise HatError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}")
        for e in self.exit_layers:
            if not _is_int(e) or not 1 <= e < self.n_layers:
                raise HatError(f"exit layers must lie in 1..{self.n_layers - 1} for {self.n_layers} layers, got {e!r}")
        if list(self.exit_layers) != sorted(set(self.exit_layers)):
            raise HatError(f"exit layers must be sorted and distinct, got {list(self.exit_layers)}")
        object.__setattr__(self, "capacity", check_capacity(self.capacity))
        object.__setattr__(self, "exit_rate", check_exit_rate(self.exit_rate))
        for name in ("translator_rank", "protected_tokens"):
            check_count(name, getattr(self, name), 0)
        if self.correction_rank is not None:
            check_count("correction_rank", self.correction_rank, 0)

    @classmethod
    def default(cls, base, **changes) -> HatConfig:
        """Channel grain at capacity 0.75, with five exits scaled to the depth of ``base``.

        ``base`` is a `Base`, a Llama model or its config.
        """
        n = getattr(getattr(base, "model", base), "config", base).num_hidden_layers
        return cls(**{"n_layers": n, "exit_layers": scaled_exits(n), **changes})

    @classmethod
    def published(cls, base, **changes) -> HatConfig:
        """The published shape: whole-FFN token routing at capacity 0.55, with five exits. On TinyLlama-1.1B (22 layers)
        they are at 4, 8, 12, 16 and 19, and about 100K parameters are trained."""
        return cls.default(base, **{"granularity": "token", "capacity": 0.55, **changes})

    def to_dict(self) -> dict:
        return {**asdict(self), "exit_layers": list(self.exit_layers)}

    @classmethod
    def from_dict(cls, values: dict) -> HatConfig:
        """From JSON as written by `to_dict`, or by an older version of it: missing fields take their defaults."""
        values = with_defaults("config", values, defaults(cls))
        if not isinstance(values["exit_layers"], list | tuple):
            raise HatError(f"exit_layers must be a list, got {values['exit_layers']!r}")
        for name in ("capacity", "exit_rate"):
            if isinstance(values[name], str):  # strings are for the command line only
                raise HatError(f"{name} must be a number, got {values[name]!r}")
        return cls(**values)


def defaults(kind: type) -> dict[str, object]:
    """The fields of a dataclass with their defaults; `dataclasses.MISSING` where there is none."""
    return {f.name: f.default for f in fields(kind)}


def with_defaults(what: str, values: object, known: dict[str, object]) -> dict:
    """The JSON object ``values``, with the defaults in ``known`` filled in.

    Raises `HatError`, naming ``what``, for unknown fields and for missing ones whose default is `dataclasses.MISSING`.
    """
    if not isinstance(values, dict):
        raise HatError(f"{what} must be an object, got {type(values).__name__}")
    found = known | values
    missing = sorted(name for name, value in found.items() if value is MISSING)
    for problem, names in (("unknown", sorted(set(found) - set(known))), ("missing", missing)):
        if names:
            raise HatError(f"{problem} fields in {what}: {names}")
    return found


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
