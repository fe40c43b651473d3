"""Answers beside busy processes: two threads are no slower than one, and less work takes less CPU time."""

from __future__ import annotations

import itertools
import statistics
import time

import torch

from hat_lib.config import DATA
from hat_lib.model.transformer import HierarchicalTransformer
from studies.answers import processes

OTHERS = (0, 1, 2, 4)
MOST = 1.25
"""time of two threads over one's beside busy processes: what a few answers can tell"""


def run(rounds: int, others: int) -> dict:
    """The bundled base's answers in bf16, 24 tokens after a prompt of 32, beside so many busy processes: median time of
    two threads over one's, at capacity 1.0 or 0.5, and CPU time of two at 0.5 over that at 1.0."""
    hat = HierarchicalTransformer.from_pretrained(DATA / "checkpoints" / "default", dtype="bf16")
    ids, before = torch.arange(1000, 1032)[None], torch.get_num_threads()
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    ways = list(itertools.product((1.0, 0.5), (1, 2)))
    wall, cpu = ({way: [] for way in ways} for _ in range(2))
    with processes(others), torch.no_grad():
        for turn in range(rounds + 1):  # the first to warm up
            for capacity, threads in ways if turn % 2 else reversed(ways):
                torch.set_num_threads(threads)
                with hat.at(capacity, 0.0):
                    begun, ran = time.perf_counter(), time.process_time()
                    hat.lm.generate(ids, eos_token_id=None, **how)
                if turn:
                    wall[capacity, threads].append(time.perf_counter() - begun)
                    cpu[capacity, threads].append(time.process_time() - ran)
    torch.set_num_threads(before)
    wall, cpu = ({way: statistics.median(times) for way, times in by.items()} for by in (wall, cpu))
    two = max(wall[capacity, 2] / wall[capacity, 1] for capacity in (1.0, 0.5))
    half = cpu[0.5, 2] / cpu[1.0, 2]
    assert rounds < 5 or (two < MOST and half < 1), (two, half)
    return {"two_threads": two, "cpu_at_half": half, "threads": 2}
