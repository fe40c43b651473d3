"""TokenState: everything one forward pass decided, per layer and per token.

The model fills one `TokenState` in each forward; losses, cost, sweeps, plots and widgets read only
this object. It also answers the two questions that every layer asks on the way: which rows are still
alive, and which are protected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Masks:
    """Decisions taken in one forward, to be forced on another (`HierarchicalTransformer.force`).

    ``keep[layer, site]``  bool ``[B, T, C]`` for the channel grain (C input channels), ``[B, T]`` for the
    token grain; rows that had already exited hold False. ``exits[e]`` bool ``[B, T]``: left at exit e.
    """

    keep: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    exits: dict[int, Tensor] = field(default_factory=dict)

    def map(self, change) -> Masks:
        """The same decisions with ``change`` applied to each ``[B, T, ...]`` tensor (slice, index, pad)."""
        return Masks({k: change(m) for k, m in self.keep.items()}, {e: change(m) for e, m in self.exits.items()})


class TokenState:
    """Who is alive, where each token left, and what share of each layer it ran.

    Args:
        real: bool ``[B, T]``, False at padding.
        position: int64 ``[B, T]``, rank among the real tokens of its document, counted from 0.
        protected: bool ``[B, T]``, tokens that run in full and never exit.
        site_work: work of each gated site of a layer, as a fraction of the layer's routable work ``[S]``.
        n_layers: L.
        start: number of tokens already in the KV cache.
    """

    def __init__(
        self,
        real: Tensor,
        position: Tensor,
        protected: Tensor,
        site_work: Sequence[float],
        n_layers: int,
        start: int = 0,
    ):
        self.real, self.position, self.protected = real, position, protected
        self.site_work = tuple(site_work)
        self.n_layers, self.start = n_layers, start
        self.batch, self.tokens = real.shape
        self.any_protected = bool(protected.any())
        self.alive: Tensor | None = None
        """rows (indices into B*T) that still run; None while all do"""
        self.exit_layer = torch.full(real.shape, n_layers, dtype=torch.int16, device=real.device)
        """layers that each token ran, ``[B, T]``; L where it stayed to the end"""
        self.routed = self.gated = False
        """whether routers, and exit gates, had a part in this forward"""
        self.threshold_scale: Tensor | None = None
        """channel grain: of the running rows in the present layer, ``[n, 1]``"""
        self.masks: Masks | None = None
        """the decisions themselves, under `HierarchicalTransformer.record`"""
        self._share: dict[tuple[int, int], Tensor | float] = {}

    @classmethod
    def begin(
        cls,
        tokens: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        start: int,
        protected: int,
        site_work: Sequence[float],
        n_layers: int,
    ) -> TokenState:
        """The state before the first layer.

        Args:
            tokens: ``[B, T, ...]``, what this forward reads.
            mask: ``[B, start + T]``, 0 at padding; None where there is none, or one of another shape.
            position_ids: ``[B or 1, T]`` as given to the model; where they start again at 0, another document of a
                packed sequence begins, with protected tokens of its own.
            start: tokens in the KV cache.
            protected: how many real tokens of a document are protected.
        """
        b, t = tokens.shape[:2]
        if mask is not None and mask.dim() == 2:
            real = mask[:, -t:].bool()
            position = (mask.long().cumsum(1) - 1)[:, -t:]
        else:
            real = torch.ones(b, t, dtype=torch.bool, device=tokens.device)
            position = torch.arange(start, start + t, device=tokens.device).expand(b, t)
        if position_ids is not None and position_ids.shape[-1] == t:
            position = torch.minimum(position, position_ids.to(position.device))
        return cls(real, position, real & (position < protected), site_work, n_layers, start)

    def leave(self, rows: Tensor, depth: int) -> None:
        """Mark ``rows`` (indices into B*T) as exited after ``depth`` layers."""
        self.exit_layer.view(-1)[rows] = depth
        self.alive = (self.exit_layer.view(-1) == self.n_layers).nonzero().squeeze(1)
        if self.masks is not None and not len(self.alive):  # no further layer decides anything
            first = {site: keep for (layer, site), keep in self.masks.keep.items() if layer == 0}
            for layer in range(depth, self.n_layers):
                self.masks.keep |= {(layer, site): torch.zeros_like(keep) for site, keep in first.items()}

    @property
    def exited(self) -> Tensor:
        """bool ``[B, T]``: who has left by now."""
        return self.exit_layer < self.n_layers

    def note(self, layer: int, site: int, keep: Tensor | None) -> None:
        """Record what one site ran: bool ``[n, C]`` or ``[n]`` for the running rows, None for everything."""
        self._share[layer, site] = 1.0 if keep is None else self._everywhere(_share(keep.detach()))

    def note_mask(self, layer: int, site: str, keep: Tensor) -> None:
        """Keep the decision itself; ``keep`` is bool ``[n, ...]`` for the running rows."""
        keep = self._everywhere(keep)
        self.masks.keep[layer, site] = keep.view(self.batch, self.tokens, *keep.shape[1:])

    def _everywhere(self, values: Tensor) -> Tensor:
        """Values of the running rows, at their places among all rows; 0 at the others."""
        if self.alive is None or len(values) != self.alive.numel():
            return values
        return values.new_zeros(self.batch * self.tokens, *values.shape[1:]).index_copy(0, self.alive, values)

    @property
    def site_share(self) -> Tensor:
        """Executed share of each site, fp32 ``[L, S, B, T]``; 0 where the token had left or is padding."""
        shape = (self.n_layers, len(self.site_work), self.batch, self.tokens)
        out = torch.zeros(shape, device=self.real.device)
        for (layer, site), share in self._share.items():
            out[layer, site] = share if isinstance(share, float) else share.view(self.batch, self.tokens)
        depth = torch.arange(self.n_layers, device=out.device)[:, None, None]
        ran = self.real & (depth < self.exit_layer)
        return out * ran[:, None]

    @property
    def share(self) -> Tensor:
        """Executed share of each layer's routable work, fp32 ``[L, B, T]``."""
        work = torch.tensor(self.site_work, device=self.real.device)
        return torch.einsum("lsbt,s->lbt", self.site_share, work)

    @property
    def capacity(self) -> float:
        """Realised capacity: mean share over real tokens in the layers that they entered."""
        depth = torch.arange(self.n_layers, device=self.real.device)[:, None, None]
        ran = self.real & (depth < self.exit_layer)
        return float(self.share.sum() / ran.sum().clamp(min=1))

    @property
    def exit_rate(self) -> float:
        """Realised exit rate: share of real tokens that left before the last layer."""
        left = (self.exit_layer < self.n_layers) & self.real
        return float(left.sum() / self.real.sum().clamp(min=1))

    @classmethod
    def cat(cls, states: Sequence[TokenState]) -> TokenState:
        """Join the states of consecutive forwards of the same rows (prefill, then each decode step) along T."""
        first = states[0]
        join = lambda name: torch.cat([getattr(s, name) for s in states], dim=1)  # noqa: E731
        out = cls(join("real"), join("position"), join("protected"), first.site_work, first.n_layers, first.start)
        out.exit_layer = join("exit_layer")
        out.routed, out.gated = any(s.routed for s in states), any(s.gated for s in states)
        share = torch.cat([s.site_share for s in states], dim=-1)
        for layer in range(first.n_layers):
            for site in range(len(first.site_work)):
                out._share[layer, site] = share[layer, site].flatten()
        return out


def _share(kept: Tensor) -> Tensor:
    """Share per row, fp32 ``[n]``, of a keep mask (already a share if it is one number a row)."""
    if kept.is_floating_point():
        return kept if kept.dim() == 1 else kept.detach().float().mean(1)
    # Summing booleans straight into int32 is the fast way on CPU, four times a float mean.
    return kept.float() if kept.dim() == 1 else kept.sum(1, dtype=torch.int32) / kept.shape[1]
