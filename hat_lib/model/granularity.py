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
from torch import Tensor, nn

from hat_lib.engine.packed import FusedLinear, TiledLinear
from hat_lib.model.token_state import TokenState

Decide = Callable[[str, Tensor, Tensor | None], Tensor | None]


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
