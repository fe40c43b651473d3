"""Losses, and hard decisions with a soft gradient: functions of tensors, some with a gradient worked out by hand.

Losses go from tensors of the tokens that count to one number. The mean over no tokens is 0, with gradient 0.
Half-precision input is computed in fp32, fp64 in fp64, and the loss has that dtype.

A comparison has no gradient. In training the forward keeps the hard decision, so that training sees what inference
runs, and the backward differentiates a sigmoid or softmax in its place: straight-through (Bengio et al. 2013,
arXiv:1308.3432). Noise on the logits makes the decision a sample: Gumbel-softmax (Jang et al. 2017, arXiv:1611.01144)
or, with two classes, whose two Gumbel variables differ by a logistic one, Concrete (Maddison et al. 2017,
arXiv:1611.00712).
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_SLICE, GPU_SLICE = 1 << 17, 1 << 25  # elements computed at a time where gradients are worked out by hand


def mean(values: Tensor) -> Tensor:
    """The mean over all; 0, still on the graph, over none: each process has a gradient for the others."""
    return values.sum() / max(values.numel(), 1)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of each token in nats (Hinton et al. 2015, arXiv:1503.02531, at temperature 1): finite
    logits ``[..., V]``, whose dtypes may differ, to ``[...]``, fp32 or fp64. ``teacher`` gets no gradient.

    The gradient, ``softmax(student) - softmax(teacher)``, is computed in the same pass, a few rows at a time: autograd
    would go through several tensors of the logits' size.
    """
    width = student.shape[-1]
    teacher, logits = teacher.reshape(-1, width), student.reshape(-1, width)
    with torch.no_grad():
        slope, kl = torch.empty_like(logits), _at_least_fp32(logits[:, 0]).clone()
        for rows in _row_slices(logits):
            log_p, log_q = (_at_least_fp32(part[rows]).log_softmax(-1) for part in (teacher, logits))
            p = log_p.exp()
            kl[rows] = log_p.sub_(log_q).mul_(p).sum(-1)
            slope[rows] = log_q.exp_().sub_(p).to(slope.dtype)
    inner = torch.linalg.vecdot(slope, logits)  # its value cancels, its gradient stays
    return (kl + (inner - inner.detach())).view(student.shape[:-1])


def z_loss(scores: Tensor) -> Tensor:
    """``mean (log(exp(s/2) + exp(-s/2)))^2``: router z-loss (Zoph et al. 2022, arXiv:2202.08906, eq. 5), at least
    (log 2)^2, for scores of any shape of which ``sigmoid(score)`` is the probability of keeping.

    Its logits are the centred (s/2, -s/2): with (s, 0), which decide alike, low scores and so skipping would pay.
    """
    a = _at_least_fp32(scores).abs()  # so that the loss is the same for s and -s, rounding included
    return mean((F.softplus(-a) + a / 2).square())


def entropy(scores: Tensor) -> Tensor:
    """``mean H(sigmoid(s))``, the entropy of the keep decision in nats, in [0, log 2]; ``scores`` as for `z_loss`.
    Minimised, so that decisions move away from 50/50 and a hard threshold changes little (Grandvalet & Bengio 2004)."""
    a = _at_least_fp32(scores).abs()
    return mean(F.softplus(-a) + a * torch.sigmoid(-a))


