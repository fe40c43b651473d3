"""Many texts in one process: memory and CPU time stay as they are."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tiny_runs import random_blocks, skipping

MOST_KIB, MOST_SLOWDOWN = 2.0, 1.3
"""a text; of the last tenth over the first"""


def resident_kib() -> float:
    """Memory this process uses now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1024


def run(count: int, path: str) -> dict:
    """``count`` texts of 16 tokens after prompts of 4 to 16, on a path, ``engine`` or ``reference``.

    Returns the slope of the memory after the first tenth, KiB a text, and the median CPU time of the last tenth over
    that of the first; raises AssertionError if one is too much.
    """
    hat, seconds, memory = skipping("channel"), [], []
    prompts = [torch.tensor([block[: 4 + n % 13]]) for n, block in enumerate(random_blocks(26))]
    points = set(np.linspace(count // 10, count - 1, 50).astype(int).tolist())
    with hat.reference() if path == "reference" else nullcontext(), torch.no_grad():
        assert hat.decoding.startswith(path)
        for n in range(-3, count):  # the first ones compile and allocate
            begun = time.process_time()
            hat.lm.generate(prompts[n % 26], max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
            if n >= 0:
                seconds.append(time.process_time() - begun)
            if n in points:
                gc.collect()
                memory.append((n, resident_kib()))
    tenth = max(1, count // 10)
    slowdown = statistics.median(seconds[-tenth:]) / statistics.median(seconds[:tenth])
    kib = float(np.polyfit(*np.array(memory).T, 1)[0])
    assert count < 1000 or (slowdown < MOST_SLOWDOWN and kib < MOST_KIB), (slowdown, kib)
    return {"kib_a_text": round(kib, 3), "slowdown": round(slowdown, 3)}
