"""Losses: tensors in, one number out.

`divergence`    KL(teacher || student) of each token, what every trained part is judged by
`distillation`  its mean
`budget`        pull of the mean share of work to the target capacity
`z_loss`        keeps router scores small
`entropy`       pushes router decisions away from 50/50
`exit_loss`     cross-entropy of an exit gate against `exit_targets`

A ``mask`` is bool and says which tokens count: a token outside it changes neither the loss nor a gradient,
whatever it holds, NaN included. The mean over an empty mask is 0, with gradient 0. Half-precision input is
computed in fp32, fp64 in fp64, and the loss has that dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hat_lib.config import HatError

# Logits that `distillation` handles at a time. On CPU its three fp32 tensors of this size, 0.5 MB each, stay in a
# core's L2 cache; elsewhere few and large kernels matter more.
CPU_TILE, GPU_TILE = 1 << 17, 1 << 25


def distillation(teacher: Tensor, student: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `divergence` over tokens: KL(teacher || student) in nats per token, one number, fp32 or fp64.

    Args:
        teacher, student: as for `divergence`.
        mask: bool ``[...]``, tokens that count; None counts all.
    """
    each = divergence(teacher, student, mask)
    counted = each.numel() if mask is None else int(_full_mask(mask, each.shape).sum())
    return each.sum() / max(counted, 1)


def divergence(teacher: Tensor, student: Tensor, mask: Tensor | None = None) -> Tensor:
    """``sum_v p_v (log p_v - log q_v)`` of each token, with p = softmax(teacher), q = softmax(student).

    KL(teacher || student) in nats (Hinton et al. 2015, arXiv:1503.02531, at temperature 1), >= 0 up to rounding.
    Its gradient, ``q - p``, is found in the same pass, a few rows at a time, so that the only full-size tensor kept
    for the backward is that difference, in the student's dtype.

    Args:
        teacher: finite logits ``[..., V]``; they get no gradient.
        student: finite logits of the same shape; the two dtypes may differ.
        mask: bool ``[...]``; tokens outside it are not read, their divergence and gradient are 0.

    Returns:
        ``[...]``, fp32 or fp64.
    """
    _check_alike(teacher, student)
    shape = student.shape[:-1]
    mask = _full_mask(mask, shape)
    teacher, student = (logits.reshape(-1, logits.shape[-1]) for logits in (teacher, student))
    rows = torch.arange(len(student), device=student.device) if mask is None else mask.reshape(-1).nonzero().view(-1)
    return _Divergence.apply(teacher, student, rows).view(shape)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher, student, rows):
        dtype = torch.promote_types(torch.promote_types(teacher.dtype, student.dtype), torch.float32)
        difference = torch.zeros_like(student) if ctx.needs_input_grad[1] else None
        each = torch.zeros(len(student), dtype=dtype, device=student.device)
        for part in rows.split(_tile(student)):
            log_q = student.index_select(0, part).to(dtype).log_softmax(-1)
            log_ratio = teacher.index_select(0, part).to(dtype).log_softmax(-1)
            p = log_ratio.exp()
            each[part] = log_ratio.sub_(log_q).mul_(p).sum(-1)
            if difference is not None:
                difference.index_copy_(0, part, log_q.exp_().sub_(p).to(student.dtype))
        ctx.save_for_backward(difference)
        return each

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Scaled here, not in the difference: p / tokens of a rare token would underflow in fp16.
        (difference,) = ctx.saved_tensors
        scaled = torch.empty_like(difference)
        for out, part, factor in zip(*(t.split(_tile(difference)) for t in (scaled, difference, grad)), strict=True):
            out.copy_(part * factor[:, None])
        return None, scaled, None


