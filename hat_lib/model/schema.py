"""What `hat_config.json` may say, and nothing else.

Standard JSON with every field checked for its type, size and range, in tables that mirror the dataclasses.
Files of older versions are read: what they lack takes its default. The last field, ``sha256``, covers the meaning
of all others, so that a changed digit in a calibration table is noticed too. It is optional: who edits the file by
hand deletes that line.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise

from hat_lib import __version__
from hat_lib.config import HatConfig, HatError, with_defaults
from hat_lib.model.granularity import GRAINS
from hat_lib.model.threshold_table import Calibration

FORMAT_VERSION = 1
"""What this library writes, and the newest that it reads. Raise it by one for each new field: the field gets a default,
which older files take, and an older library says that it is too old."""

# Deeper than anything that is ours, and well within the stack of every Python.
MAX_DEPTH = 500

_NAME = (r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,1000}", "a line of 1 to 1000 characters")
_HASH = (r"[0-9a-f]{64}", "64 hex digits")
_STRINGS = {"base": _NAME, "base_fingerprint": _HASH, "library_version": _NAME, "adapter_sha256": _HASH}


@dataclass
class ConfigFile:
    """The fields of the file."""

    config: dict | HatConfig
    base: str
    base_fingerprint: str
    library_version: str
    """of the library that wrote it"""
    adapter_sha256: str
    """SHA-256 of the file of weights"""
    calibration: dict | Calibration | None = None
    training: dict | None = None
    format_version: int = 0
    """files from before there was one have none"""


# Calibration tables: axes, least and greatest value, order of the innermost lists (1 rising, -1 falling, 0 any).
# L layers, S sites and E exits are the config's; C capacities, K of them with exits, and R exit rates are as many as
# the first table has.
_TABLES = {
    "capacities": ("C", 0, 1, 1),
    "thresholds": ("LSC", -math.inf, math.inf, -1),
    "shares": ("LSC", 0, 1, 0),
    "exit_capacities": ("K", 0, 1, 1),
    "exit_rates": ("KR", 0, 1, 1),
    "exit_scores": ("KRE", -math.inf, math.inf, 0),
}

_shown = reprlib.Repr()
_shown.maxstring = 80
shown = _shown.repr
"""`repr`, short enough for a one-line message"""


def parse_config(data: bytes) -> ConfigFile:
    """The file's fields, with ``config`` and ``calibration`` as dataclasses; raises `HatError` with the key."""
    meta = parse_json(data)
    if not isinstance(meta, dict):
        raise HatError(f"expected an object, got {shown(meta)}")
    version = meta.get("format_version", 0)
    if type(version) is not int or version < 0:
        raise HatError(f"format_version must be a whole number of at least 0, got {shown(version)}")
    if version > FORMAT_VERSION:  # first of all: nothing else in it may mean what it means here
        ours = f"hat_lib {__version__} reads versions up to {FORMAT_VERSION}"
        raise HatError(f"format_version is {version}, {ours}: upgrade hat_lib")
    rest = digest({key: value for key, value in meta.items() if key != "sha256"})
    sha256 = meta.pop("sha256", rest)
    file = ConfigFile(**with_defaults("the file", meta, ConfigFile))
    for key, (pattern, words) in _STRINGS.items():
        value = getattr(file, key)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise HatError(f"{key} must be {words}, got {shown(value)}")
    if not isinstance(file.training, dict | None):
        raise HatError(f"training must be an object or null, got {shown(file.training)}")
    file.config = HatConfig.from_dict(file.config)
    if file.calibration is not None:
        file.calibration = _calibration(file.calibration, file.config)
        if file.config.exit_rate and file.calibration.exit_rates is None:
            rate = file.config.exit_rate
            raise HatError(f"exit_rate {rate} needs trained exit gates, but calibration.exit_rates is null")
    # Last, because the checks above say more about what is wrong.
    if sha256 != rest:
        raise HatError(
            f"sha256 is {shown(sha256)}, the rest has {rest[:12]}...: damaged (or edited: then delete the line sha256)"
        )
    return file


