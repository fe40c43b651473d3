"""A checkpoint: small weights, readable JSON, and the fingerprint of the frozen base.

A folder with `hat_config.json` (method config, base name and fingerprint, library version, calibration tables, training
summary) and `hat_adapter.safetensors` (routers, gates and corrections, nothing else).

Writing takes three renames: the new adapter goes next to the old one, under its hash; then the JSON, which names that
hash, is replaced; then the adapter moves to its proper name. Reading takes the file with the hash, so a process killed
at any point leaves the old checkpoint or the new one. One writer at a time.

Reading is strict: any surprise raises one `HatError` that names the file, the key and what was expected. Fields that
older versions' files lack take their defaults. The JSON's last field, ``sha256``, covers the content of all others, so
that a changed digit in a table is noticed; to edit the file by hand, delete that line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from hat_lib import __version__
from hat_lib.backbone.base import Base, first_line
from hat_lib.config import HatConfig, HatError, defaults, with_defaults
from hat_lib.model.threshold_table import Calibration, shown

CONFIG_FILE, ADAPTER_FILE = "hat_config.json", "hat_adapter.safetensors"
# A larger file is something else, and is not read.
MAX_CONFIG_BYTES, MAX_ADAPTER_BYTES = 2**24, 2**30
# Of JSON: more than any file of ours needs, and well within the stack of every Python.
MAX_DEPTH = 500
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}

FORMAT_VERSION = 2
"""What this library writes, and the newest that it reads. Raise it by one for each new field: older files take the
field's default, and an older library says that it is too old."""

# The fields of the JSON. The first files had no version.
FIELDS = dict.fromkeys(("config", "base", "base_fingerprint", "library_version", "adapter_sha256"), MISSING)
FIELDS |= {"calibration": None, "training": None, "format_version": 0}
_NAME = (r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,1000}", "a line of 1 to 1000 characters")
_HASH = (r"[0-9a-f]{64}", "64 hex digits")
_STRINGS = {"base": _NAME, "base_fingerprint": _HASH, "library_version": _NAME, "adapter_sha256": _HASH}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    config: HatConfig
    base: str
    """the name to load the base by: "bundled", a Hub id or a folder"""
    base_fingerprint: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """trained parameters by name, fp32"""
    calibration: Calibration | None = None
    training: dict | None = None
    """summary of the run that trained it, any JSON object"""

    def check_base(self, base: Base, folder: str | Path) -> None:
        """Raise `HatError` unless ``base`` is the one that this checkpoint, read from ``folder``, was made for."""
        if base.fingerprint != self.base_fingerprint:
            raise HatError(
                f"{Path(folder, CONFIG_FILE)} was made for {self.base} with fingerprint "
                f"{self.base_fingerprint[:12]}..., {base.name} has {base.fingerprint[:12]}..."
            )


def is_hat_parameter(name: str) -> bool:
    """The one predicate for what is trained, saved and counted; ``name`` as in `named_parameters`."""
    return name.startswith(("routers.", "gates.", "corrections."))


