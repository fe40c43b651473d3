"""What is trained: routers score how much a token needs a computation, exit gates whether it is finished.

All scores are fp32, and the decision is always ``score > threshold``, per token: it reads neither the future nor the
rest of the batch. Channel scores are thresholded activation sparsity as in TEAL (Liu et al. 2024, arXiv:2408.14690) and
CATS (arXiv:2404.08763), weighted by the column norm as in WINA (arXiv:2505.19427).
"""

import torch
import torch.nn.functional as F
from accelerate.utils.modeling import align_module_device
from torch import Tensor, nn

SENSITIVITY_LIMIT = 3.0  # of a sensitivity, either way: no text called for more


class MoERouter(nn.Module):
    """A linear score per token, ``s = w.x + b``, ``[n, D] -> [n]`` fp32; the name is the published one. Token grain:
    whether the FFN runs. Channel grain: the token's sensitivity, measured (`hat_lib.calibration.token_sensitivity`)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def score(self, x: Tensor) -> Tensor:
        # A sum over the last axis, not a matmul: a row rounds the same alone and in a batch.
        return (x.float() * self.weight).sum(-1) + self.bias

    def keep(self, x: Tensor, threshold: float) -> Tensor:
        """bool ``[n]``."""
        return self.score(x) > threshold

    @torch.no_grad()
    def threshold_scale(self, x: Tensor, strength: float = 1.0) -> Tensor:
        """``exp(-strength * s)``, by which a row's thresholds are multiplied in the channel grain, fp32 ``[n, 1]``."""
        return (self.score(x) * -strength).clamp(-SENSITIVITY_LIMIT, SENSITIVITY_LIMIT).exp()[:, None]


class ChannelRouter(nn.Module):
    """Channel grain: ``s_i = |x_i| * ||W[:, i]||``, the norm of what input channel i of a linear layer would add to its
    output, times a learned scale; ``[n, C] -> [n, C]`` fp32. ``column_norm`` belongs to the base and is not saved."""

    def __init__(self, column_norm: Tensor):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros_like(column_norm))
        self.register_buffer("column_norm", column_norm, persistent=False)

    def score(self, x: Tensor, threshold_scale: Tensor | None = None) -> Tensor:
        """``threshold_scale [n, 1]`` is each token's own, from `MoERouter.threshold_scale`."""
        score = x.float().abs() * (self.column_norm * self.log_scale.exp())
        return score if threshold_scale is None else score / threshold_scale

    def channel_thresholds(self, threshold: float) -> Tensor:
        """The magnitude above which a channel is kept, fp32 ``[C]``."""
        return threshold / (self.column_norm * self.log_scale.exp())

    @torch.no_grad()
    def keep(self, x: Tensor, threshold: float, threshold_scale: Tensor | None = None) -> Tensor:
        """bool ``[n, C]``, compared in fp32, so that a row decides the same in any batch."""
        magnitude = self.channel_thresholds(threshold)
        return x.abs() > (magnitude if threshold_scale is None else magnitude * threshold_scale)


class ExitGate(nn.Module):
    """One exit: ``score [n, D] -> [n]`` fp32, and ``translate [n, D] -> [n, D]`` in the input's dtype.

    The score is the leave logit minus the stay logit of a linear layer on ``n = h / rms(h)``. The head cannot read an
    early state as it is, so a leaving one is translated (as by the tuned lens, Belrose et al. 2023, arXiv:2303.08112):
    ``h + |h| (a * n + U V n + b)``; the length ``|h|`` makes one learning rate fit every depth. Untrained, the score is
    0 and the translator is the identity.
    """

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.gate = nn.Linear(hidden_size, 2)
        self.scale = nn.Parameter(torch.zeros(hidden_size))
        self.shift = nn.Parameter(torch.zeros(hidden_size))
        self.reduce = nn.Linear(hidden_size, rank, bias=False)
        self.expand = nn.Linear(rank, hidden_size, bias=False)
        for parameter in (self.gate.weight, self.gate.bias, self.expand.weight):
            nn.init.zeros_(parameter)

    def logits(self, h: Tensor) -> Tensor:
        """``[n, D] -> [n, 2]`` fp32: (stay, leave)."""
        return (_norm(h)[:, None, :] * self.gate.weight).sum(-1) + self.gate.bias

    def score(self, h: Tensor) -> Tensor:
        stay, leave = self.logits(h).unbind(-1)
        return leave - stay

    def translate(self, h: Tensor) -> Tensor:
        n = _norm(h)
        change = self.scale * n + self.expand(self.reduce(n)) + self.shift
        length = torch.linalg.vector_norm(h.float(), dim=-1, keepdim=True)
        return h + (length * change).to(h.dtype)


def _norm(h: Tensor) -> Tensor:
    return F.rms_norm(h.float(), h.shape[-1:])


def column_norm(*linears: nn.Module) -> Tensor:
    """``||W[:, i]||`` of input channel i over all outputs of linear layers, fp32 ``[C]``; never 0."""
    parts = []
    for linear in linears:
        with align_module_device(linear):  # in slices: a whole matrix of a large base in fp32 would waste memory
            parts += [rows.float().norm(dim=0) for rows in linear.weight.detach().split(1024)]
    return torch.stack(parts).norm(dim=0).clamp(min=1e-12)