def digest(meta: dict) -> str:
    """SHA-256 of the meaning, not of the spaces."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def parse_json(data: bytes):
    """Standard JSON in UTF-8: no key twice in one object, no number beyond int64 or float64, not nested too deep."""
    number, whole = partial(_bounded, float, math.inf), partial(_bounded, int, 2**63)
    hooks = {"object_pairs_hook": _unique, "parse_int": whole, "parse_float": number, "parse_constant": number}
    try:
        value = json.loads(data.decode(), **hooks)
    except (ValueError, RecursionError) as error:
        raise HatError(f"this is not valid JSON: {error}") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [v for part in level if isinstance(part, dict | list) for v in _inside(part)]
        if not level:
            return value
    raise HatError(f"this is nested deeper than {MAX_DEPTH}")


def readable(value, indent: int = 0) -> str:
    """JSON with one line for each list of numbers, so that a person can read the tables."""
    inside, outside = "\n" + " " * (indent + 1), "\n" + " " * indent
    if isinstance(value, dict) and value:
        rows = [f"{json.dumps(k)}: {readable(v, indent + 1)}" for k, v in value.items()]
        return "{" + inside + f",{inside}".join(rows) + outside + "}"
    if isinstance(value, list) and any(isinstance(v, list) for v in value):
        return "[" + inside + f",{inside}".join(readable(v, indent + 1) for v in value) + outside + "]"
    return json.dumps(value, allow_nan=False)


def _inside(part: dict | list):
    return part.values() if isinstance(part, dict) else part


def _unique(pairs: list[tuple]) -> dict:
    found: dict = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {shown(key)}")
        found[key] = value
    return found


def _bounded(kind: type, bound: float, text: str):
    value = kind(text)
    if not abs(value) < bound:  # nan fails the comparison too
        raise ValueError(f"number out of range: {shown(text)}")
    return value


def _calibration(values: object, config: HatConfig) -> Calibration:
    values = with_defaults("calibration", values, Calibration)
    sites = list(GRAINS[config.granularity].sites)
    if values["sites"] != sites:
        raise HatError(f"calibration.sites must be {sites}, got {shown(values['sites'])}")
    defaults = {f.name: f.default for f in fields(Calibration)}
    for name, default in defaults.items():
        if isinstance(default, str) and not isinstance(values[name], str):
            raise HatError(f"calibration.{name} must be a str, got {shown(values[name])}")
    sizes = {"L": config.n_layers, "S": len(sites), "E": len(config.exit_layers)}
    for name, table in _TABLES.items():
        if values[name] is not None or defaults[name] is not None:
            _check_table(f"calibration.{name}", values[name], *table, sizes)
    if len({values[name] is None for name in ("exit_capacities", "exit_rates", "exit_scores")}) > 1:
        raise HatError("calibration.exit_capacities, exit_rates and exit_scores must be all null or all lists")
    if values["capacities"][-1] != 1:
        raise HatError(f"calibration.capacities must end at 1, got {values['capacities'][-1]}")
    return Calibration(**values)


def _check_table(name: str, value, axes: str, low: float, high: float, order: int, sizes: dict[str, int]) -> None:
    """Raise unless ``value`` is lists nested along ``axes`` of numbers in [low, high]; new axes enter ``sizes``."""
    if not axes:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise HatError(f"{name} must be a number in [{low}, {high}], got {shown(value)}")
        return
    if not isinstance(value, list):
        raise HatError(f"{name} must be a list, got {shown(value)}")
    size = sizes.setdefault(axes[0], max(1, len(value)))
    if len(value) != size:
        raise HatError(f"{name} must have {size} entries, got {len(value)}")
    for i, entry in enumerate(value):
        _check_table(f"{name}[{i}]", entry, axes[1:], low, high, order, sizes)
    if order and len(axes) == 1 and any(order * a > order * b for a, b in pairwise(value)):
        raise HatError(f"{name} must be in {'rising' if order > 0 else 'falling'} order, got {shown(value)}")
