"""Tiles: a row, or a few, times a matrix that lies in tiles of columns, skipping channels where that is faster.

``W^T [C, out]`` is stored as ``[tiles, C, width]``. A skipped channel is memory that need not be read, and all
channels of a tile lie in reading order. Two products with the same result for a row, bit for bit:

`ordered`    reads every channel, in the order of memory; up to `FEW` rows share a tile while a cache holds it.
`gathered`   reads the kept channels alone, and skips from one to the next; one row.

How much faster memory is in order than in pieces depends on the machine and the shape: on one CPU the gather pays
below a kept share of 0.8, on another it takes longer than reading everything down to 0.3. `break_even` measures it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Widest tile, in columns: what a vectorised sum of bf16 rows holds in registers, so that one pass over a
# tile reads each kept row once.
WIDTH = 448
FEW = 4
"""rows up to which `ordered` is faster than a matrix product"""
# Bytes that `break_even` goes through before it comes back to the same ones; more than caches hold.
COLD = 1 << 27
SHARES = (0.3, 0.5, 0.7)
"""kept shares at which `break_even` times the gather"""
ROUNDS = 5
"""turns of each product; the fastest counts, as whatever comes between only adds"""


def tile_width(widths: Sequence[int]) -> int:
    """The widest tile, up to `WIDTH`, that cuts every one of the fused matrices evenly."""
    whole = math.gcd(*widths)
    return max(w for w in range(1, min(whole, WIDTH) + 1) if whole % w == 0)


def ordered(tiles: Tensor, x: Tensor) -> Tensor:
    """``tiles [n, C, width], x [r, C] -> [r, n * width]``; each row as it would be alone, to the bit."""
    n_tiles, channels, width = tiles.shape
    rows = len(x)
    if rows == 1:
        return _bags(tiles, _starts(n_tiles, channels, 1), x.view(-1), channels)
    index = _starts(n_tiles, channels, 1).view(n_tiles, 1, channels).expand(n_tiles, rows, channels)
    y = _bags(tiles, index.reshape(-1), x.reshape(-1), channels, rows)
    return y.view(n_tiles, rows, width).transpose(0, 1).reshape(rows, -1)


def gathered(tiles: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """The same for ``kept``, the indices of the channels that are kept."""
    n_tiles, channels, _ = tiles.shape
    # 32-bit indices: there are as many as tiles times kept channels, and half the size is half the time.
    rows = (_starts(n_tiles, 1, channels)[:, None] + kept.to(torch.int32)).view(-1)
    return _bags(tiles, rows, x.view(-1).index_select(0, kept), len(kept))


def _bags(tiles: Tensor, index: Tensor, values: Tensor, n: int, rows: int = 1) -> Tensor:
    """Weighted sums over ``n`` channels of each tile, a bag for each tile and row: ``[1, tiles * rows * width]``."""
    values = values.expand(len(tiles), rows * n).reshape(-1)
    flat = tiles.view(-1, tiles.shape[2])
    return torch.embedding_bag(flat, index, _starts(len(tiles) * rows, 1, n), False, 0, False, values)[0].view(1, -1)


@lru_cache(maxsize=1 << 14)
def _starts(n: int, each: int, step: int) -> Tensor:
    """``0, step, 2 step, ...``, n times ``each`` of them; kept, as making the tensor takes longer than using it."""
    return torch.arange(n * each, dtype=torch.int32) * step


@lru_cache(maxsize=256)
def break_even(n_tiles: int, channels: int, width: int, dtype: torch.dtype, threads: int) -> float:
    """Kept share below which `gathered` is faster than `ordered`: measured once a process, in tenths of a second.

    It decides how long a product takes, never what it gives. 0 where the gather never pays, 1 where it always does.

    Args:
        threads: how many torch computes with now; only there to tell one result from another.
    """
    bytes_each = n_tiles * channels * width * dtype.itemsize
    # Copies, so that memory is read and not a cache; of a matrix that any cache holds a few are enough.
    copies = min(256, max(2, COLD // bytes_each))
    weights = [torch.ones(n_tiles, channels, width, dtype=dtype) for _ in range(copies)]
    # A mask of its own for each copy: processors learn a pattern that comes back.
    lots = torch.rand(copies, channels, generator=torch.Generator().manual_seed(0)).argsort(1)
    masks = [(lots < share * channels)[:, None] for share in SHARES]
    x = torch.ones(1, channels, dtype=dtype)
    zero = x.new_zeros(())

    def ordered_masked(tiles, keep):
        return ordered(tiles, torch.where(keep, x, zero))

    def gathered_kept(tiles, keep):
        return gathered(tiles, x, keep.view(-1).nonzero().view(-1))

    turns = [(ordered_masked, masks[0]), *((gathered_kept, mask) for mask in masks)]
    seconds = [math.inf] * len(turns)
    with torch.no_grad():
        for _ in range(ROUNDS):
            for i, (product, keeps) in enumerate(turns):
                began = time.perf_counter()
                for tiles, keep in zip(weights, keeps, strict=True):
                    product(tiles, keep)
                seconds[i] = min(seconds[i], time.perf_counter() - began)
    dense, *costs = seconds
    slope, offset = np.polyfit(SHARES, costs, 1)
    if slope <= 0:  # a matrix so small, or a machine so busy, that the share does not show
        return float(offset + slope < dense)
    return float(np.clip((dense - offset) / slope, 0.0, 1.0))
