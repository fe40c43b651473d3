"""What ran, and where: the columns that every measured row begins with."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from hat_lib.base.load import Base


@dataclass(frozen=True)
class Machine:
    base: str
    device: str
    dtype: str
    threads: int
    cpu: str  #: its name, as the system gives it


def machine(base: Base) -> dict:
    """The fields of `Machine` for ``base`` in this process."""
    device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type
    dtype = str(base.dtype).removeprefix("torch.")
    return vars(Machine(base.name, device, dtype, torch.get_num_threads(), cpu_name()))


def cpu_name() -> str:
    """The CPU's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
