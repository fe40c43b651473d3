"""One forward: who decides, what was decided, and which rows still run. All that a layer needs to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hat_lib.method.grain import Grain
from hat_lib.method.policies import MaskedInput, check_decision
from hat_lib.method.setting import Mode
from hat_lib.method.trace import Trace


@dataclass
class Forward:
    """The decisions of one forward in one thread, applied and recorded in ``state``."""

    mode: Mode
    state: Trace
    grain: Grain
    gates: nn.ModuleDict  # by depth
    corrections: nn.ModuleDict  # by "{layer}_{site}"
    cache: Cache | None = None

    def __post_init__(self):
        self.any_protected = bool(self.state.protected.any())

    @property
    def rows(self) -> Tensor | None:
        """Indices into B*T of the rows that layers compute; None for all of them."""
        return self.state.alive if self.mode.compact else None

    def gather(self, x: Tensor) -> Tensor:
        """The running rows of ``x [B, T, C]``: ``[1, n, C]``, or x itself if all of them run."""
        return x if self.rows is None else x.flatten(0, 1)[self.rows.to(x.device)][None]

    def scatter(self, x: Tensor, others: Tensor) -> Tensor:
        """``[B, T, C]``: ``x``, as `gather` gives it, at the running rows and ``others`` elsewhere."""
        if self.rows is None:
            return x
        return others.flatten(0, 1).index_copy(0, self.rows.to(x.device), x[0]).view(others.shape)

    def stand_in(self, layer: int, x: Tensor) -> Tensor | None:
        """What tokens get in place of a skipped FFN of ``x``, if anything; both ``[..., D]``."""
        if not self.mode.strength or f"{layer}_ffn" not in self.corrections:
            return None
        return self.mode.strength * self.corrections[f"{layer}_ffn"].term(x, 0)

    def skip(self, layer: int, site: str, x: Tensor) -> Tensor:
        """The input ``x [..., C]`` of linear layers, for the running rows, with the units zeroed that they skip; x
        itself if the grain does not decide there."""
        if site not in self.grain.sites or not x.numel():
            return x
        flat = x.reshape(-1, x.shape[-1])
        keep = self.decide(layer, site, flat)
        if keep is None:
            return x
        if isinstance(keep, MaskedInput):
            return keep.x.view(x.shape)
        if not self.mode.compact and self.state.alive is not None:
            keep = keep | self.state.exited.view(-1, 1).to(x.device)  # their K and V come from all channels
        return (flat.view(*keep.shape, -1) * keep[..., None]).view(x.shape)

    def decide(self, layer: int, site: str, x: Tensor) -> Tensor | MaskedInput | None:
        """What the running rows ``x [n, C]`` keep at a site, protected tokens included: bool ``[n, units]``, or ``[n]``
        for the FFN; in training, a float mask or a `MaskedInput`; None for everything."""
        if site not in self.grain.sites:
            return None
        state, rows, index = self.state, self.rows, self.grain.sites.index(site)
        keep = None if self.grain.always_runs(layer, site) else self.mode.policy(layer, site, x, rows, state)
        if isinstance(keep, MaskedInput):
            state.note(layer, index, keep.keep)
            return keep
        if keep is not None:
            check_decision(keep, (len(x), *state.mask_shapes[site]), f"layer {layer}, site {site}")
        if keep is not None and self.any_protected:
            protected = state.protected.view(-1) if rows is None else state.protected.view(-1)[rows]
            protected = (protected if keep.dim() == 1 else protected[:, None]).to(x.device)
            keep = keep | protected if keep.dtype == torch.bool else torch.where(protected, 1.0, keep)
        state.note(layer, index, keep)
        if state.masks is not None:
            whole = x.new_ones(len(x), *state.mask_shapes[site], dtype=torch.bool)
            state.note_mask(layer, site, whole if keep is None else keep)
        return keep

    def exit(self, depth: int, h: Tensor) -> Tensor:
        """Let finished tokens leave after ``depth`` layers; returns ``h [B, T, D]`` with their states translated."""
        if self.mode.exits is None or str(depth) not in self.gates:
            return h
        state, flat = self.state, h.reshape(-1, h.shape[-1])
        rows = state.alive if state.alive is not None else torch.arange(len(flat), device=state.real.device)
        leave = (state.real & ~state.protected).view(-1)[rows]
        if len(rows):
            decided = self.mode.exits.exits(depth, flat[rows.to(h.device)], rows, state)
            if decided is not None:
                check_decision(decided, (len(rows),), f"the exit after {depth} layers")
            leave = torch.zeros_like(leave) if decided is None else leave & decided.to(leave.device)
        if state.masks is not None:
            left = torch.zeros(len(flat), dtype=torch.bool, device=rows.device).index_copy(0, rows, leave)
            state.masks.exits[depth] = left.view(state.batch, state.tokens)
        leaving = rows[leave]
        if not len(leaving):
            return h
        state.leave(leaving, depth)
        leaving = leaving.to(h.device)
        return flat.index_copy(0, leaving, self.gates[str(depth)].translate(flat[leaving])).view(h.shape)
