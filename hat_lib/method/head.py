"""The head at less than its full work: every token of the vocabulary from some channels, the likely ones from all.

A preview of the logits is read from the channels of the final state that are above a threshold, scored by magnitude
times column norm. Tokens whose preview comes within a margin of the best one form the shortlist, and their logits are
read again, from all channels. The work is the preview's share of the channels plus the shortlist's of the vocabulary.
It knows neither token sensitivity nor protected tokens; recorded masks do not include it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hat_lib.method.setting import Context

ROWS = 128
"""rows of logits corrected at a time: those of a long prompt are large"""


@dataclass(frozen=True, eq=False)
class Shortlist:
    """How the head decides."""

    threshold: Tensor
    """magnitude above which a channel of the final state is read for the preview, fp32 ``[D]``"""
    margin: float
    """nats below the best preview within which a token is on the shortlist"""
    share: float
    """expected share of the head's work, for a forward whose logits nobody asked for"""

    def keep(self, x: Tensor) -> Tensor:
        """The channels that the preview reads: bool, shaped like ``x [..., D]``."""
        return x.abs() > self.threshold.to(x.device)


def attach(head: nn.Module, context: Context) -> list:
    """Two hooks on the head: one masks its input, the other corrects its output. Returns the handles."""

    def preview(head: nn.Module, args: tuple) -> tuple | None:
        if (frame := context.reading) is None:
            return None
        frame.final_state = x = args[0]
        return (x * frame.mode.head.keep(x), *args[1:])

    def read_again(head: nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
        if (frame := context.reading) is None:
            return None
        shortlist, x, frame.final_state = frame.mode.head, frame.final_state, None
        states, parts = x.reshape(-1, x.shape[-1]), []
        share = shortlist.keep(states).float().mean(-1)
        previews = logits.reshape(-1, logits.shape[-1]).split(ROWS)
        for some, preview, count in zip(states.split(ROWS), previews, share.split(ROWS), strict=True):
            wanted = likely(preview, shortlist.margin)
            count += wanted.float().mean(-1)
            parts.append(head.forward(some).where(wanted, preview))  # not the module, which would call these hooks
        if frame.state is not None:
            frame.state.note_head(share.view(x.shape[:-1]))
        return torch.cat(parts).view(logits.shape)

    return [head.register_forward_pre_hook(preview), head.register_forward_hook(read_again, prepend=True)]


def likely(preview: Tensor, margin: float) -> Tensor:
    """Which tokens are on the shortlist: bool, like ``preview [..., V]``. Compared in fp32, whatever its dtype."""
    preview = preview.float()
    return preview >= preview.amax(-1, keepdim=True) - margin
