"""A checkpoint: small weights beside a readable JSON file, as peft stores an adapter, and the base's fingerprint.

A folder with `hat_config.json` (method config, base name and fingerprint, calibration tables, training summary, prices)
and `hat_adapter.safetensors` (routers, gates and corrections, nothing else; fp32). Reading is strict: an unknown field,
a value of another type or beyond `largest`, or another adapter than the one that the JSON names raises one `HatError`
that begins with the file. Fields that older versions did not write take their defaults.

Writing takes three renames: the adapter goes next to the old one, under its hash; the JSON, which names that hash, is
replaced; the adapter moves to its proper name. Reading takes the file with the hash, so a process killed at any point
leaves the old checkpoint or the new one. One writer at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from hat_lib import __version__
from hat_lib.base.load import HUB_ID, Base, one_error
from hat_lib.config import DATA, HatConfig, HatError, check_capacity, check_count, replaced, shown
from hat_lib.method.grain import grain_named
from hat_lib.method.thresholds import EXIT_TABLES, HEAD_TABLES, Calibration

CONFIG_FILE, ADAPTER_FILE = "hat_config.json", "hat_adapter.safetensors"
FORMAT_VERSION = 3  # What this library writes, and the newest that it reads; one more for each new field.

OPTIONAL = ("sensitivity", *HEAD_TABLES, *EXIT_TABLES)
ANY = 1e30  # Bound of a threshold, either way: beyond every score, and a finite number in fp32.
# Axes, range and order along the last axis (1 rising, -1 falling, 0 any) of each table. L layers, S sites and E exits
# are the config's; C, K and R are set by the first table that has them.
TABLES = {
    "capacities": ("C", 0, 1, 1),
    "thresholds": ("LSC", -ANY, ANY, -1),
    "shares": ("LSC", 0, 1, 0),
    "sensitivity": ("C", 0, 1, 1),
    "head_thresholds": ("C", 0, ANY, -1),
    "head_margins": ("C", 0, ANY, 1),
    "head_shares": ("C", 0, 2, 0),
    "exit_capacities": ("K", 0, 1, 1),
    "exit_rates": ("KR", 0, 1, 1),
    "exit_scores": ("KRE", -ANY, ANY, 0),
}

# What JSON makes of a value -> the first words of the annotations of fields that may hold it; none for bool.
JSON_TYPES = {str: ["str"], int: ["int", "float"], float: ["float"], type(None): ["None"], list: ["list", "tuple"]}
JSON_TYPES[dict] = ["dict", "HatConfig", "Calibration"]


@dataclass(frozen=True)
class Price:
    """Perplexity over the base's that a checkpoint was measured at, on one text, without exits."""

    text: str
    capacity: float  #: requested
    realised: float
    increase: float  #: perplexity / the base's, less 1
    low: float | None  #: with `high` its 95 % interval; None on too little text
    high: float | None
    base_perplexity: float
    tokens: int  #: number of scored tokens

    def __post_init__(self):
        check_capacity(self.capacity)
        if not self.increase > -1:
            raise HatError(f"the increase of a price must be above -1, got {shown(self.increase)}")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    config: HatConfig
    base: str  #: the name to load the base by: "bundled", a Hub id or a folder
    base_fingerprint: str
    tensors: dict[str, Tensor] = field(default_factory=dict)  #: trained parameters by name, fp32
    calibration: Calibration | None = None
    training: dict | None = None  #: summary of the run that trained it, any JSON object
    prices: list[Price] = field(default_factory=list)

    def check_base(self, base: Base, folder: str | Path) -> None:
        """Raise `HatError` unless ``base`` is the one that this checkpoint, read from ``folder``, was made for."""
        if base.fingerprint != self.base_fingerprint:
            made_for = f"{shown(self.base)} with fingerprint {self.base_fingerprint[:12]}"
            raise HatError(f"{folder} was made for {made_for}, {base.name} has {base.fingerprint[:12]}")
        if self.config.n_layers != (layers := base.model.config.num_hidden_layers):
            raise HatError(f"{folder}: config.n_layers is {self.config.n_layers}, {base.name} has {layers} layers")


def is_hat_parameter(name: str) -> bool:
    """The one predicate for what is trained, saved and counted; ``name`` as in `named_parameters`."""
    return name.startswith(("routers.", "gates.", "corrections."))


