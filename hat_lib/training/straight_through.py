"""Straight-through: train a hard decision with a soft gradient.

Routers and exit gates decide by a comparison, which has no gradient. During training the forward keeps the hard
decision, so that training sees what inference runs, and the backward differentiates a sigmoid or softmax in its place
(Bengio et al. 2013, arXiv:1308.3432). Noise on the logits turns the decision into a sample: Gumbel-softmax (Jang et al.
2017, arXiv:1611.01144), or Concrete (Maddison et al. 2017, arXiv:1611.00712). With two classes, the difference of two
Gumbel variables is a logistic variable.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements the backward handles at a time on CPU: its working tensors, about 1 MB, then stay in a core's L2 cache.
CPU_TILE = 100_000


def straight_through(
    logit: Tensor, *, temperature: float = 1.0, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Hard keep decision: 1 where ``logit + noise * g > 0``, else 0, with g standard logistic.

    Gradient: that of ``sigmoid((logit + noise * g) / temperature)``. Binary Concrete (Maddison et al. 2017,
    appendix B), straight-through.

    Args:
        logit: ``[...]`` floating point; the result has its shape and dtype.
        temperature: > 0, in units of the logit; the smaller it is, the narrower the band that gets a gradient.
        noise: scale of g, >= 0. At 0 nothing is drawn and the decision is deterministic.
        generator: source of g, on the logit's device.
    """
    if noise != 0:
        # rand lies in [0, 1); at 0 the noise is -inf: a certain 0, with gradient 0.
        uniform = torch.rand(logit.shape, generator=generator, device=logit.device)
        logit = logit + noise * uniform.logit_().to(logit.dtype)
    return _hard_forward(logit > 0, torch.sigmoid(logit / temperature))


def decoupled_gumbel_softmax(
    logits: Tensor, *, forward_temperature: float, backward_temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """One-hot sample of ``softmax(logits / tau_f)``: ``argmax(logits / tau_f + g)``, with g standard Gumbel.

    Gradient: that of ``softmax(logits / tau_b + g)``, with the same g. Straight-through Gumbel-softmax with separate
    temperatures for the forward and the backward pass (Shah et al. 2024, arXiv:2410.13331): tau_f sets how random the
    sample is, tau_b how the gradient spreads over the classes. Each divides the logits before the noise is added: in
    ``argmax((logits + g) / tau_f)`` tau_f would have no effect. Ties go to the first class.

    Args:
        logits: ``[..., classes]`` floating point; the result has its shape and dtype.
        forward_temperature, backward_temperature: tau_f and tau_b, > 0, in units of the logits.
        generator: source of g, on the logits' device.
    """
    # -log(exponential) is Gumbel; an exponential of 0 would give +inf, which softmax turns into NaN.
    exponential = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
    g = exponential.clamp_(min=torch.finfo(exponential.dtype).tiny).log_().neg_().to(logits.dtype)
    winner = (logits.detach() / forward_temperature + g).argmax(-1, keepdim=True)
    hard = torch.zeros_like(logits, requires_grad=False).scatter_(-1, winner, 1)
    return _hard_forward(hard, torch.softmax(logits / backward_temperature + g, dim=-1))


def channel_gate(
    x: Tensor, log_scale: Tensor, cut: Tensor, *, temperature: float, threshold_scale: Tensor, protected: Tensor,
    counted: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Zero the input channels whose score is at or below the threshold: ``keep = |x| > cut``.

    The score of channel i is ``|x_i| * norm_i * exp(log_scale_i)``; dividing the threshold by the last two factors
    gives ``cut``. With ``r = |x| / cut``, the soft stand-in for the decision is ``sigmoid(log(r) / temperature)``: a
    log-score against a log-threshold, so that a channel's magnitude does not set how far its gradient reaches.

    ``x`` gets ``grad * keep``: the decision's own dependence on x would send the relaxation's error through the frozen
    base into every router below. Only ``log_scale`` gets the soft gradient, from the output and from the count.

    Args:
        x: ``[n, C]``, any floating dtype.
        log_scale: the learned parameter ``[C]``.
        cut: threshold / (norm * exp(log_scale)) ``[C]``, fp32, computed without gradient; -inf keeps everything.
            Where it is not positive, the decision is certain and the gradient is 0.
        temperature: > 0, in units of the log-score.
        threshold_scale: ``[n, 1]`` fp32, by which each row's cuts are multiplied; without gradient.
        protected: bool ``[n]``, rows that keep everything and give no gradient to ``log_scale``.
        counted: bool ``[n]``, rows included in the count: those that are real and have not exited.

    Returns:
        ``x * keep`` in x's dtype; ``keep``, bool ``[n, C]`` (no gradient); and the number of counted rows that keep
        each channel, fp32 ``[C]``: the hard number, with the soft decision's gradient.
    """
    return _ChannelGate.apply(x, log_scale, cut, temperature, threshold_scale, protected, counted)


def seeded(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator on ``device`` seeded by the integers in ``key``, such as (seed, step, sample index).

    The same key gives the same numbers in every process and Python version; keys that differ anywhere, or in length,
    give unrelated ones.
    """
    digest = hashlib.sha256(",".join(str(int(k)) for k in key).encode()).digest()
    # CPU generators use 32 bits of a seed, CUDA ones all 64.
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))


