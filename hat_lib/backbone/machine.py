"""What ran, and where: the columns that every measured row begins with."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from hat_lib.backbone.base import Base


@dataclass(frozen=True)
class Machine:
    """What ran, and where."""

    base: str
    device: str
    dtype: str
    threads: int
    cpu: str
    """its name, as the system gives it"""


def machine(base: Base) -> dict:
    """The fields of `Machine` for ``base`` in this process."""
    cuda = base.device.type == "cuda"
    return {
        "base": base.name,
        "device": torch.cuda.get_device_name(base.device) if cuda else base.device.type,
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
    }


def cpu_name() -> str:
    """The CPU's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