def write_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write both files; returns the folder. Raises `HatError` if it can't be written, or, before it is touched, if
    what would be written could not be read back."""
    folder = Path(os.path.expanduser(folder))
    config, adapter = _encode(checkpoint)
    pending = folder / f"{ADAPTER_FILE}.{hashlib.sha256(adapter).hexdigest()}"  # it waits for the JSON that names it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(pending, adapter)
        _replace(folder / CONFIG_FILE, config)
        os.replace(pending, folder / ADAPTER_FILE)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise HatError(f"cannot write a checkpoint to {folder}: {getattr(error, 'strerror', None) or error}") from error
    with contextlib.suppress(OSError):  # what a killed process left
        for pattern in (f"{ADAPTER_FILE}.{'?' * 64}", f".{ADAPTER_FILE}.*.tmp", f".{CONFIG_FILE}.*.tmp"):
            for left in folder.glob(pattern):
                left.unlink()
    return folder


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and check both files; nothing is built until all of it is known to be valid."""
    folder = Path(os.path.expanduser(folder))
    if not os.path.isdir(folder):
        raise HatError(f"no checkpoint folder at {folder}")
    if os.path.isfile(folder / "run.json") and not os.path.isfile(folder / CONFIG_FILE):
        raise HatError(f"{folder} holds a training run without a finished phase: hat train --resume {folder}")
    found, sha256 = _read(folder / CONFIG_FILE, MAX_CONFIG_BYTES, parse_config)
    pending = folder / f"{ADAPTER_FILE}.{sha256}"
    adapter = pending if os.path.isfile(pending) else folder / ADAPTER_FILE
    return replace(found, tensors=_read(adapter, MAX_ADAPTER_BYTES, partial(_parse_adapter, sha256)))


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], folder: str | Path) -> None:
    """Raise `HatError` unless the tensors found in ``folder`` have the expected names and shapes."""
    file = Path(folder, ADAPTER_FILE)
    for name in sorted(found.keys() | expected.keys()):
        got, wanted = (t[name].shape if name in t else None for t in (found, expected))
        if wanted is None:
            raise HatError(f"{file}: unexpected key {shown(name)} of shape {shown(tuple(got))}: the model has none")
        if got is None:
            raise HatError(f"{file}: missing key {shown(name)}, expected shape {tuple(wanted)}")
        if got != wanted:
            raise HatError(f"{file}: {shown(name)} has shape {shown(tuple(got))}, expected {tuple(wanted)}")


def parse_config(data: bytes) -> tuple[Checkpoint, str]:
    """What the JSON says, without the tensors, and the SHA-256 of their file; raises `HatError` naming the key."""
    meta = _parse_json(data)
    if not isinstance(meta, dict):
        raise HatError(f"expected an object, got {shown(meta)}")
    version = meta.get("format_version", 0)
    if type(version) is not int or version < 0:
        raise HatError(f"format_version must be a whole number of at least 0, got {shown(version)}")
    if version > FORMAT_VERSION:  # first of all: the rest may no longer mean what it means here
        ours = f"hat_lib {__version__} reads versions up to {FORMAT_VERSION}"
        raise HatError(f"format_version is {version}, {ours}: upgrade hat_lib")
    rest = digest({key: value for key, value in meta.items() if key != "sha256"})
    sha256 = meta.pop("sha256", rest)
    meta = with_defaults("the file", meta, FIELDS)
    for key, (pattern, words) in _STRINGS.items():
        if not isinstance(meta[key], str) or not re.fullmatch(pattern, meta[key]):
            raise HatError(f"{key} must be {words}, got {shown(meta[key])}")
    training, calibration = meta["training"], meta["calibration"]
    if not isinstance(training, dict | None):
        raise HatError(f"training must be an object or null, got {shown(training)}")
    config = HatConfig.from_dict(meta["config"])
    if calibration is not None:
        calibration = Calibration(**with_defaults("calibration", calibration, defaults(Calibration)))
        calibration.check(config)
        if config.exit_rate and calibration.exit_rates is None:
            rate = config.exit_rate
            raise HatError(f"exit_rate {rate} needs trained exit gates, but calibration.exit_rates is null")
    # Last, because the checks above say more about what is wrong.
    if sha256 != rest:
        raise HatError(
            f"sha256 is {shown(sha256)}, the rest has {rest[:12]}...: damaged (or edited: then delete the line sha256)"
        )
    found = Checkpoint(config, meta["base"], meta["base_fingerprint"], calibration=calibration, training=training)
    return found, meta["adapter_sha256"]


