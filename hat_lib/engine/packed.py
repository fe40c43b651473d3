"""Linears: a Llama's weights, stored once, in the layout that the next forward reads fastest.

`FusedLinear`     matrices that read one input, as one; rows or tiles.
`TiledLinear`     a single `nn.Linear` of the base that lives in one of those.
`TiedEmbedding`   the embedding that shares the LM head's weight.
`Layout`          all of a model's matrices: rows for batches and training, tiles for a few rows on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hat_lib.engine.products import FEW, break_even, gathered, ordered, tile_width
from hat_lib.model.policies import Gated

# Where a row was better multiplied in order, this many are before kept channels are counted again: a
# count takes a tenth of a small product's time.
LOOK_AGAIN = 8
# Columns below which a tile is no use: the matrix stays in rows. A vocabulary of 32,001 has no wider tile than 3.
NARROW = 32


class FusedLinear:
    """Linear layers that read one input, fused into one matrix whose layout follows its use.

    Rows: ``W [out, C]``, for many rows of input, CUDA and training; a plain matrix product. Tiles: ``W^T`` in tiles of
    columns, `hat_lib.engine.products`, for a few rows at a time on a CPU. There a channel that one row skips is memory
    that is not read, where that is faster than reading it, and even the dense product of a few rows runs faster than
    `F.linear`.

    The weights exist once. In rows, the given modules' weights are 2-D views; in tiles, 3-D ones. Changing the layout
    moves every weight once: tenths of a second for a small model.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        self.linears = list(linears)
        self.see: Callable[[Tensor], None] | None = None
        self.widths = [m.out_features for m in linears]
        self.out, self.channels = sum(self.widths), linears[0].in_features
        self.width = tile_width(self.widths)
        self.n_tiles = self.out // self.width
        self.weight, self.tiles = torch.cat([m.weight.detach() for m in linears]), None
        biases = [m.bias for m in linears]
        self.bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        self._show(self.weight.split(self.widths))

    def _show(self, views: Sequence[Tensor]) -> None:
        for m, view in zip(self.linears, views, strict=True):
            m.weight.data = view

    def rows(self) -> None:
        """The row-major layout, for several rows at a time."""
        if self.tiles is not None:
            self.weight = self.tiles.transpose(1, 2).contiguous().view(self.out, self.channels)
            self.tiles = None
            self._show(self.weight.split(self.widths))

    def tile(self) -> None:
        """The layout for a few rows at a time, if the matrix has tiles worth it."""
        if self.tiles is None and self.width >= NARROW:
            self.tiles = self.weight.view(self.n_tiles, self.width, -1).transpose(1, 2).contiguous()
            self.weight = None
            views = self.tiles.transpose(1, 2).split([w // self.width for w in self.widths])
            self._show(views)
            self._zero, self._ordered_rows = self.tiles.new_zeros(()), 0
            self.break_even = break_even(*self.tiles.shape, self.tiles.dtype, torch.get_num_threads())

    def release(self) -> None:
        """Give each module its own contiguous weight back, bit for bit."""
        self.rows()
        self._show([view.clone() for view in self.weight.split(self.widths)])
        self.weight = None

    @property
    def storage(self) -> Tensor:
        """The weights, in whichever layout."""
        return self.weight if self.tiles is None else self.tiles

    def column_norm(self) -> Tensor:
        """``||W[:, i]||`` over all fused outputs, fp32 ``[C]``."""
        self.rows()
        return torch.stack([w.float().norm(dim=0) for w in self.weight.split(1024)]).norm(dim=0)

    def __call__(self, x: Tensor, keep: Tensor | None = None, compact: bool = True) -> Tensor:
        """``x [n, C], keep [n, C] -> [n, out]``; one row in tiles may read nothing but what it keeps.

        ``keep`` is bool, or in training a float or `Gated`.
        """
        if self.see is not None:
            self.see(x)
        return self.columns(x, 0, self.out, keep, compact)

    def columns(self, x: Tensor, start: int, stop: int, keep: Tensor | None = None, compact: bool = True) -> Tensor:
        """The outputs ``start:stop`` alone, whole tiles: ``[n, C] -> [n, stop - start]``."""
        tiles = None if self.tiles is None else self.tiles[start // self.width : stop // self.width]
        few = tiles is not None and len(x) <= FEW and not x.requires_grad
        if few and compact and len(x) == 1:
            y = self._row(x, tiles, keep)
        else:
            x = x if keep is None else keep.x if isinstance(keep, Gated) else x * keep
            if tiles is None:
                y = F.linear(x, self.weight[start:stop])
            elif few:
                y = ordered(tiles, x)
            else:
                y = torch.cat([x @ tile for tile in tiles], dim=1)
        return y if self.bias is None else y + self.bias[start:stop]

    def _row(self, x: Tensor, tiles: Tensor, keep: Tensor | None) -> Tensor:
        """One row, the faster way; ``tiles`` are ours, or some of them."""
        if keep is None:
            return ordered(tiles, x)
        if self.break_even and not self._ordered_rows:
            kept = keep.view(-1).nonzero().view(-1)
            if len(kept) <= self.break_even * self.channels:
                return gathered(tiles, x, kept)
        self._ordered_rows = (self._ordered_rows + 1) % LOOK_AGAIN
        return ordered(tiles, torch.where(keep, x, self._zero))


class TiledLinear:
    """Replaces `nn.Linear.forward` on the instance: a `FusedLinear` of one, for any leading axes.

    Same sum; for one row on a CPU it reads the weight at up to three times the speed of `F.linear`. It serves the dense
    path as much as the adaptive one.
    """

    def __init__(self, linear: nn.Linear):
        self.linear, self.fused = linear, FusedLinear([linear])
        linear.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        return self.fused(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def release(self) -> None:
        del self.linear.forward
        self.fused.release()


class TiedEmbedding:
    """Replaces `nn.Embedding.forward` where the LM head has the same weight: looks it up in the head's layout."""

    def __init__(self, embedding: nn.Embedding, head: FusedLinear):
        self.embedding, self.head = embedding, head
        embedding.forward = self

    def __call__(self, ids: Tensor) -> Tensor:
        tiles, width = self.head.tiles, self.head.width
        if tiles is None:
            return F.embedding(ids, self.embedding.weight)
        return tiles[ids // width, :, ids % width]

    def release(self) -> None:
        del self.embedding.forward


class Layout:
    """The layout of all matrices of a model."""

    def __init__(self, matrices: Iterable[FusedLinear]):
        self.matrices = list(matrices)
        self._batches = 0  # forwards of many rows since the last of a few

    def rows(self) -> None:
        for matrix in self.matrices:
            matrix.rows()

    def follow(self, few_rows: bool) -> None:
        """Before a forward of a few rows on a CPU, or of another kind. A prompt between decode steps does not bring the
        rows back, the second batch in succession does: moving all weights takes as long as a few steps."""
        self._batches = 0 if few_rows else self._batches + 1
        if few_rows:
            for matrix in self.matrices:
                matrix.tile()
        elif self._batches > 1:
            self.rows()
