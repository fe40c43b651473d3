"""Corrections compensate for skipped computation: in gated products at no extra inference cost, in FFNs at little.

Channel grain: each gated product ``y = W x`` becomes ``y = W x + B A x + c``, with a low-rank update (LoRA, Hu et al.
2021, arXiv:2106.09685) and a constant vector (SPON, arXiv:2512.12744). Both are trained to bring the gated model
back to its base (`hat_lib.training`), and neither adds work at inference: the engine reads ``W + B A`` and has c as a
bias. The base itself is never changed. On the reference path the terms are added by forward hooks on the base's
own linear layers, ahead of anybody else's hooks, so that those see the values used; at capacity 1.0, in ``hat.dense()``
and after `unload`, only the base is left. Matrices that read the same input share A, so one `Correction` serves
a site: q|k|v, o, gate|up or down. Both terms serve every token, protected or not, and x has only the channels that are
kept. The less is dropped, the less there is to compensate for: `strength`, of the capacity asked for, scales both.

Token grain: ``B A x + c`` of the FFN's own input stands in for an FFN that a token skips, at 2 r D multiply-adds.
Layer 0 has none, since its FFN always runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hat_lib.backbone.shapes import LINEARS
from hat_lib.model.modes import Context

FULL = 0.45
"""capacity at and below which corrections of gated products have their full strength"""


def strength(capacity: float, granularity: str = "channel") -> float:
    """Strength of corrections at a capacity: 0 at 1, rising with the square of what is dropped to 1 at `FULL`, as does
    what they can compensate for. What stands in for a skipped FFN has strength 1."""
    if capacity >= 1 or granularity == "token":
        return float(capacity < 1)
    return min(1.0, (1 - capacity) / (1 - FULL)) ** 2


class Correction(nn.Module):
    """The terms of one site. Untrained, they are zero.

    Args:
        inputs: channels of the site, C.
        outputs: of each linear layer that reads them.
        rank: of ``B A``; 0 leaves only the constant vector.
    """

    def __init__(self, inputs: int, outputs: list[int], rank: int):
        super().__init__()
        self.outputs = outputs
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(sum(outputs), rank))
        self.shift = nn.Parameter(torch.zeros(sum(outputs)))

    def term(self, x: Tensor, number: int) -> Tensor:
        """What is added to the output of linear layer ``number`` of the site: ``[..., C] -> [..., out]``."""
        up, shift = (t.split(self.outputs)[number].to(x.dtype) for t in (self.up, self.shift))
        return F.linear(F.linear(x, self.down.to(x.dtype)), up, shift)

    @torch.no_grad()
    def update(self) -> Tensor:
        """``B A``, fp32 ``[out, C]``, the site's linear layers stacked."""
        return self.up @ self.down


class Corrections(nn.ModuleDict):
    """One `Correction` per layer and site, by ``"{layer}_{site}"``.

    Args:
        layers: a base's decoder layers.
        granularity: "channel" or "token".
        rank: of each.
    """

    def __init__(self, layers: nn.ModuleList, granularity: str, rank: int):
        super().__init__()
        for i, layer in enumerate(layers):
            if granularity == "token":
                width = layer.mlp.gate_proj.in_features
                if i > 0:
                    self[f"{i}_ffn"] = Correction(width, [width], rank)
                continue
            for site, names in LINEARS.items():
                linears = [layer.get_submodule(name) for name in names]
                sizes = [linear.out_features for linear in linears]
                self[f"{i}_{site}"] = Correction(linears[0].in_features, sizes, rank)

    def attach(self, layers: nn.ModuleList, context: Context) -> list:
        """Channel grain: hook every linear layer; returns the handles."""
        return [
            layer.get_submodule(name).register_forward_hook(AddTerm(self[f"{i}_{site}"], number, context), prepend=True)
            for i, layer in enumerate(layers)
            for site, names in LINEARS.items()
            if f"{i}_{site}" in self
            for number, name in enumerate(names)
        ]


class AddTerm(NamedTuple):
    """The forward hook on a linear layer."""

    correction: Correction
    number: int
    context: Context

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        strength = self.context.mode.corrected if self.context.passes else 0.0  # called by hand, it is the base's
        return out.add(self.correction.term(args[0], self.number), alpha=strength) if strength else None
