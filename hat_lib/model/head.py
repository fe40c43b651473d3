"""The head at less than its full work: every token of the vocabulary from some channels, the likely ones from all.

A preview of the logits is read from the channels of the final state that are over a threshold, scored as at any other
site of the channel grain. Tokens whose preview comes within a margin of the best one make the shortlist, and their
logits are read once more, from all channels. So what is likely is exact, and who is unlikely is told from few channels:
the head's work is its share of channels plus the shortlist's share of the vocabulary.

On a small base the head is a large part of the work (21 % of SmolLM2-135M). It is decided at any capacity below 1.0 of
a model whose calibration has tables for it. Exits and recorded masks do not include the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hat_lib.model.modes import Context

ROWS = 128
"""of logits that are put right at once: those of a long prompt are large"""


@dataclass(frozen=True, eq=False)
class Shortlist:
    """How the head decides."""

    cut: Tensor
    """magnitude over which a channel of the final state is read for the preview, fp32 ``[D]``"""
    margin: float
    """nats below the best preview within which a token is on the shortlist"""
    share: float
    """of the head's work that is expected, for a forward whose logits nobody asked for"""

    def keep(self, x: Tensor) -> Tensor:
        """The channels that the preview reads: bool, as ``x [..., D]``."""
        return x.abs() > self.cut.to(x.device)


class HeadGate:
    """Two hooks on the head: its input masked, its output put right where the shortlist says so."""

    def __init__(self, context: Context):
        self.context = context

    def attach(self, head: nn.Module) -> list:
        """Returns the handles."""
        return [head.register_forward_pre_hook(self.preview), head.register_forward_hook(self.read_again, prepend=True)]

    def preview(self, head: nn.Module, args: tuple) -> tuple | None:
        shortlist = self.context.mode.shortlist
        if shortlist is None:
            return None
        self.context.final_state = x = args[0]
        return (x * shortlist.keep(x), *args[1:])

    def read_again(self, head: nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
        shortlist = self.context.mode.shortlist
        if shortlist is None:
            return None
        x, self.context.final_state = self.context.final_state, None
        states, previews, parts = x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1]), []
        share = shortlist.keep(states).float().mean(-1)
        for some, preview, count in zip(states.split(ROWS), previews.split(ROWS), share.split(ROWS), strict=True):
            wanted = likely(preview, shortlist.margin)
            count += wanted.float().mean(-1)
            parts.append(head.forward(some).where(wanted, preview))  # not the module, which would call these hooks
        if (state := self.context.trace) is not None:
            state.note_head(share.view(x.shape[:-1]))
        return torch.cat(parts).view(logits.shape)


def likely(preview: Tensor, margin: float) -> Tensor:
    """Who is on the shortlist: bool, as ``preview [..., V]``. Compared in fp32, whatever the dtype of logits."""
    preview = preview.float()
    return preview >= preview.amax(-1, keepdim=True) - margin
