"""Policies: where the decision of a site comes from.

The method's own is `Threshold`. KeepAll, forced, random, a static choice go through the same code, so that a
control differs from the method in nothing but its decisions.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hat_lib.model.routers import token_threshold_scale
from hat_lib.model.token_state import Masks, TokenState


class Gated(NamedTuple):
    """What a policy in training may answer in place of a mask: its own product, with its own gradient."""

    x: Tensor
    """``x * keep``, ``[n, C]``"""
    keep: Tensor
    """bool ``[n, C]``, protected tokens included"""


class Policy(Protocol):
    """Decides for the ``n`` rows in ``rows`` (indices into B*T; None means all of them)."""

    def __call__(self, layer: int, site: str, x: Tensor, rows: Tensor | None, state: TokenState) -> Tensor | None:
        """bool ``[n, C]`` (channel) or ``[n]`` (token) to keep; None keeps everything."""


class KeepAll:
    """The dense model through the adaptive code."""

    def __call__(self, layer, site, x, rows, state):
        return None


class Threshold:
    """The method: score > threshold.

    Args:
        routers: a model's, by ``"{layer}_{site}"`` and, for the need of its tokens, ``"{layer}_token"``.
    """

    def __init__(self, routers: nn.ModuleDict):
        self.routers = routers
        # Where no need was measured, nobody is asked.
        self.needs = any(bool(r.weight.any()) for name, r in routers.items() if name.endswith("_token"))

    def __call__(self, layer, site, x, rows, state):
        router = self.routers[f"{layer}_{site}"]
        if not self.needs:
            return router.keep(x)
        return router.keep(x, token_threshold_scale(self.routers[f"{layer}_token"], site, x, state))


class Forced:
    """Decisions recorded before, or made by hand; positions count from the start of the cache."""

    def __init__(self, masks: Masks):
        self.masks = masks

    def __call__(self, layer, site, x, rows, state):
        mask = self.masks.keep.get((layer, site))
        return None if mask is None else self._rows(mask, rows, state)

    def exits(self, exit_index: int, rows: Tensor | None, state: TokenState) -> Tensor | None:
        mask = self.masks.exits.get(exit_index)
        return None if mask is None else self._rows(mask, rows, state)

    @staticmethod
    def _rows(mask: Tensor, rows: Tensor | None, state: TokenState) -> Tensor:
        window = mask[:, state.start : state.start + state.tokens].flatten(0, 1)
        return window if rows is None else window[rows]


class Random:
    """Control: keep each unit with probability ``share``, independent of the token's content.

    The draw is a hash of (seed, layer, site, position, channel), so decode and parallel forward, and a
    row alone and in a batch, draw alike.
    """

    def __init__(self, share: float, seed: int = 0):
        self.share, self.seed = share, seed

    def __call__(self, layer, site, x, rows, state):
        position = state.position.flatten()
        position = position if rows is None else position[rows]
        salt = _mix(torch.tensor(hash((self.seed, layer)) ^ sum(map(ord, site)), device=x.device))
        units = position if site == "ffn" else position[:, None] * x.shape[-1] + torch.arange(x.shape[-1]).to(x.device)
        uniform = (_mix(_mix(units) + salt) >> 11).double() / 2**52
        return uniform.abs() < self.share


class Static:
    """Control: the same choice for every token. ``keep[layer, site]`` is bool ``[C]``, or ``[]`` (token)."""

    def __init__(self, keep: dict[tuple[int, str], Tensor]):
        self.keep = keep

    def __call__(self, layer, site, x, rows, state):
        mask = self.keep.get((layer, site))
        return None if mask is None else mask.to(x.device).expand(x.shape[0], *mask.shape)


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele et al. 2014) on int64, wrapping; a well-spread integer hash."""
    shift = lambda v, n: (v >> n) & ((1 << (64 - n)) - 1)  # noqa: E731 - logical shift on signed integers
    z = (z ^ shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shift(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ shift(z, 31)
