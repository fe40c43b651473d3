"""Grains: how a layer's routable work is skipped, behind one interface.

A grain wraps one decoder layer of the base and runs its linear layers under the keep masks that
``decide(site, x, rows)`` returns. Two of them:

`TokenGrain`     the FFN runs for a token or not. Kept rows are gathered, run, and scattered back.
`ChannelGrain`   each linear layer reads only the kept channels of its input. Weights that read the same
                 input (q|k|v, gate|up) are stored once, fused and transposed, ``W^T [C, out]``; the base's
                 own modules become views of it. For one row the product is a gather-and-sum over the kept
                 rows of ``W^T``, so a skipped channel is weight memory that is never read.

Both also compute K and V, and nothing else, for rows that have exited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state import TokenState

# Bags per gathered row: a fixed number, so that the sum's order does not depend on the thread count.
BAGS = 2
# Page and tile, for matrices whose rows would alias in the cache: see `FusedLinear`.
PAGE, TILE = 4096, 256
# Kept share above which one row of fp32 is multiplied densely (masked). In fp32 a dense matrix-vector
# product already runs at memory speed here, and the gather wins only when it reads far less;
# `hat benchmark` measures both. Half-precision products on CPU are slower than the gather at any share.
FP32_BREAK_EVEN = 0.6

Decide = Callable[[str, Tensor, Tensor | None], Tensor | None]


class RowLinear:
    """Replaces `nn.Linear.forward` on the instance: a matrix-vector product for one row on CPU.

    Same sum, same rounding; half-precision `F.linear` reads the weights of one row at about half of
    the memory's speed. It serves the dense path as much as the adaptive one.
    """

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        linear.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        if x.device.type != "cpu" or x.numel() != weight.shape[1] or x.requires_grad:
            return F.linear(x, weight, bias)
        y = torch.mv(weight, x.view(-1)) if bias is None else torch.addmv(bias, weight, x.view(-1))
        return y.view(*x.shape[:-1], -1)

    def release(self) -> None:
        del self.linear.forward


class FusedLinear:
    """Linear layers that read one input, as one transposed matrix in column tiles, ``W^T [tiles, C, width]``.

    Mostly one tile, and the given modules' weights are views of it until `release`. Rows whose length is a
    multiple of the page size fall into the same cache sets when few of them are gathered; such a matrix is
    stored in tiles of `TILE` columns, and its module's weight is the 3-D view of them.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        self.linears = list(linears)
        self.see: Callable[[Tensor], None] | None = None
        self.widths = [m.out_features for m in linears]
        out, channels = sum(self.widths), linears[0].in_features
        weight = torch.cat([m.weight.detach() for m in linears])
        aliased = len(linears) == 1 and out * weight.itemsize % PAGE == 0 and out % TILE == 0
        self.tiles = weight.view(out // TILE if aliased else 1, -1, channels).transpose(1, 2).contiguous()
        self.n_tiles, self.channels = self.tiles.shape[:2]
        biases = [m.bias for m in linears]
        self.bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        views = [self.tiles] if aliased else self.tiles[0].split(self.widths, dim=1)
        for m, view in zip(linears, views, strict=True):
            m.weight.data = view.transpose(-1, -2)
        device = weight.device
        self.everything = torch.arange(channels, device=device)
        self.offsets = torch.arange(self.n_tiles, device=device)[:, None] * channels

    def release(self) -> None:
        """Give each module its own contiguous weight back, bit for bit."""
        for m in self.linears:
            m.weight.data = m.weight.data.reshape(m.out_features, m.in_features).contiguous()
        self.tiles = None

    def column_norm(self) -> Tensor:
        """``||W[:, i]||`` over all fused outputs, fp32 ``[C]``."""
        return torch.stack([tile.float().norm(dim=1) for tile in self.tiles]).norm(dim=0)

    def __call__(self, x: Tensor, keep: Tensor | None = None, compact: bool = True) -> Tensor:
        """``x [n, C], keep bool [n, C] -> [n, out]``, reading the kept channels only where that pays."""
        if self.see is not None:
            self.see(x)
        if compact and x.shape[0] == 1 and x.device.type == "cpu" and not x.requires_grad:
            y = self._gather(x, keep)
            if y is not None:
                return y
        if keep is not None:
            x = x * keep
        # One tile is a plain matrix product, which is faster than a batched one of a single matrix.
        y = x @ self.tiles[0] if self.n_tiles == 1 else (x @ self.tiles).transpose(0, 1).flatten(1)
        return y if self.bias is None else y + self.bias

    def columns(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The outputs ``start:stop`` of one tile alone, dense: ``[n, C] -> [n, stop - start]``."""
        y = x @ self.tiles[0, :, start:stop]
        return y if self.bias is None else y + self.bias[start:stop]

    def _gather(self, x: Tensor, keep: Tensor | None) -> Tensor | None:
        kept = self.everything if keep is None else keep.view(-1).nonzero().view(-1)
        n = kept.numel()
        if x.dtype == torch.float32 and n > FP32_BREAK_EVEN * self.channels:
            return None
        values = x.view(-1) if keep is None else x.view(-1).index_select(0, kept)
        if self.n_tiles == 1:
            y = torch.embedding_bag(self.tiles[0], kept, _bags(n), False, 0, False, values)[0]
            y = torch.add(*y.split(1))
        else:  # a bag for each tile: no partial sums
            rows = (self.offsets + kept).view(-1)
            values = values.expand(self.n_tiles, n).reshape(-1)
            bags = self.everything.new_tensor(range(0, self.n_tiles * n, n)) if n else self.offsets.view(-1) * 0
            y = torch.embedding_bag(self.tiles.view(-1, TILE), rows, bags, False, 0, False, values)[0].view(1, -1)
        return y if self.bias is None else y + self.bias


def _see_input(see, layer: int, site: str, x: Tensor) -> None:
    see(layer, site, x, x)


@lru_cache(maxsize=1 << 14)
def _bags(n: int) -> Tensor:
    """Offsets that split n gathered rows into `BAGS` bags; kept, as making one takes longer than using it."""
    return torch.tensor([n * b // BAGS for b in range(BAGS)])


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

    def release(self) -> None:
        """Undo what attaching changed in the base."""


class TokenGrain(Grain):
    """The published method: the whole FFN, per token."""

    sites = ("ffn",)

    def __init__(self, layer):
        super().__init__(layer)
        a, m = self.attn, self.mlp
        linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        self.linears = [RowLinear(linear) for linear in linears]

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
            return self.mlp(x) * keep[:, None]
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
        return self.attn.q_proj.weight.data_ptr() == self.linears["qkv"].tiles.data_ptr()

    def release(self):
        for linear in self.linears.values():
            linear.release()


GRAINS: dict[str, type[Grain]] = {"channel": ChannelGrain, "token": TokenGrain}