def digest(meta: dict) -> str:
    """SHA-256 of the content, whatever the whitespace."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _parse_json(data: bytes):
    """Standard JSON in UTF-8: no duplicate keys, no number beyond int64 or float64, not nested too deeply."""
    number, whole = partial(_bounded, float, math.inf), partial(_bounded, int, 2**63)
    hooks = {"object_pairs_hook": _unique, "parse_int": whole, "parse_float": number, "parse_constant": number}
    try:
        value = json.loads(data.decode(), **hooks)
    except (ValueError, RecursionError) as error:
        raise HatError(f"this is not valid JSON: {error}") from error
    level, depth = [value], 0
    while level:
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level, depth = [inner for part in parts for inner in part], depth + 1
        if depth > MAX_DEPTH:
            raise HatError(f"this is nested deeper than {MAX_DEPTH}")
    return value


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


def _readable(value, indent: int = 0) -> str:
    """JSON with one line for each list of numbers, so that a person can read the tables."""
    inside, outside = "\n" + " " * (indent + 1), "\n" + " " * indent
    if isinstance(value, dict) and value:
        rows = [f"{json.dumps(k)}: {_readable(v, indent + 1)}" for k, v in value.items()]
        return "{" + inside + f",{inside}".join(rows) + outside + "}"
    if isinstance(value, list) and any(isinstance(v, list) for v in value):
        return "[" + inside + f",{inside}".join(_readable(v, indent + 1) for v in value) + outside + "]"
    return json.dumps(value, allow_nan=False)


def _parse_adapter(expected: str, data: bytes) -> dict[str, Tensor]:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != expected:
        raise HatError(f"the file has SHA-256 {sha256[:12]}..., {CONFIG_FILE} expects {expected[:12]}...")
    try:
        tensors = load(data)
    except Exception as error:  # of whatever kind safetensors and torch raise for a header that lies
        raise HatError(f"this is not a safetensors file: {first_line(error)}") from error
    for name, tensor in tensors.items():
        if not is_hat_parameter(name):
            raise HatError(f"unexpected key {shown(name)}: not a parameter of a router, a gate or a correction")
        if tensor.dtype != torch.float32:
            raise HatError(f"{shown(name)} must be torch.float32, got {tensor.dtype}")
        if not torch.isfinite(tensor.view(-1)).all():  # flat: torch refuses more than 64 dimensions
            raise HatError(f"{shown(name)} holds a value that is not finite")
    return tensors


def _encode(checkpoint: Checkpoint) -> tuple[bytes, bytes]:
    """The bytes of both files, parsed back as a check."""
    # Copied: safetensors refuses tensors that share memory.
    tensors = {k: v.detach().to("cpu", torch.float32, copy=True).contiguous() for k, v in checkpoint.tensors.items()}
    adapter = save(tensors)
    sha256 = hashlib.sha256(adapter).hexdigest()
    meta = {
        "format_version": FORMAT_VERSION,
        "config": checkpoint.config.to_dict(),
        "base": checkpoint.base,
        "base_fingerprint": checkpoint.base_fingerprint,
        "library_version": __version__,
        "adapter_sha256": sha256,
        "calibration": checkpoint.calibration and asdict(checkpoint.calibration),
        "training": checkpoint.training,
    }
    try:
        meta = _parse_json(json.dumps(meta).encode())
        config = _readable({**meta, "sha256": digest(meta)}).encode()
        parse_config(config)
        _parse_adapter(sha256, adapter)
    except (ValueError, TypeError, RecursionError) as error:
        raise HatError(f"not saved: {first_line(error)}") from error
    return config, adapter


def _read(file: Path, limit: int, parse: Callable):
    """``parse`` the file's bytes; whatever is wrong with it raises one short `HatError` that begins with its path."""
    try:
        if not os.path.isfile(file):
            found = "is not a file" if os.path.lexists(file) else "is missing"
            pickles = sorted(p.name for p in file.parent.iterdir() if p.suffix in PICKLES)
            hint = f"; {pickles[0]} is a pickle, and pickles are never loaded" if pickles else ""
            raise HatError(f"{file.parent} is not a HAT checkpoint: {file.name} {found}{hint}")
        size = file.stat().st_size
        if size > limit:
            raise HatError(f"{file} has {size} bytes, expected at most {limit}")
        data = file.read_bytes()
    except OSError as error:
        raise HatError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        return parse(data)
    except (HatError, RecursionError) as error:
        raise HatError(f"{file}: {first_line(error)}") from error


def _replace(path: Path, payload: bytes) -> None:
    """Write next to ``path``, flush to disk, then rename over it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
