"""Trace: all that one forward decided, per layer and token. Cost, sweeps, figures and the screen read it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hat_lib.config import HatError


@dataclass
class Masks:
    """Decisions of one forward, to be forced on another (`HierarchicalTransformer.force`) in place of routers and
    gates. Positions count from the start of the cache."""

    keep: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """by layer and site, bool ``[B, T, units]``, or ``[B, T]`` for the whole FFN; False for rows that had exited"""
    exits: dict[int, Tensor] = field(default_factory=dict)  #: bool [B, T], by exit: which tokens left there

    def map(self, change) -> Self:
        """The same decisions with ``change`` applied to each ``[B, T, ...]`` tensor (slice, index, pad)."""
        return Masks({k: change(m) for k, m in self.keep.items()}, {e: change(m) for e, m in self.exits.items()})

    def decide(self, layer, site, x, rows, trace) -> Tensor | None:
        return self._now((layer, site), self.keep.get((layer, site)), trace.mask_shapes[site], rows, trace)

    def leave(self, depth, h, rows, trace) -> Tensor | None:
        return self._now(depth, self.exits.get(depth), (), rows, trace)

    def _now(self, place, mask: Tensor | None, units: tuple[int, ...], rows: Tensor | None, trace):
        if mask is None:
            return None
        end = trace.start + trace.tokens
        if len(mask) != trace.batch or mask.shape[1] < end or mask.shape[2:] != units:
            expected = f"[{trace.batch}, >= {end}], units {units}"
            raise HatError(f"the forced mask of {place!r} must be {expected}, got {list(mask.shape)}")
        window = mask[:, trace.start : end].flatten(0, 1)
        return window if rows is None else window[rows]


@dataclass(eq=False)
class Trace:
    """Which tokens still run, where each one left, and what share of each layer it ran."""

    real: Tensor  #: bool [B, T], False at padding
    position: Tensor  #: int64 [B, T], rank among the real tokens of its document
    protected: Tensor  #: bool [B, T], tokens that run in full and never exit
    site_work: Sequence[float]  #: work of each site of a layer, as a fraction of the layer's routable work [S]
    n_layers: int
    start: int = 0  #: number of tokens already in the KV cache
    covers: str = "one forward"
    """whose tokens these are: of one forward or, after generate, of its prompt (if a single token is new), of all new
    tokens that were read, or of the last step alone (beams, or a loop of the caller's, whose rows may be others)"""
    text: tuple[Tensor, Cache | None] | None = None
    """while the forward runs: token ids, int64 ``[B, T]`` (zeros where only embeddings are known), and the cache"""
    mask_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  #: of a row: (units,), or () for the FFN
    alive: Tensor | None = None  #: rows (indices into B*T) that still run; None while all do
    exit_layer: Tensor = None  #: layers that each token ran, int16 [B, T]; L where it stayed to the end
    routed: bool | Tensor = False
    gated: bool | Tensor = False
    corrected: bool | Tensor = False
    """whether routers, exit gates and corrections took part; by column, ``[T]``, where forwards are joined"""
    steering: Tensor | None = None  #: what steering multiplies thresholds by, fp32 [B*T]; None for 1
    threshold_scale: Tensor | None = None  #: that times token sensitivity, for the running rows in this layer, [n, 1]
    masks: Masks | None = None  #: the decisions themselves, under `HierarchicalTransformer.record`
    executed: Tensor | None = None  #: `site_share`, if it is known as a whole rather than site by site: from the engine
    head_work: float | Tensor = 0.0  #: of a head with a shortlist, in units of a layer's; else 0; by column if joined
    expected_head_share: float = 1.0
    head_read: Tensor | None = None  #: share of each token, fp32 [B, T]; nan where its logits were not read
    _read: tuple[float, int] = (0.0, 0)  # share, summed over the tokens whose logits were read, and their number

    def __post_init__(self):
        self.batch, self.tokens = self.real.shape
        if self.exit_layer is None:
            self.exit_layer = torch.full_like(self.real, self.n_layers, dtype=torch.int16)
        if self.head_read is None:
            self.head_read = torch.full_like(self.real, torch.nan, dtype=torch.float)
        # What was decided site by site, for all rows; a row's shares in layers that it did not enter mean nothing.
        shape = self.n_layers, len(self.site_work), self.batch * self.tokens
        self._share = torch.zeros(shape, device=self.real.device)

    def __repr__(self) -> str:
        rows, exits = f" in {self.batch} rows" if self.batch > 1 else "", f", exit rate {self.exit_rate:.3f}"
        head = f", head {self.head_share:.3f}" if self.work[1, 1] else ""
        return (
            f"Trace of {self.tokens} tokens{rows} ({self.covers}):\n"
            f"  capacity {self.capacity:.3f} (layers {self.layer_capacity:.3f}{head}){exits}"
        )

    @staticmethod
    def places(tokens, mask, position_ids, start) -> tuple[Tensor, Tensor]:
        """`real` and `position` of ``tokens [B, T, ...]``, after ``start`` tokens in the KV cache.

        ``mask [B, start + T]`` is 0 at padding; None, or any that is not 2-D, means no padding. Where ``position_ids``
        (``[B or 1, T]`` or None) restart at 0, another document of a packed sequence begins.
        """
        b, t = tokens.shape[:2]
        if mask is None or mask.dim() != 2:
            mask = torch.ones(b, start + t, dtype=torch.bool, device=tokens.device)
        real, position = mask[:, -t:] != 0, (mask.long().cumsum(1) - 1)[:, -t:]
        if position_ids is not None and position_ids.shape[-1] == t:
            position = torch.minimum(position, position_ids.to(position.device))
        return real, position

    def leave(self, rows: Tensor, depth: int) -> None:
        """Mark ``rows`` (indices into B*T) as exited after ``depth`` layers."""
        self.exit_layer.view(-1)[rows] = depth
        self.alive = (~self.exited).view(-1).nonzero().squeeze(1)

    def note(self, layer: int, site: str, keep: Tensor | None, n: int) -> None:
        """Record what the ``n`` running rows keep at a site: bool ``[n, ...]``, in training their share; None for
        everything."""
        share = 1.0 if keep is None else self._everywhere(_kept_share(keep.detach()))
        self._share[layer, [*self.mask_shapes].index(site)] = share
        if self.masks is not None:
            mask = torch.ones(n, *self.mask_shapes[site], dtype=torch.bool) if keep is None else keep
            self.masks.keep[layer, site] = self._everywhere(mask).view(self.batch, self.tokens, *mask.shape[1:])

    def note_head(self, share: Tensor) -> None:
        """Record what the head ran: ``[B, n]`` for the last n tokens of each sequence, else for any of them."""
        if share.dim() == 2 and len(share) == self.batch and share.shape[1] <= self.tokens:
            before = self.tokens - share.shape[1]
            self.head_read = torch.cat([self.head_read[:, :before], share.to(self.head_read.device)], dim=1)
            share = share[self.real[:, before:]]
        self._read = self._read[0] + float(share.sum()), self._read[1] + share.numel()

    def _everywhere(self, values: Tensor) -> Tensor:
        """Values of the running rows, at their positions among all rows; 0 elsewhere."""
        values = values.to(self.real.device)
        if self.alive is None or len(values) != self.alive.numel():
            return values
        return values.new_zeros(self.batch * self.tokens, *values.shape[1:]).index_copy(0, self.alive, values)

    @property
    def exited(self) -> Tensor:
        """bool ``[B, T]``: which tokens have left by now."""
        return self.exit_layer < self.n_layers

    @property
    def entered(self) -> Tensor:
        """bool ``[L, B, T]``: the layers that each real token entered."""
        depth = torch.arange(self.n_layers, device=self.real.device)[:, None, None]
        return self.real & (depth < self.exit_layer)

    @property
    def site_share(self) -> Tensor:
        """Executed share of each site, fp32 ``[L, S, B, T]``; 0 where the token had left or is padding."""
        share = self._share.unflatten(-1, self.real.shape) if self.executed is None else self.executed
        return share * self.entered[:, None]

    @property
    def share(self) -> Tensor:
        """Executed share of each layer's routable work, fp32 ``[L, B, T]``."""
        work = torch.tensor(self.site_work, device=self.real.device)
        return torch.einsum("lsbt,s->lbt", self.site_share, work)

    @property
    def head_shares(self) -> Tensor:
        """Executed share of the head, fp32 ``[B, T]``: of a token whose logits were not read, or nobody knows whose
        they were, the mean of those that were read, or else the expected share."""
        return self.head_read.nan_to_num(self._read[0] / self._read[1] if self._read[1] else self.expected_head_share)

    @property
    def head_share(self) -> float:
        """Executed share of the head: mean over real tokens."""
        return float(self.head_shares[self.real].mean())

    @property
    def work(self) -> np.ndarray:
        """Executed and routable work of real tokens, ``[2, 2]``: in the layers that they entered, and in a head with a
        shortlist; in units of a layer's."""
        head = self.head_work * self.real
        parts = (self.share, self.entered), (self.head_shares * head, head)
        return np.array([[float(part.sum(dtype=torch.float64)) for part in pair] for pair in parts])

    @property
    def layer_capacity(self) -> float:
        """Realised in the layers: mean share over real tokens and the layers that they entered."""
        return ratio(self.work[0])

    @property
    def capacity(self) -> float:
        """Realised: executed / routable work."""
        return ratio(self.work.sum(0))

    @property
    def exit_rate(self) -> float:
        """Realised: share of real tokens that left before the last layer."""
        return float((self.exited & self.real).sum() / self.real.sum().clamp(min=1))

    @classmethod
    def cat(cls, traces: Sequence[Self], lengths: Sequence[int] | None = None) -> Self:
        """Join consecutive forwards of the same rows (prefill, then each decode step) along T: work adds up. Of each,
        the first tokens alone, if ``lengths`` says how many; drafts that were rejected are left out like that."""
        first, masks, lengths = traces[0], None, lengths or [t.tokens for t in traces]
        parts = list(zip(traces, lengths, strict=True))

        def tokens(name: str) -> Tensor:
            return torch.cat([getattr(t, name)[..., :n] for t, n in parts], dim=-1)

        def columns(name: str) -> Tensor:
            each = [(torch.as_tensor(getattr(t, name), device=t.real.device), t.tokens, n) for t, n in parts]
            return torch.cat([value.expand(count)[:n] for value, count, n in each])

        if all(t.masks is not None for t in traces):
            cut = [t.masks.map(lambda mask, n=n: mask[:, :n]) for t, n in parts]
            masks = Masks(*(_joined([getattr(m, kind) for m in cut], lengths) for kind in ("keep", "exits")))
        return cls(
            *map(tokens, ("real", "position", "protected")),
            *(first.site_work, first.n_layers, first.start),
            mask_shapes=first.mask_shapes,
            exit_layer=tokens("exit_layer"),
            executed=tokens("site_share"),
            masks=masks,
            head_read=tokens("head_shares"),
            **{name: columns(name) for name in ("routed", "gated", "corrected", "head_work")},
        )


def _joined(parts: list[dict], lengths: list[int]) -> dict:
    """Masks of consecutive forwards, along T; False where one decided nothing: all had left, or none may leave."""
    no = {place: mask[:, :1] & False for part in parts for place, mask in part.items()}
    each = list(zip(parts, lengths, strict=True))
    return {p: torch.cat([part.get(p, m.expand(-1, n, *m.shape[2:])) for part, n in each], 1) for p, m in no.items()}


def ratio(work: np.ndarray) -> float:
    """Executed / possible work, of a pair."""
    return float(work[0] / max(work[1], 1))


def _kept_share(keep: Tensor) -> Tensor:
    """Share per row, fp32 ``[n]``, of a keep mask (already a share if it has one number per row)."""
    if keep.is_floating_point():
        return keep if keep.dim() == 1 else keep.float().mean(1)
    # Summing booleans straight into int32 is the fast way on a CPU, four times as fast as a float mean.
    return keep.float() if keep.dim() == 1 else keep.sum(1, dtype=torch.int32) / keep.shape[1]
