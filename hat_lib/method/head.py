"""The head at less than its full work: every token of the vocabulary from some channels, the likely ones from all.

A preview of the logits is read from the channels of the final state that are above a threshold, scored by magnitude
times column norm. Tokens whose preview comes within a margin of the best one form the shortlist, and their logits are
read again, from all channels. The work is the preview's share of the channels plus the shortlist's of the vocabulary.
It knows neither token sensitivity nor protected tokens; recorded masks do not include it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hat_lib.method.thresholds import Thresholds

ROWS = 128  # of logits, corrected at a time: those of a long prompt are large


@dataclass
class Reading:
    """The head under way in one forward."""

    thresholds: Thresholds
    norm: Tensor  #: of the head's columns, fp32 [D]
    note: Callable[[Tensor], None]  #: takes the work of each row, as a share of the head's
    states: Tensor | None = None  #: final states, [..., D], between the two hooks

    def keep(self, x: Tensor) -> Tensor:
        """The channels that the preview reads: bool, shaped like ``x [..., D]``."""
        return x.abs() > (float(self.thresholds.head) / self.norm).to(x.device)


def attach(head: nn.Module, reading: Callable[[], Reading | None]) -> list[RemovableHandle]:
    """Two hooks on the head: one masks its input, the other corrects its output; none while ``reading()`` is None."""

    def preview(head: nn.Module, args: tuple) -> tuple | None:
        if (under_way := reading()) is None:
            return None
        under_way.states = x = args[0]
        return (x * under_way.keep(x), *args[1:])

    def read_again(head: nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
        if (under_way := reading()) is None:
            return None
        x, under_way.states, parts = under_way.states, None, []
        states, previews = x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1])
        share = under_way.keep(states).float().mean(-1)
        for some, rows, count in zip(states.split(ROWS), previews.split(ROWS), share.split(ROWS), strict=True):
            wanted = likely(rows, float(under_way.thresholds.margin))
            count += wanted.float().mean(-1)
            parts.append(head.forward(some).where(wanted, rows))  # not the module, which would call these hooks
        under_way.note(share.view(x.shape[:-1]))
        return torch.cat(parts).view(logits.shape)

    return [head.register_forward_pre_hook(preview), head.register_forward_hook(read_again, prepend=True)]


def likely(preview: Tensor, margin: float) -> Tensor:
    """Which tokens are on the shortlist: bool, like ``preview [..., V]``. Compared in fp32, whatever its dtype."""
    preview = preview.float()
    return preview >= preview.amax(-1, keepdim=True) - margin