def find_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint: a path, a name in data/checkpoints such as "default", or ``owner/name`` on the Hub.

    A local folder with a checkpoint or a run in it comes first, and the Hub last. Raises `HatError` if there is none.
    """
    name = str(name)
    folder, reference = Path(os.path.expanduser(name)), DATA / "checkpoints"
    names = sorted(path.parent.name for path in reference.glob(f"*/{CONFIG_FILE}"))
    if name in names and not any((folder / file).exists() for file in (CONFIG_FILE, "run.json")):
        return reference / name
    if os.path.isdir(folder):  # False for a name that cannot be a path, too
        return folder
    if not HUB_ID.fullmatch(name):
        known = ", ".join(names)
        raise HatError(f"no checkpoint {shown(name)}: expected a folder, owner/name on the Hub, or one of {known}")
    from huggingface_hub import snapshot_download

    with one_error(f"no folder {name}, and it can't be fetched from the Hub"):
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, ADAPTER_FILE]))


def read_checkpoint(name: str | Path) -> Checkpoint:
    """Read and check both files of a checkpoint, which is named as for `find_checkpoint`."""
    folder = find_checkpoint(name)
    file, adapter = folder / CONFIG_FILE, folder / ADAPTER_FILE
    if not file.exists():
        resume = f"; it holds an unfinished run: hat train --resume {folder}" if (folder / "run.json").exists() else ""
        raise HatError(f"{folder} is not a HAT checkpoint: {CONFIG_FILE} is missing{resume}")
    with one_error(file):
        checkpoint, sha256 = _parsed(json.loads(file.read_bytes()))
    pending = folder / f"{ADAPTER_FILE}.{sha256}"
    with one_error(adapter):
        data = (pending if pending.is_file() else adapter).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise HatError(f"not the file that {CONFIG_FILE} was written with")
        tensors = load(data)
        check_values(tensors)
    # A model of this config is made before its shapes are compared: its size must not depend on a wrong number.
    for key, end in (("translator_rank", ".reduce.weight"), ("correction_rank", ".down")):
        rank = getattr(checkpoint.config, key)
        there = {tensor.shape[:1].numel() for name, tensor in tensors.items() if name.endswith(end)}
        if there - {rank} or (rank or 0) > max(map(Tensor.numel, tensors.values()), default=0):
            raise HatError(f"{file}: config.{key} is {rank}, not that of the tensors *{end} in {ADAPTER_FILE}")
    return replace(checkpoint, tensors=tensors)


def _parsed(meta: object) -> tuple[Checkpoint, str]:
    """The checkpoint that a JSON file describes, still without tensors, and the hash of its adapter."""
    if not isinstance(meta, dict):
        raise HatError(f"expected a JSON object, got {shown(meta)}")
    version, writer = meta.pop("format_version", 0), f"hat_lib {shown(meta.pop('library_version', None))}"
    if check_count("format_version", version, 0) > FORMAT_VERSION:
        raise HatError(f"format_version {version}, by {writer}, is newer than {__version__} reads: upgrade hat_lib")
    meta.pop("sha256", None)  # of the other fields; written up to version 2
    if not re.fullmatch("[0-9a-f]{64}", str(sha256 := meta.pop("adapter_sha256", None))):
        raise HatError(f"adapter_sha256 must be 64 hexadecimal digits, got {shown(sha256)}")
    _check_types(Checkpoint, "", meta)
    with one_error("training"):
        json.dumps(meta.get("training"), allow_nan=False)
    meta["config"] = config = HatConfig(**_check_types(HatConfig, "config.", meta.get("config")))
    rows = enumerate(meta.get("prices", []))
    meta["prices"] = [Price(**_check_types(Price, f"prices.{i}.", row)) for i, row in rows]
    if (tables := meta.get("calibration")) is not None:
        meta["calibration"] = tables = Calibration(**_check_types(Calibration, "calibration.", tables))
        check_calibration(tables, config)
        if config.exit_rate and not (config.exit_layers and tables.exit_rates):
            raise HatError(f"config.exit_rate is {config.exit_rate}, without exit layers or their tables")
    return Checkpoint(tensors={}, **meta), sha256


def check_calibration(tables: Calibration, config: HatConfig) -> None:
    """Raise `HatError`, naming the table, unless these are valid for a model of this shape."""
    sites = list(grain_named(config.granularity).sites)
    if tables.sites != sites:
        raise HatError(f"calibration.sites must be {sites}, got {shown(tables.sites)}")
    for names in (HEAD_TABLES, EXIT_TABLES):
        if len({getattr(tables, name) is None for name in names}) > 1:
            raise HatError(f"calibration.{names[0]}, {names[1]} and {names[2]} must be all null or all lists")
    sizes = {"L": config.n_layers, "S": len(sites), "E": len(config.exit_layers)}
    for name, (axes, low, high, order) in TABLES.items():
        values = getattr(tables, name)
        if values is None and name in OPTIONAL:
            continue
        try:
            table = np.array(values, dtype=object)
        except ValueError:  # rows of different lengths
            table = np.array(None)
        kinds = set(map(type, table.flat))
        if table.ndim != len(axes) or bool in kinds or not all(issubclass(kind, float | int) for kind in kinds):
            raise HatError(f"calibration.{name} must be numbers in lists nested {len(axes)} deep, alike in length")
        shape = tuple(sizes.setdefault(axis, max(size, 1)) for axis, size in zip(axes, table.shape, strict=True))
        if table.shape != shape:
            raise HatError(f"calibration.{name} must have the shape {shape}, got {table.shape}")
        outside = [value for value in table.flat if not low <= value <= high]  # nan is, too
        if outside or (order * np.diff(table) < 0).any():
            direction, got = ("falling ", "", "rising ")[order + 1], shown(outside[0] if outside else values)
            raise HatError(f"calibration.{name} must be {direction}numbers in [{low}, {high}], got {got}")
    if tables.capacities[-1] != 1:
        raise HatError(f"calibration.capacities must end at 1, got {tables.capacities[-1]}")


def _check_types(kind: type, where: str, values: object) -> dict:
    """``values``, if it is a JSON object whose values are of the types that the fields of ``kind`` declare."""
    if not isinstance(values, dict):
        raise HatError(f"{where[:-1]} must be a JSON object, got {shown(values)}")
    for declared in fields(kind):  # of modules that postpone annotations, so types are text
        key, value = declared.name, values.get(declared.name)
        allowed = re.sub(r"\[.*\]", "", declared.type).split(" | ")
        if key not in values and declared.default is MISSING is declared.default_factory:
            raise HatError(f"{where}{key} is missing")
        if key in values and set(JSON_TYPES.get(type(value), ())).isdisjoint(allowed):
            raise HatError(f"{where}{key} must be {declared.type}, got {shown(value)}")
        if isinstance(value, int | float) and not abs(value) <= ANY:  # nan, too
            raise HatError(f"{where}{key} must be a number in [-{ANY}, {ANY}], got {shown(value)}")
    return values


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: str | Path) -> None:
    """Raise `HatError` unless the tensors of the adapter in ``folder`` have the expected names and shapes."""
    for name in sorted(tensors.keys() | expected.keys()):
        got, wanted = (list(group[name].shape) if name in group else "none" for group in (tensors, expected))
        if got != wanted:
            raise HatError(f"{Path(folder, ADAPTER_FILE)}: {name!r} has shape {got}, expected {wanted}")


def largest(name: str) -> float:
    """Largest magnitude of a trained value that is read or written (data/checkpoints has up to 90), with which logits
    stay finite in fp32 and bf16: log scales are exponentiated, other scores are clipped or compared, and gates and
    corrections add products of two to the hidden state."""
    return 30.0 if name.endswith("log_scale") else 1e20 if name.startswith("routers.") else 100.0


def check_values(tensors: dict[str, Tensor]) -> None:
    """Raise `HatError` unless the tensors are fp32 and no value is beyond `largest` (nor nan)."""
    for name, tensor in tensors.items():
        limit = largest(name)
        if tensor.dtype != torch.float32:
            raise HatError(f"{shown(name)} is {tensor.dtype}, expected torch.float32")
        if len(beyond := tensor[~(tensor.abs() <= limit)]):
            raise HatError(f"{shown(name)} must be numbers in [-{limit:g}, {limit:g}], got {beyond[0]:g}")


def write_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write both files; returns the folder. Raises `HatError`, and leaves what is there, for what could not be read
    again, or if the folder can't be written."""
    folder = Path(folder).expanduser()
    with one_error(f"cannot write a checkpoint to {folder}"):
        # Copied: safetensors refuses tensors that share memory.
        given = checkpoint.tensors.items()
        tensors = {n: t.detach().to("cpu", torch.float32, copy=True).contiguous() for n, t in given}
        check_values(tensors)
        adapter = save(tensors)
        sha256 = hashlib.sha256(adapter).hexdigest()
        meta = asdict(replace(checkpoint, tensors={})) | {"adapter_sha256": sha256, "library_version": __version__}
        meta["format_version"] = FORMAT_VERSION
        del meta["tensors"]
        text = _readable(meta)
        _parsed(json.loads(text))
        pending = folder / f"{ADAPTER_FILE}.{sha256}"  # it waits for the JSON that names it
        for path, content in ((pending, adapter), (folder / CONFIG_FILE, text.encode())):
            with replaced(path) as written:
                written.write_bytes(content)
        os.replace(pending, folder / ADAPTER_FILE)
        for left in folder.glob(f"{ADAPTER_FILE}.{'?' * 64}*"):  # by a process that was killed
            left.unlink()
    return folder


def write_prices(folder: str | Path, prices: Iterable[Price]) -> None:
    """Replace the prices in a checkpoint's JSON; all else stays, as does the file if they are those it holds."""
    checkpoint, prices = read_checkpoint(folder), list(prices)
    if prices != checkpoint.prices:
        write_checkpoint(find_checkpoint(folder), replace(checkpoint, prices=prices))


def digest(values: dict) -> str:
    """SHA-256 (hex) of a JSON object's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _readable(meta: dict) -> str:
    """JSON with each list of numbers on one line, so that a person can read the tables."""
    text = re.sub(r",\n +(?=[-\d])", ", ", json.dumps(meta, indent=1, allow_nan=False))
    return re.sub(r"(\[)\n +(?=[-\d])|(?<=\d)\n +(?=\])", r"\1", text)
