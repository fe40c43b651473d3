"""Corrections compensate for skipped computation.

Channel grain: each linear layer ``y = W x`` becomes ``y = W x + B A x + c``, with a low-rank update (LoRA, Hu et al.
2021, arXiv:2106.09685) and a constant vector (SPON, arXiv:2512.12744), where x has only the channels that are kept.
Matrices that read the same input share A. A strength (`Grain.correction_strength`), 0 at capacity 1.0, scales both
terms. On the reference path, hooks add them ahead of anybody else's.

Token grain: ``B A x + c`` of the FFN's own input stands in for an FFN that a token skips, at 2 r D multiply-adds.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

FULL = 0.45  # capacity at and below which corrections of linear layers have their full strength


class Correction(nn.Module):
    """The terms of one site, zero until trained; ``outputs`` are those of each linear layer that reads its ``inputs``.
    A rank of 0 leaves only the constant vector."""

    def __init__(self, inputs: int, outputs: list[int], rank: int):
        super().__init__()
        self.outputs = outputs
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(sum(outputs), rank))
        self.shift = nn.Parameter(torch.zeros(sum(outputs)))

    def term(self, x: Tensor, number: int = 0) -> Tensor:
        """What is added to the output of linear layer ``number`` of the site: ``[..., C] -> [..., out]``."""
        up, shift = (t.split(self.outputs)[number].to(x.dtype) for t in (self.up, self.shift))
        return F.linear(F.linear(x, self.down.to(x.dtype)), up, shift)

    def attach(self, linears: list[nn.Module], strength: Callable[[], float]) -> list[RemovableHandle]:
        """Hook the linear layers that read the site's input, to add the terms at the ``strength`` of that moment."""

        def hook(number: int):
            def add(module, args, out):
                return out.add(self.term(args[0], number), alpha=now) if (now := strength()) else None

            return add

        return [linear.register_forward_hook(hook(n), prepend=True) for n, linear in enumerate(linears)]