class _ChannelGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_scale, cut, temperature, threshold_scale, protected, counted):
        keep = (x.abs() > cut * threshold_scale) | protected[:, None]  # in fp32, as in use
        ctx.save_for_backward(x, keep, cut, threshold_scale, protected, counted)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(keep)
        return x * keep, keep, keep[counted].sum(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _, grad_count):
        x, keep, cut, threshold_scale, protected, counted = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else grad
        grad_x, grad_scale = grad * keep if ctx.needs_input_grad[0] else None, None
        if ctx.needs_input_grad[1]:
            rows = ~protected, ~protected & counted
            through_x, through_count = _slope_sums(x, cut, ctx.temperature, grad, threshold_scale, *rows)
            grad_scale = through_x if grad_count is None else through_x.addcmul_(through_count, grad_count)
        return grad_x, grad_scale, None, None, None, None, None


def _slope_sums(x, cut, temperature, grad, threshold_scale, x_rows, count_rows) -> tuple[Tensor, Tensor]:
    """Sums of ``slope * x * grad`` over the rows in ``x_rows``, and of ``slope`` over those in ``count_rows``: two
    ``[C]``.

    The slope is the derivative of ``sigmoid(u / T)`` with respect to ``u = log r``: with ``p = 1 / (1 + r^(1/T))`` it
    is ``p (1 - p) / T``, finite for every r in [0, inf].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A cut of -inf or 0 has no ratio: r = 0 everywhere, and the slope is 0.
    inverse = torch.where(cut > 0, 1 / cut, 0).to(dtype).clamp_(max=torch.finfo(dtype).max)
    x_rows, count_rows = x_rows.to(dtype), count_rows.to(dtype)
    through_x, through_count = torch.zeros((2, x.shape[1]), dtype=dtype, device=x.device)
    tile = max(1, CPU_TILE // x.shape[1] if x.device.type == "cpu" else len(x))
    for start in range(0, len(x), tile):
        rows = slice(start, start + tile)
        values = x[rows].to(dtype)
        p = values.abs().mul_(inverse).div_(threshold_scale[rows].to(dtype))
        p.log_().mul_(-1 / temperature).sigmoid_()
        slope = p.addcmul_(p, p, value=-1)
        # In place, so that autocast leaves these matrix-vector products alone.
        through_count.addmv_(slope.T, count_rows[rows])
        through_x.addmv_(slope.mul_(values).mul_(grad[rows].to(dtype)).T, x_rows[rows])
    return through_x.div_(temperature), through_count.div_(temperature)


def _hard_forward(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, exactly, and the gradient of ``soft``."""
    return hard + (soft - soft.detach())
