"""ExitGate: is this token finished? And what does its hidden state need to be read by the final norm?

Gate: a linear layer D -> 2 on the RMS-normalised hidden state, ``score = stay/leave logit difference``
(the published method trains it with Gumbel-softmax). Translator: ``h + |h| (a * n + U V n + b)`` with
n = h / rms(h) and |h| the Euclidean length, an affine map whose matrix is diagonal plus low rank, because the last
layers change the hidden state so much that reading logits early is hopeless without one (the idea of the tuned lens,
Belrose et al. 2023, arXiv:2303.08112). The bias alone lets an exit at least say which tokens are frequent. The
factor |h| makes one learning rate fit every depth, whose states differ in length by orders of magnitude, and every
width: a step of size e in each number turns the state by about e sqrt(D).

Untrained, the score is 0 for every token and the translator is the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExitGate(nn.Module):
    """One exit: ``score [n, D] -> [n]`` fp32, and ``translate [n, D] -> [n, D]`` in the input's dtype."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.rank = rank
        self.gate = nn.Linear(hidden_size, 2)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.scale = nn.Parameter(torch.zeros(hidden_size))
        self.shift = nn.Parameter(torch.zeros(hidden_size))
        self.reduce = nn.Linear(hidden_size, rank, bias=False)
        self.expand = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.expand.weight)

    def logits(self, h: Tensor) -> Tensor:
        """``[n, D] -> [n, 2]`` fp32: (stay, leave)."""
        return (_norm(h)[:, None, :] * self.gate.weight).sum(-1) + self.gate.bias

    def score(self, h: Tensor) -> Tensor:
        stay, leave = self.logits(h).unbind(-1)
        return leave - stay

    def translate(self, h: Tensor) -> Tensor:
        n = _norm(h)
        change = self.scale * n + self.expand(self.reduce(n)) + self.shift
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=torch.float32)
        return h + (length * change).to(h.dtype)


def _norm(h: Tensor) -> Tensor:
    return F.rms_norm(h.float(), h.shape[-1:])
