"""A checkpoint: small weights, readable JSON, and the fingerprint of the frozen base.

A folder with `hat_config.json` (method config, base name and fingerprint, library version, calibration
tables, summary of the training) and `hat_adapter.safetensors` (routers and gates, nothing else).

Writing takes three renames: the new adapter goes beside the old one, under its hash; then the JSON, which
names that hash, is replaced; then the adapter moves to its proper name. Reading takes the file with the
hash, so a process killed at any point leaves the old checkpoint or the new one. One writer at a time.

Reading is strict: any surprise raises one `HatError` that names the file, the key and what was expected.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from hat_lib import __version__
from hat_lib.backbone.base import Base, first_line
from hat_lib.config import HatConfig, HatError
from hat_lib.model.schema import FORMAT_VERSION, digest, parse_config, parse_json, readable, shown
from hat_lib.model.threshold_table import Calibration

CONFIG_FILE, ADAPTER_FILE = "hat_config.json", "hat_adapter.safetensors"
# A larger file is something else, and is not read.
MAX_CONFIG_BYTES, MAX_ADAPTER_BYTES = 2**24, 2**30
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    config: HatConfig
    base: str
    """the name to load the base by: "bundled", a Hub id or a folder"""
    base_fingerprint: str
    tensors: dict[str, Tensor]
    """trained parameters by name, fp32"""
    calibration: Calibration | None = None
    training: dict | None = None
    """summary of the run that trained it, any JSON object"""

    def check_base(self, base: Base, folder: str | Path) -> None:
        """Raise `HatError` unless ``base`` is the one that this, read from ``folder``, was made for."""
        file, shape = Path(folder, CONFIG_FILE), base.model.config
        width, depth = shape.hidden_size, shape.num_hidden_layers
        if self.config.n_layers != depth:
            raise HatError(f"{file}: the config is for {self.config.n_layers} layers, {base.name} has {depth}")
        if self.config.translator_rank > width:
            rank = self.config.translator_rank
            raise HatError(f"{file}: translator_rank must be at most {width}, the hidden size, got {rank}")
        if base.fingerprint != self.base_fingerprint:
            raise HatError(
                f"{file} was made for {self.base} with fingerprint {self.base_fingerprint[:12]}..., {base.name} has "
                f"{base.fingerprint[:12]}..."
            )


def is_hat_parameter(name: str) -> bool:
    """The one predicate for what trains, is saved and is counted; ``name`` as in `named_parameters`."""
    return name.startswith(("routers.", "gates."))


def write_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write both files; returns the folder.

    Raises `HatError` if the folder can't be written, and, before it is touched, if what would be written
    could not be read again.
    """
    folder = Path(os.path.expanduser(folder))
    config, adapter = _encode(checkpoint)
    pending = _pending(folder, hashlib.sha256(adapter).hexdigest())
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
    """Read and check both files; nothing is built until all of it is known to be sound."""
    folder = Path(os.path.expanduser(folder))
    if not os.path.isdir(folder):
        raise HatError(f"no checkpoint folder at {folder}")
    found = _read(folder / CONFIG_FILE, MAX_CONFIG_BYTES, parse_config)
    pending = _pending(folder, found.adapter_sha256)
    adapter = pending if os.path.isfile(pending) else folder / ADAPTER_FILE
    tensors = _read(adapter, MAX_ADAPTER_BYTES, lambda data: _parse_adapter(data, found.adapter_sha256))
    return Checkpoint(found.config, found.base, found.base_fingerprint, tensors, found.calibration, found.training)


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], folder: str | Path) -> None:
    """Raise unless the tensors found in ``folder`` have the expected names and shapes."""
    file = Path(folder, ADAPTER_FILE)
    for name in sorted(found.keys() | expected.keys()):
        got, wanted = (t[name].shape if name in t else None for t in (found, expected))
        if wanted is None:
            raise HatError(f"{file}: unexpected key {shown(name)} of shape {shown(tuple(got))}: the model has none")
        if got is None:
            raise HatError(f"{file}: missing key {shown(name)}, expected shape {tuple(wanted)}")
        if got != wanted:
            raise HatError(f"{file}: {shown(name)} has shape {shown(tuple(got))}, expected {tuple(wanted)}")


def _pending(folder: Path, sha256: str) -> Path:
    """Where an adapter waits for the JSON that names it."""
    return folder / f"{ADAPTER_FILE}.{sha256}"


def _encode(checkpoint: Checkpoint) -> tuple[bytes, bytes]:
    """The bytes of both files, parsed once as a check."""
    tensors = {k: v.detach().to("cpu", torch.float32, copy=True) for k, v in checkpoint.tensors.items()}
    adapter = save({k: v.contiguous() for k, v in tensors.items()})
    sha256 = hashlib.sha256(adapter).hexdigest()
    meta = {
        "format_version": FORMAT_VERSION,
        "config": checkpoint.config.to_dict(),
        "base": checkpoint.base,
        "base_fingerprint": checkpoint.base_fingerprint,
        "library_version": __version__,
        "adapter_sha256": sha256,
        "calibration": checkpoint.calibration and checkpoint.calibration.to_dict(),
        "training": checkpoint.training,
    }
    try:
        meta = parse_json(json.dumps(meta).encode())
        config = readable({**meta, "sha256": digest(meta)}).encode()
        parse_config(config)
        _parse_adapter(adapter, sha256)
    except (ValueError, TypeError, RecursionError) as error:
        raise HatError(f"not saved: {first_line(error)}") from error
    return config, adapter


def _read(file: Path, limit: int, parse: Callable):
    """``parse`` the file's bytes; whatever is wrong with it is one short `HatError` that begins with its path."""
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


def _parse_adapter(data: bytes, expected: str) -> dict[str, Tensor]:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != expected:
        raise HatError(f"the file has SHA-256 {sha256[:12]}..., {CONFIG_FILE} expects {expected[:12]}...")
    try:
        tensors = load(data)
    except Exception as error:  # of whatever kind safetensors and torch raise for a header that lies
        raise HatError(f"this is not a safetensors file: {first_line(error)}") from error
    for name, tensor in tensors.items():
        if not is_hat_parameter(name):
            raise HatError(f"unexpected key {shown(name)}: not a router's or a gate's parameter")
        if tensor.dtype != torch.float32:
            raise HatError(f"{shown(name)} must be torch.float32, got {tensor.dtype}")
        if not torch.isfinite(tensor.view(-1)).all():  # flat: torch refuses more than 64 dimensions
            raise HatError(f"{shown(name)} holds a value that is not finite")
    return tensors


def _replace(path: Path, payload: bytes) -> None:
    """Write beside ``path``, flush to disk, then rename over it."""
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