def exit_loss(gate_logits: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy of the gate's (stay, leave) logits ``[..., 2]``, in nats per token. Leaving is ``right``, bool
    ``[...]``, where the exit's most likely next token is the base's."""
    logits, classes = _at_least_fp32(gate_logits).reshape(-1, 2), right.reshape(-1).long()
    return F.cross_entropy(logits, classes, reduction="sum") / max(len(classes), 1)


def straight_through(
    logit: Tensor, *, temperature: float = 1.0, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Hard keep decision: 1 where ``logit + noise * g > 0``, else 0, with g standard logistic, in the logit's dtype.

    Gradient: that of ``sigmoid((logit + noise * g) / temperature)``, so a smaller ``temperature`` gives one to a
    narrower band. ``generator``, on the logit's device, draws g; without noise nothing is drawn.
    """
    if noise != 0:
        # rand lies in [0, 1); at 0 the noise is -inf: a certain 0, with gradient 0.
        uniform = torch.rand(logit.shape, generator=generator, device=logit.device)
        logit = logit + noise * uniform.logit_().to(logit.dtype)
    return _hard_forward(logit > 0, torch.sigmoid(logit / temperature))


def decoupled_gumbel_softmax(
    logits: Tensor, *, forward_temperature: float, backward_temperature: float, generator: torch.Generator
) -> Tensor:
    """One-hot sample of ``softmax(logits / tau_f)``: ``argmax(logits / tau_f + g)``, with g standard Gumbel.

    Gradient: that of ``softmax(logits / tau_b + g)``, with the same g (Shah et al. 2024, arXiv:2410.13331): tau_f sets
    how random the sample is, tau_b how the gradient spreads over the classes. ``logits`` are ``[..., classes]``, like
    the result; ``generator``, on their device, draws g.
    """
    # -log(exponential) is Gumbel; an exponential of 0 would give +inf, which softmax turns into NaN.
    exponential = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
    g = exponential.clamp_(min=torch.finfo(exponential.dtype).tiny).log_().neg_().to(logits.dtype)
    winner = (logits.detach() / forward_temperature + g).argmax(-1, keepdim=True)
    hard = torch.zeros_like(logits, requires_grad=False).scatter_(-1, winner, 1)
    return _hard_forward(hard, torch.softmax(logits / backward_temperature + g, dim=-1))


def masked_channels(
    x: Tensor, log_scale: Tensor, threshold: Tensor, *, temperature: float, protected: Tensor, real: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Zero the channels of ``x [n, C]`` at or below a threshold, fp32 ``[n, C]``: ``keep = |x| > threshold``.

    The soft stand-in for the decision is ``sigmoid(log(|x| / threshold) / temperature)``. Only the learned ``log_scale
    [C]``, whose value is in the threshold already, gets its gradient, from the output and from the share. ``x`` gets
    ``grad * keep``: the decision's own dependence on x would send the relaxation's error through the frozen base into
    every router below. Rows that are ``protected``, bool ``[n]``, keep everything and give no gradient to
    ``log_scale``; only ``real`` ones, bool ``[n]``, count for the share.

    Returns ``x * keep`` in x's dtype; ``keep``; and the kept share of the channels, a fp32 scalar with gradient.
    """
    with torch.no_grad():
        keep = (x.abs() > threshold) | protected[:, None]
        slopes = torch.zeros_like(log_scale)  # their sum over the real rows
        steps = torch.empty_like(x)  # by how much the output grows with the log-scale: slope * x
        for rows in _row_slices(x):
            value = x[rows].to(threshold.dtype)
            ratio = value.abs() / threshold[rows].clamp(min=torch.finfo(threshold.dtype).tiny)
            soft = ratio.log_().div_(temperature).sigmoid_()
            slope = soft.addcmul_(soft, soft, value=-1).div_(temperature).masked_fill_(protected[rows, None], 0)
            slopes.addmv_(slope.T, real[rows].to(slope.dtype))  # in place, which autocast leaves alone
            steps[rows] = slope.mul_(value).to(x.dtype)
        count = max(real.sum() * x.shape[1], 1)
        share = keep[real].sum() / count
    nothing = log_scale - log_scale.detach()  # 0, but for its gradient
    return torch.addcmul(x * keep, steps, nothing.to(x.dtype)), keep, share + (slopes / count * nothing).sum()


def seeded(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator on ``device`` with the same numbers in every process for the same key, a few integers such as (seed,
    step, sample index), and unrelated ones for another."""
    digest = hashlib.sha256(",".join(str(int(k)) for k in key).encode()).digest()
    # CPU generators use 32 bits of a seed, CUDA ones all 64.
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))


def _row_slices(x: Tensor) -> list[slice]:
    """Slices of the rows of ``[n, C]``: on CPU, three fp32 tensors of a slice stay in a core's L2 cache."""
    size = max(1, (CPU_SLICE if x.device.type == "cpu" else GPU_SLICE) // x.shape[-1])
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _hard_forward(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, exactly, and the gradient of ``soft``."""
    return hard + (soft - soft.detach())