def _tile(logits: Tensor) -> int:
    """Rows to handle at a time."""
    return max(1, (CPU_TILE if logits.device.type == "cpu" else GPU_TILE) // logits.shape[1])


def budget(share: Tensor, target: float | Tensor) -> Tensor:
    """``|share - target|``: the distance of the executed share of work from the requested capacity, both in [0, 1].

    Args:
        share: the GLOBAL mean share, a scalar with gradient. Only the mean is pulled, so that layers and tokens
            are free to find their own shares under it.
        target: the capacity.
    """
    if share.dim():
        raise HatError(f"share must be one number, the global mean, got shape {list(share.shape)}")
    return (share - target).abs()


def z_loss(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """``mean (log(exp(s/2) + exp(-s/2)))^2``: router z-loss (Zoph et al. 2022, arXiv:2202.08906, eq. 5).

    A router with one logit s decides like a softmax over (s, 0), or over any shift of that pair: we take the
    centred (s/2, -s/2), since on (s, 0) the loss falls as s goes to minus infinity and would reward skipping.
    Least at s = 0, with value (log 2)^2.

    Args:
        scores: router logits, any shape, in the units in which ``sigmoid(score)`` is the chance to keep.
        mask: bool, of that shape or of its last axes (``[B, T]`` for ``[L, B, T]``).
    """
    a = _select(scores, mask).abs()  # the loss is the same for s and -s, and so is its rounding
    return _mean((F.softplus(-a) + a / 2).square())


def entropy(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """``mean H(sigmoid(s))``, the entropy of the keep decision in nats, in [0, log 2]; minimised, so that
    decisions move away from 50/50 and a hard threshold changes little (Grandvalet & Bengio 2004).

    ``H = softplus(-a) + a * sigmoid(-a)`` with a = |s|: the same for s and -s, and no difference of large numbers.
    Arguments as for `z_loss`.
    """
    a = _select(scores, mask).abs()
    return _mean(F.softplus(-a) + a * torch.sigmoid(-a))


def exit_targets(teacher: Tensor, exited: Tensor) -> Tensor:
    """Which tokens may leave: where the exit's most likely next token is the teacher's.

    Logits ``[..., V]`` of both, after the final norm and head; bool ``[...]``.
    """
    _check_alike(teacher, exited)
    return teacher.argmax(-1) == exited.argmax(-1)


def exit_loss(gate_logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of the gate's (stay, leave) logits with "may leave", nats per token.

    Args:
        gate_logits: ``[..., 2]``.
        targets: bool ``[...]``, True to leave (`exit_targets`).
        mask: bool ``[...]``, tokens that count (real, alive and not protected).
    """
    if gate_logits.shape != (*targets.shape, 2) or targets.dtype != torch.bool:
        got = f"{list(gate_logits.shape)} for {targets.dtype} {list(targets.shape)}"
        raise HatError(f"gate_logits must be [..., 2] for bool targets [...], got {got}")
    mask = _full_mask(mask, targets.shape)
    if mask is not None:
        gate_logits, targets = gate_logits[mask], targets[mask]
    logits, classes = _at_least_fp32(gate_logits).reshape(-1, 2), targets.reshape(-1).long()
    return F.cross_entropy(logits, classes, reduction="sum") / max(len(classes), 1)


def _full_mask(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """``mask`` expanded to ``shape``, of which it may lack leading axes."""
    if mask is None:
        return None
    # A mask of 0 and 1, such as a tokenizer's, would index rows 0 and 1 instead of selecting.
    if mask.dtype != torch.bool or mask.shape != shape[max(len(shape) - mask.dim(), 0) :]:
        raise HatError(f"mask must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    return mask.expand(shape)


def _select(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The scores that count, ``[n]``, fp32 or fp64. Left out rather than multiplied by 0, which would keep NaN."""
    mask = _full_mask(mask, scores.shape)
    return _at_least_fp32(scores.reshape(-1) if mask is None else scores[mask])


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.numel(), 1)


def _check_alike(teacher: Tensor, other: Tensor) -> None:
    if teacher.shape != other.shape:
        raise HatError(f"both logits must have one shape, got {list(teacher.shape)} and {list(other.shape)}")
