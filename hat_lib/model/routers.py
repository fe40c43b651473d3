"""Routers and policies: which work does this token get?

A *router* scores; a *policy* turns scores into a keep mask. In use the decision is always
``score > threshold``, per token, in fp32: it reads neither the future nor the rest of the batch.

token grain (the published method): one logit per token and layer, ``s = w.x + b`` on the FFN's input. channel grain:
for input channel i of a linear layer, ``s_i = |x_i| * ||W[:, i]||``, the norm of what that channel would add to the
output; thresholded activation sparsity as in TEAL (Liu et al. 2024, arXiv:2408.14690) and CATS (arXiv:2404.08763),
weighted by the column norm as in Wanda (arXiv:2306.11695). The router learns one log-scale per channel, zero at the
start. In each layer a token router says how much the token needs, ``u = w.x + b`` on the input of q|k|v, and all of its
scores in that layer are multiplied by ``exp(u)``: a needy token keeps more channels. It is measured and not trained,
see `hat_lib.calibration.token_sensitivity`.

Other policies - everything, forced, random, a static choice - go through the same code, so that a
control differs from the method in nothing but its decisions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hat_lib.model.token_state import TokenState


def round_down(cut: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest numbers of ``dtype`` that are not above ``cut``.

    For x of that dtype, ``x > cut`` and ``x > round_down(cut, dtype)`` are the same, and comparing like with
    like is several times faster.
    """
    near = cut.to(dtype)
    return torch.where(near.to(cut.dtype) > cut, torch.nextafter(near, torch.full_like(near, -torch.inf)), near)


# A factor of e^3 either way is more than any text asked for; what lies beyond is a stray extrapolation.
SENSITIVITY_LIMIT = 3.0


class MoERouter(nn.Module):
    """One score per token, ``[n, D] -> [n]`` fp32: whether the FFN runs (token grain), or the token's need (channel
    grain). Untrained, all scores are zero."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))
        self.threshold = -torch.inf

    def score(self, x: Tensor) -> Tensor:
        # A sum over the last axis, not a matmul: one row alone rounds as the same row in a batch.
        return (x.float() * self.weight).sum(-1) + self.bias

    def keep(self, x: Tensor) -> Tensor:
        return self.score(x) > self.threshold

    def set_threshold(self, threshold: float) -> None:
        self.threshold = float(threshold)


class ChannelRouter(nn.Module):
    """Channel grain: one score per input channel, ``[n, C] -> [n, C]`` fp32.

    Args:
        column_norm: ``||W[:, i]||`` over all outputs that read channel i, fp32 ``[C]``. It belongs to the
            base and is not saved.
    """

    def __init__(self, column_norm: Tensor):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros_like(column_norm))
        self.register_buffer("column_norm", column_norm.clamp(min=1e-12), persistent=False)
        self.set_threshold(-torch.inf)

    def score(self, x: Tensor, threshold_scale: Tensor | float | None = None) -> Tensor:
        """``threshold_scale [n, 1]`` is the tokens' own, from `token_threshold_scale`."""
        score = x.float().abs() * (self.column_norm * self.log_scale.exp())
        return score if threshold_scale is None else score / threshold_scale

    def keep(self, x: Tensor, threshold_scale: Tensor | float | None = None) -> Tensor:
        # |x_i| > t * threshold_scale / (norm_i * scale_i): the same rule with the division done once.
        cut = self._cut_in(x.dtype)
        return x.abs() > (cut if threshold_scale is None else cut * threshold_scale)

    def set_threshold(self, threshold: float) -> None:
        self.threshold = float(threshold)
        with torch.no_grad():
            self.register_buffer("_cut", threshold / (self.column_norm * self.log_scale.exp()), persistent=False)
        self._cuts = {torch.float32: self._cut}

    def _cut_in(self, dtype: torch.dtype) -> Tensor:
        """The cut rounded down to ``dtype``: on numbers of that dtype it decides exactly as the fp32 one,
        and comparing like with like takes a third of the time."""
        if dtype not in self._cuts:
            self._cuts[dtype] = round_down(self._cut, dtype)
        return self._cuts[dtype]


def token_threshold_scale(router: MoERouter, site: str, x: Tensor, state: TokenState) -> Tensor | float:
    """Channel grain: ``exp(-need)`` of each running row, which multiplies its thresholds, ``[n, 1]`` in x's dtype.

    Worked out at a layer's first site for all of them. For one row on a CPU it is a number, in a third of the time."""
    if site != "qkv":
        return state.threshold_scale
    if len(x) == 1 and x.device.type == "cpu":
        need = float(torch.dot(x.view(-1).float(), router.weight)) + float(router.bias)
        state.threshold_scale = math.exp(-min(max(need, -SENSITIVITY_LIMIT), SENSITIVITY_LIMIT))
    else:
        state.threshold_scale = (
            router.score(x).neg().clamp_(-SENSITIVITY_LIMIT, SENSITIVITY_LIMIT).exp_().to(x.dtype)[:, None]
        )
    return state.threshold_scale
