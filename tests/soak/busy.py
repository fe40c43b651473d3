"""Answers beside busy processes: two threads are no slower than one, and less work takes less CPU time."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import product

import numpy as np
import torch

from hat_lib.config import DATA
from hat_lib.hat import HierarchicalTransformer
from studies.answers import processes

MOST = 1.25
"""time of two threads over one's, as far as a few answers can tell"""


def run(rounds: int, others: int) -> dict:
    """The bundled base's answers in bf16, 24 tokens after a prompt of 32, beside so many busy processes: median time of
    two threads over one's, at capacity 1.0 or 0.5, and CPU time of two at 0.5 over that at 1.0."""
    hat = HierarchicalTransformer.from_pretrained(DATA / "checkpoints" / "default", dtype="bf16")
    ids, before, times = torch.arange(1000, 1032)[None], torch.get_num_threads(), defaultdict(list)
    ways, how = list(product((1.0, 0.5), (1, 2))), {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with processes(others):
        for turn in range(rounds + 1):  # the first to warm up
            for way in ways if turn % 2 else reversed(ways):
                torch.set_num_threads(way[1])
                with hat.at(way[0], 0.0):
                    begun = time.perf_counter(), time.process_time()
                    hat.lm.generate(ids, max_new_tokens=24, **how)
                    times[way].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    torch.set_num_threads(before)
    wall, cpu = ({way: np.median(times[way][1:], axis=0)[i] for way in ways} for i in (0, 1))
    two = max(wall[capacity, 2] / wall[capacity, 1] for capacity in (1.0, 0.5))
    half = cpu[0.5, 2] / cpu[1.0, 2]
    assert two < MOST and half < 1, (two, half)
    return {"two_threads": float(two), "cpu_at_half": float(half), "threads": 2}
