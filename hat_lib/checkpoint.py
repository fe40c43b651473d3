"""A checkpoint: small weights, readable JSON, and the fingerprint of the frozen base.

A folder with `hat_config.json` (method config, base name and fingerprint, library version, calibration
tables) and `hat_adapter.safetensors` (routers and gates, nothing else). Writing is atomic per file and the
JSON, which names the adapter's hash, goes last: a folder is either the old checkpoint or the new one, or
says that it is neither. Reading is strict: any surprise raises one `HatError` that names the file, the key
and both values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from . import __version__
from .config import HatConfig, HatError
from .grains import GRAINS
from .thresholds import Calibration

CONFIG_FILE, ADAPTER_FILE = "hat_config.json", "hat_adapter.safetensors"
_FIELDS = {
    "config",
    "base",
    "base_fingerprint",
    "library_version",
    "adapter_sha256",
    "calibration",
    "training",
}


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
    """summary of the run that trained it, if any"""


def write_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write both files; returns the folder. Raises `HatError` if the folder can't be written."""
    folder = Path(folder)
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    bad = [k for k, v in tensors.items() if not torch.isfinite(v).all()]
    if bad:
        raise HatError(f"not saved: {bad[0]} holds a value that is not finite")
    payload = save(tensors)
    meta = {
        "config": checkpoint.config.to_dict(),
        "base": checkpoint.base,
        "base_fingerprint": checkpoint.base_fingerprint,
        "library_version": __version__,
        "adapter_sha256": hashlib.sha256(payload).hexdigest(),
        "calibration": checkpoint.calibration and checkpoint.calibration.to_dict(),
        "training": checkpoint.training,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / ADAPTER_FILE, payload)
        _replace(folder / CONFIG_FILE, _readable(meta).encode())
    except OSError as error:
        raise HatError(f"cannot write a checkpoint to {folder}: {error.strerror or error}") from error
    return folder


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and check both files; nothing is built until all of it is known to be sound."""
    folder = Path(folder)
    config_file, adapter_file = folder / CONFIG_FILE, folder / ADAPTER_FILE
    if not folder.is_dir():
        raise HatError(f"no checkpoint folder at {folder}")
    for file in (config_file, adapter_file):
        if not file.is_file():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"})
            hint = f"; {pickles[0]} is a pickle, and pickles are never loaded" if pickles else ""
            raise HatError(f"{folder} is not a HAT checkpoint: {file.name} is missing{hint}")
    try:
        meta = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HatError(f"{config_file} is not valid JSON: {error}") from error
    if not isinstance(meta, dict) or set(meta) != _FIELDS:
        odd = sorted(set(meta) ^ _FIELDS) if isinstance(meta, dict) else type(meta).__name__
        raise HatError(f"{config_file} must have exactly the fields {sorted(_FIELDS)}; missing or unknown: {odd}")
    for key, kind in {
        "base": str,
        "base_fingerprint": str,
        "adapter_sha256": str,
        "library_version": str,
    }.items():
        if not isinstance(meta[key], kind):
            raise HatError(f"{config_file}: {key} must be a {kind.__name__}, got {meta[key]!r}")
    if not isinstance(meta["training"], dict | None):
        raise HatError(f"{config_file}: training must be an object or null, got {meta['training']!r}")

    payload = adapter_file.read_bytes()
    digest = hashlib.sha256(payload).hexdigest()
    if digest != meta["adapter_sha256"]:
        raise HatError(
            f"{adapter_file} has SHA-256 {digest[:12]}..., {CONFIG_FILE} expects {meta['adapter_sha256'][:12]}..."
        )
    try:
        tensors = load(payload)
    except SafetensorError as error:
        raise HatError(f"{adapter_file} is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise HatError(f"{adapter_file}: {name} must be finite float32, got {tensor.dtype}")
    try:
        config = HatConfig.from_dict(meta["config"])
        calibration = None if meta["calibration"] is None else _calibration(meta["calibration"], config)
    except HatError as error:
        raise HatError(f"{config_file}: {error}") from error
    return Checkpoint(config, meta["base"], meta["base_fingerprint"], tensors, calibration, meta["training"])


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], where: str | Path) -> None:
    """Raise unless both have the same names and shapes."""
    for name in sorted(set(found) | set(expected)):
        if name not in expected:
            raise HatError(
                f"{where}: unexpected key {name} {tuple(found[name].shape)}; the model has no such parameter"
            )
        if name not in found:
            raise HatError(f"{where}: missing key {name}, expected shape {tuple(expected[name].shape)}")
        if found[name].shape != expected[name].shape:
            raise HatError(
                f"{where}: {name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            )


def _calibration(values: dict, config: HatConfig) -> Calibration:
    known = {f.name for f in fields(Calibration)}
    if not isinstance(values, dict) or set(values) != known:
        odd = sorted(set(values) ^ known) if isinstance(values, dict) else type(values).__name__
        raise HatError(f"calibration must have exactly the fields {sorted(known)}; missing or unknown: {odd}")
    sites = list(GRAINS[config.granularity].sites)
    if values["sites"] != sites:
        raise HatError(f"calibration.sites must be {sites} for {config.granularity}, got {values['sites']!r}")
    depths = {"work": 2, "sensitivity": 2, "exponent": 2, "quantiles": 3, "budget_curve": 2}
    for table, depth in depths.items():
        if not _numbers(values[table], depth):
            raise HatError(f"calibration.{table} must be {depth} nested lists of finite numbers")
    for table in ("work", "sensitivity", "exponent", "quantiles"):
        if len(values[table]) != config.n_layers or any(len(row) != len(sites) for row in values[table]):
            raise HatError(f"calibration.{table} must cover {config.n_layers} layers x {len(sites)} sites")
    work = [w for row in values["work"] for w in row]
    if min(work) < 0 or abs(sum(work) - 1) > 1e-6:
        raise HatError(f"calibration.work must be shares that sum to 1, got a sum of {sum(work):.6g}")
    if not all(_rising(scores) for row in values["quantiles"] for scores in row):
        raise HatError("calibration.quantiles must be lists of scores in rising order")
    curve = values["budget_curve"]
    if len(curve) != 2 or len(curve[0]) != len(curve[1]) or not all(_rising(c) for c in curve):
        raise HatError("calibration.budget_curve must be two lists of one length, each in rising order")
    smallest = min(p for row in values["exponent"] for p in row)
    if smallest <= 1:
        raise HatError(f"calibration.exponent must be numbers above 1, got {smallest!r}")
    if not _numbers(values["floor"], 0) or not 0 <= values["floor"] <= 1:
        raise HatError(f"calibration.floor must be a number in [0, 1], got {values['floor']!r}")
    if not isinstance(values["text"], str):
        raise HatError(f"calibration.text must be a str, got {values['text']!r}")
    _check_exits(values["exit_rates"], values["exit_scores"], len(config.exit_layers))
    return Calibration(**values)


def _check_exits(rates, scores, n_exits: int) -> None:
    if rates is None and scores is None:
        return
    if not _numbers(rates, 1) or not _rising(rates):
        raise HatError(f"calibration.exit_rates must be rising numbers, got {rates!r}")
    if not _numbers(scores, 2) or [len(row) for row in scores] != [n_exits] * len(rates):
        raise HatError(f"calibration.exit_scores must cover {len(rates)} rates x {n_exits} exits")


def _rising(values: list) -> bool:
    return len(values) > 0 and all(a <= b for a, b in pairwise(values))


def _numbers(value, depth: int) -> bool:
    if depth:
        return isinstance(value, list) and all(_numbers(v, depth - 1) for v in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _replace(path: Path, payload: bytes) -> None:
    """Write beside ``path``, flush to disk, then rename over it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _readable(value, indent: int = 0) -> str:
    """JSON with one line for each list of numbers, so that a person can read the tables."""
    if isinstance(value, dict):
        inner = ",\n".join(f"{' ' * (indent + 1)}{json.dumps(k)}: {_readable(v, indent + 1)}" for k, v in value.items())
        return "{\n" + inner + "\n" + " " * indent + "}" if value else "{}"
    if isinstance(value, list) and any(isinstance(v, list) for v in value):
        return (
            "[\n" + ",\n".join(" " * (indent + 1) + _readable(v, indent + 1) for v in value) + "\n" + " " * indent + "]"
        )
    return json.dumps(value, allow_nan=False)
