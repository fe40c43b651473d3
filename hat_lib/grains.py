"""Grains: how a layer's routable work is skipped, behind one interface.

A grain wraps one decoder layer of the base and runs its linear layers under the keep masks that
``decide(site, x, rows)`` returns. Two of them:

`TokenGrain`     the FFN runs for a token or not. Kept rows are gathered, run, and scattered back.
`ChannelGrain`   each linear layer reads only the kept channels of its input. Weights that read the same
                 input (q|k|v, gate|up) are fused and stored once; the base's own modules become views. For
                 one row on a CPU the product is a gather-and-sum over the kept rows of ``W^T``, wherever that
                 is faster than reading all of it in order.

Both also compute K and V, and nothing else, for rows that have exited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .router import Gated
from .state import TokenState
from .tiles import break_even, gathered, ordered, tile_width

# Where a row was better multiplied in order, this many are before kept channels are counted again: a
# count takes a tenth of a small product's time.
LOOK_AGAIN = 8
# Columns below which a tile is no use: the matrix stays in rows. A vocabulary of 32,001 has no wider tile than 3.
NARROW = 32

Decide = Callable[[str, Tensor, Tensor | None], Tensor | None]


class FusedLinear:
    """Linear layers that read one input, fused into one matrix whose layout follows its use.

    Rows: ``W [out, C]``, for several rows of input, CUDA and training; a plain matrix product.
    Tiles: ``W^T`` in tiles of columns, `hat_lib.tiles`, for one row at a time on a CPU. There a skipped channel is
    memory that is not read, where that is faster than reading it, and even the dense product of one row runs
    faster than `F.linear`.

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
        """The layout for one row at a time, if the matrix has tiles worth it."""
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
        """``x [n, C], keep [n, C] (bool; in training a float or `Gated`) -> [n, out]``; one row reads what it keeps."""
        if self.see is not None:
            self.see(x)
        return self.columns(x, 0, self.out, keep, compact)

    def columns(self, x: Tensor, start: int, stop: int, keep: Tensor | None = None, compact: bool = True) -> Tensor:
        """The outputs ``start:stop`` alone, whole tiles: ``[n, C] -> [n, stop - start]``."""
        if compact and self.tiles is not None and x.shape[0] == 1 and not x.requires_grad:
            y = self._row(x, self.tiles[start // self.width : stop // self.width], keep)
        else:
            x = x if keep is None else keep.x if isinstance(keep, Gated) else x * keep
            if self.tiles is None:
                y = F.linear(x, self.weight[start:stop])
            else:
                y = torch.cat([x @ tile for tile in self.tiles[start // self.width : stop // self.width]], dim=1)
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


def _see_input(see, layer: int, site: str, x: Tensor) -> None:
    see(layer, site, x, x)


class Grain:
    """One decoder layer's linear work under masks. Subclasses name their sites and run them."""

    sites: tuple[str, ...]

    def __init__(self, layer: nn.Module):
        self.layer, self.attn, self.mlp = layer, layer.self_attn, layer.mlp

    @classmethod
    def site_work(cls, config) -> dict[str, int]:
        """Weights read per token by each routable site of one layer of a Llama with this config."""
        raise NotImplementedError

    def qkv(self, x: Tensor, state: TokenState, decide: Decide, compact: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``x [N, D] -> q [n_alive, H*h], k [N, G*h], v [N, G*h]``; q only for rows that are alive."""
        raise NotImplementedError

    def output(self, x: Tensor, state: TokenState, decide: Decide, compact: bool) -> Tensor:
        """``[n_alive, H*h] -> [n_alive, D]``."""
        raise NotImplementedError

    def ffn(self, x: Tensor, state: TokenState, decide: Decide, compact: bool) -> Tensor | None:
        """``[n_alive, D] -> [n_alive, D]``, or None when no row ran."""
        raise NotImplementedError

    @staticmethod
    @contextmanager
    def watching(grains: Sequence[Grain], see: Callable[[int, str, Tensor, Tensor], None]) -> Iterator[None]:
        """Context: call ``see(layer, site, x, activation)`` for each site that runs. ``x`` is what the router
        reads, ``activation`` what is zeroed where the router skips: the input, or the FFN's whole output."""
        raise NotImplementedError

    def intact(self) -> bool:
        """False if somebody moved or cast the base's weights behind our back."""
        return True

    def rows(self) -> None:
        """The layout of the weights that several rows at a time, and training, are fastest with."""
        for linear in self.matrices():
            linear.rows()

    def tile(self) -> None:
        """The layout for one row at a time on a CPU."""
        for linear in self.matrices():
            linear.tile()

    def matrices(self) -> Iterable[FusedLinear]:
        """The layer's weights."""
        raise NotImplementedError

    def release(self) -> None:
        """Undo what attaching changed in the base."""


class TokenGrain(Grain):
    """The published method: the whole FFN, per token."""

    sites = ("ffn",)

    def __init__(self, layer):
        super().__init__(layer)
        a, m = self.attn, self.mlp
        linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        self.linears = [TiledLinear(linear) for linear in linears]

    def intact(self):
        return self.attn.q_proj.weight.data_ptr() == self.linears[0].fused.storage.data_ptr()

    def matrices(self):
        return [linear.fused for linear in self.linears]

    def release(self):
        for linear in self.linears:
            linear.release()

    @staticmethod
    @contextmanager
    def watching(grains, see):
        hooks = [
            grain.mlp.register_forward_hook(lambda _, args, out, i=i: see(i, "ffn", args[0], out))
            for i, grain in enumerate(grains)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @classmethod
    def site_work(cls, config):
        return {"ffn": 3 * config.hidden_size * config.intermediate_size}

    def qkv(self, x, state, decide, compact):
        alive = x if state.alive is None or not compact else x[state.alive]
        q = self.attn.q_proj(alive) if len(alive) else alive.new_empty(0, self.attn.q_proj.out_features)
        return q, self.attn.k_proj(x), self.attn.v_proj(x)

    def output(self, x, state, decide, compact):
        return self.attn.o_proj(x)

    def ffn(self, x, state, decide, compact):
        keep = decide("ffn", x, None if not compact else state.alive)
        if keep is None:
            return self.mlp(x)
        if not compact:
            return self.mlp(x) * keep[:, None].to(x.dtype)
        kept = keep.nonzero().view(-1)
        if len(kept) == len(x):
            return self.mlp(x)
        if len(kept) == 0:
            return None
        return torch.zeros_like(x).index_copy(0, kept, self.mlp(x[kept]))


class ChannelGrain(Grain):
    """The default: input channels of every linear layer, per token."""

    sites = ("qkv", "o", "gate_up", "down")

    def __init__(self, layer):
        super().__init__(layer)
        a, m = self.attn, self.mlp
        self.linears = {
            "qkv": FusedLinear([a.q_proj, a.k_proj, a.v_proj]),
            "o": FusedLinear([a.o_proj]),
            "gate_up": FusedLinear([m.gate_proj, m.up_proj]),
            "down": FusedLinear([m.down_proj]),
        }

    @classmethod
    def site_work(cls, config):
        d, f, head = config.hidden_size, config.intermediate_size, config.head_dim
        q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        return {"qkv": d * (q + 2 * kv), "o": q * d, "gate_up": 2 * d * f, "down": f * d}

    def qkv(self, x, state, decide, compact):
        linear = self.linears["qkv"]
        q_width = linear.widths[0]
        if state.alive is None:
            return linear(x, decide("qkv", x, None), compact).split(linear.widths, dim=1)
        if not compact:
            keep = decide("qkv", x, None)
            if keep is not None:  # exited rows get K and V from all channels
                keep = keep | (state.exit_layer.view(-1, 1) < state.n_layers)
            return linear(x, keep, compact=False).split(linear.widths, dim=1)
        alive = x[state.alive]
        keep = decide("qkv", alive, state.alive) if len(alive) else None
        if keep is not None:
            alive = alive * keep
            x = x.index_copy(0, state.alive, alive)
        q = linear.columns(alive, 0, q_width) if len(alive) else x.new_empty(0, q_width)
        k, v = linear.columns(x, q_width, sum(linear.widths)).split(linear.widths[1:], dim=1)
        return q, k, v

    def output(self, x, state, decide, compact):
        return self.linears["o"](x, decide("o", x, None if not compact else state.alive), compact)

    def ffn(self, x, state, decide, compact):
        rows = None if not compact else state.alive
        gate, up = self.linears["gate_up"](x, decide("gate_up", x, rows), compact).chunk(2, dim=1)
        a = self.mlp.act_fn(gate) * up
        return self.linears["down"](a, decide("down", a, rows), compact)

    @staticmethod
    @contextmanager
    def watching(grains, see):
        linears = [(i, site, linear) for i, grain in enumerate(grains) for site, linear in grain.linears.items()]
        for i, site, linear in linears:
            linear.see = partial(_see_input, see, i, site)
        try:
            yield
        finally:
            for *_, linear in linears:
                linear.see = None

    def intact(self):
        return self.attn.q_proj.weight.data_ptr() == self.linears["qkv"].storage.data_ptr()

    def matrices(self):
        return self.linears.values()

    def release(self):
        for linear in self.linears.values():
            linear.release()


GRAINS: dict[str, type[Grain]] = {"channel": ChannelGrain, "token": TokenGrain}
