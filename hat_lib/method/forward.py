"""One forward: who decides, what was decided, and which rows still run. All that a layer needs to know."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hat_lib.config import HatError
from hat_lib.method.grain import Grain
from hat_lib.method.head import Reading
from hat_lib.method.setting import Setting
from hat_lib.method.trace import Trace


class MaskedInput(NamedTuple):
    """What a policy may answer in training: ``x * keep [n, C]``, with a gradient; ``keep``, protected ones included."""

    x: Tensor
    keep: Tensor


@dataclass
class Forward:
    """A forward of the causal LM, or of a part of it, under way in a thread: it decides by the ``setting`` that it
    began with, and writes what it decided into its ``trace``."""

    setting: Setting
    grain: Grain
    routers: nn.ModuleDict  #: by "{layer}_{site}", like corrections
    gates: nn.ModuleDict  #: by depth
    corrections: nn.ModuleDict
    in_layers: bool = False
    trace: Trace | None = None  #: from when its layers begin, like the cache
    cache: Cache | None = None
    any_protected: bool = False
    last_only: bool = False  #: whether a prompt's tokens but the last get only K and V in the last layer
    reading: Reading | None = None  #: what its head reads, if that has a shortlist

    @property
    def rows(self) -> Tensor | None:
        """Indices into B*T of the rows that layers compute; None for all of them."""
        return self.trace.alive if self.setting.compact else None

    def gather(self, x: Tensor) -> Tensor:
        """The running rows of ``x [B, T, C]``: ``[1, n, C]``, or x itself if all of them run."""
        return x if self.rows is None else x.flatten(0, 1)[self.rows.to(x.device)][None]

    def scatter(self, x: Tensor, others: Tensor) -> Tensor:
        """``[B, T, C]``: ``x``, as `gather` gives it, at the running rows and ``others`` elsewhere."""
        if self.rows is None:
            return x
        return others.flatten(0, 1).index_copy(0, self.rows.to(x.device), x[0]).view(others.shape)

    @property
    def strength(self) -> float:
        """Of the corrections."""
        return float(self.setting.thresholds.correction)

    def stand_in(self, layer: int, x: Tensor) -> Tensor | None:
        """What tokens get in place of a skipped FFN of ``x``, if anything; both ``[..., D]``."""
        if not self.strength or f"{layer}_ffn" not in self.corrections:
            return None
        return self.strength * self.corrections[f"{layer}_ffn"].term(x)

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
        if not self.setting.compact and self.trace.alive is not None:
            keep = keep | self.trace.exited.view(-1, 1).to(x.device)  # their K and V come from all channels
        return (flat.view(*keep.shape, -1) * keep[..., None]).view(x.shape)

    def decide(self, layer: int, site: str, x: Tensor) -> Tensor | MaskedInput | None:
        """What the running rows ``x [n, C]`` keep at a site, protected tokens included: bool ``[n, units]``, or ``[n]``
        for the FFN; in training, a float mask or a `MaskedInput`; None for everything."""
        if site not in self.grain.sites:
            return None
        trace, rows = self.trace, self.rows
        if trace.routed and site == self.grain.sites[0]:  # also for a policy that asks for scores further on
            self.grain.prepare(self.routers, layer, x, trace, float(self.setting.thresholds.sensitivity))
        if self.grain.always_runs(layer, site):
            keep = None
        elif self.setting.decide is None:
            keep = self.keep(layer, site, x)
        else:
            keep = self.setting.decide(layer, site, x, rows, trace)
            _check_answer(keep, (len(x), *trace.mask_shapes[site]), f"layer {layer}, site {site}")
        if isinstance(keep, MaskedInput):
            trace.note(layer, site, keep.keep, len(x))
            return keep
        if keep is not None and self.any_protected:
            protected = trace.protected.view(-1) if rows is None else trace.protected.view(-1)[rows]
            protected = (protected if keep.dim() == 1 else protected[:, None]).to(x.device)
            keep = keep | protected if keep.dtype == torch.bool else torch.where(protected, 1.0, keep)
        trace.note(layer, site, keep, len(x))
        return keep

    def keep(self, layer: int, site: str, x: Tensor) -> Tensor | None:
        """The method's own decision: see `Grain.keep`."""
        return self.grain.keep(self.routers, self.setting.thresholds, layer, site, x, self.trace)

    def exit(self, depth: int, h: Tensor) -> Tensor:
        """Let finished tokens leave after ``depth`` layers; returns ``h [B, T, D]`` with their states translated."""
        if not self.trace.gated or str(depth) not in self.gates:
            return h
        trace, gate, flat = self.trace, self.gates[str(depth)], h.reshape(-1, h.shape[-1])
        rows = trace.alive if trace.alive is not None else torch.arange(len(flat), device=trace.real.device)
        leave = (trace.real & ~trace.protected).view(-1)[rows]
        if len(rows):
            running = flat[rows.to(h.device)]
            if self.setting.leave is None:
                decided = gate.score(running) > float(self.setting.thresholds.exit[[*self.gates].index(str(depth))])
            else:
                decided = self.setting.leave(depth, running, rows, trace)
                _check_answer(decided, (len(rows),), f"the exit after {depth} layers")
            leave = torch.zeros_like(leave) if decided is None else leave & decided.to(leave.device)
        if trace.masks is not None:
            left = torch.zeros(len(flat), dtype=torch.bool, device=rows.device).index_copy(0, rows, leave)
            trace.masks.exits[depth] = left.view(trace.batch, trace.tokens)
        leaving = rows[leave]
        if not len(leaving):
            return h
        trace.leave(leaving, depth)
        leaving = leaving.to(h.device)
        return flat.index_copy(0, leaving, gate.translate(flat[leaving])).view(h.shape)


def _check_answer(keep: object, shape: tuple[int, ...], where: str) -> None:
    """Raise `HatError` unless a policy's answer for ``where`` is None or bool of this shape; or, in training, zeros and
    ones that carry a gradient, or a `MaskedInput`."""
    if keep is None or isinstance(keep, MaskedInput):
        return
    tensor = isinstance(keep, Tensor)
    hard = tensor and (keep.dtype == torch.bool or keep.requires_grad and bool(((keep == 0) | (keep == 1)).all()))
    if not hard or keep.shape != shape:
        given = f"{keep.dtype} {list(keep.shape)}" if tensor else type(keep).__name__
        raise HatError(f"{where}: a policy must decide by a bool tensor {list(shape)} or None, got {given}")
