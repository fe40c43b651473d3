"""Losses: from tensors of the tokens that count to one number.

The mean over no tokens is 0, with gradient 0. Half-precision input is computed in fp32, fp64 in fp64, and the loss has
that dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hat_lib.training.straight_through import row_slices


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """``sum_v p_v (log p_v - log q_v)`` of each token, with p = softmax(teacher), q = softmax(student).

    KL(teacher || student) in nats (Hinton et al. 2015, arXiv:1503.02531, at temperature 1), >= 0 up to rounding.
    Its gradient, ``q - p``, is computed in the same pass, a few rows at a time: autograd by itself would go through
    several tensors of the logits' size.

    Args:
        teacher: finite logits ``[..., V]``; they get no gradient.
        student: finite logits of the same shape; the two dtypes may differ.

    Returns:
        ``[...]``, fp32 or fp64.
    """
    width = student.shape[-1]
    teacher, logits = teacher.reshape(-1, width), student.reshape(-1, width)
    with torch.no_grad():
        slope, kl = torch.empty_like(logits), _at_least_fp32(logits[:, 0]).clone()
        for rows in row_slices(logits):
            log_p, log_q = (_at_least_fp32(part[rows]).log_softmax(-1) for part in (teacher, logits))
            p = log_p.exp()
            kl[rows] = log_p.sub_(log_q).mul_(p).sum(-1)
            slope[rows] = log_q.exp_().sub_(p).to(slope.dtype)
    inner = torch.linalg.vecdot(slope, logits)  # its value cancels, its gradient stays
    return (kl + (inner - inner.detach())).view(student.shape[:-1])


def z_loss(scores: Tensor) -> Tensor:
    """``mean (log(exp(s/2) + exp(-s/2)))^2``: router z-loss (Zoph et al. 2022, arXiv:2202.08906, eq. 5).

    A router with one logit s decides like a softmax over (s, 0), or over any shift of that pair. We use the
    centred (s/2, -s/2), because with (s, 0) the loss falls as s goes to minus infinity, which would reward skipping.
    The minimum is (log 2)^2, at s = 0. ``scores`` have any shape, in units such that ``sigmoid(score)`` is the
    probability of keeping.
    """
    a = _at_least_fp32(scores).abs()  # so that the loss is the same for s and -s, rounding included
    return mean((F.softplus(-a) + a / 2).square())


def entropy(scores: Tensor) -> Tensor:
    """``mean H(sigmoid(s))``, the entropy of the keep decision in nats, in [0, log 2]. Minimised, so that
    decisions move away from 50/50 and a hard threshold changes little (Grandvalet & Bengio 2004).

    ``H = softplus(-a) + a * sigmoid(-a)`` with a = |s|: the same for s and -s, without subtracting large numbers.
    ``scores`` as for `z_loss`.
    """
    a = _at_least_fp32(scores).abs()
    return mean(F.softplus(-a) + a * torch.sigmoid(-a))


def exit_loss(gate_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the gate's (stay, leave) logits ``[..., 2]`` with bool ``targets`` ``[...]``, True where the
    token may leave, in nats per token."""
    logits, classes = _at_least_fp32(gate_logits).reshape(-1, 2), targets.reshape(-1).long()
    return F.cross_entropy(logits, classes, reduction="sum") / max(len(classes), 1)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean(values: Tensor) -> Tensor:
    """The mean over all; 0, still on the graph, over none: each process has a gradient for the others."""
    return values.sum() / max(values.numel(), 1)
