"""Policies: where the decisions of a forward come from; the method's own are `Threshold` and `ExitThresholds`.

Controls go through the same code, so that they differ from the method only in their decisions. A policy keeps no state
between calls: any number of threads may use the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hat_lib.config import HatError
from hat_lib.decoding.row_memory import remember, remembered
from hat_lib.method.grain import Grain
from hat_lib.method.trace import Masks, Trace


class MaskedInput(NamedTuple):
    """What a policy may return instead of a mask in training: ``x * keep [n, C]``, with its own gradient, and ``keep``,
    bool, protected tokens included."""

    x: Tensor
    keep: Tensor


class Policy(Protocol):
    """Decides what work runs."""

    def __call__(self, layer: int, site: str, x: Tensor, rows: Tensor | None, state: Trace) -> Tensor | None:
        """For the ``n`` rows in ``rows`` (indices into B*T; None for all), what to keep: bool ``[n, units]``, or
        ``[n]`` for the whole FFN; None for everything."""


class ExitPolicy(Protocol):
    """Decides which tokens leave after ``depth`` layers."""

    def exits(self, depth: int, h: Tensor, rows: Tensor, state: Trace) -> Tensor | None:
        """``h [n, D]``, the states of the running ``rows`` -> bool ``[n]``; None if none leaves."""


class Threshold:
    """The method: score > threshold, on the routers' scores, with thresholds by (layer, site); at "token", the strength
    of token sensitivity, 1 if there is none."""

    def __init__(self, grain: Grain, routers: nn.ModuleDict, thresholds: dict[tuple[int, str], float]):
        self.grain, self.routers, self.thresholds = grain, routers, thresholds

    def __call__(self, layer, site, x, rows, state):
        state.sensitivity = self.thresholds.get((layer, "token"), 1.0)
        return self.grain.keep(self.routers, layer, site, x, self.thresholds[layer, site], state)


class ExitThresholds:
    """The method: a token leaves at the first exit whose gate scores it above the gate's threshold."""

    def __init__(self, gates: nn.ModuleDict, thresholds: Sequence[float]):
        self.gates, self.thresholds = gates, dict(zip(gates, thresholds, strict=True))

    def exits(self, depth, h, rows, state):
        return self.gates[str(depth)].score(h) > self.thresholds[str(depth)]


def check_decision(keep: object, shape: tuple[int, ...], where: str) -> None:
    """Raise `HatError` unless a policy's answer for ``where`` is bool of this shape; or, in training, zeros and ones
    that carry a gradient."""
    tensor = isinstance(keep, Tensor)
    hard = tensor and (keep.dtype == torch.bool or keep.requires_grad and bool(((keep == 0) | (keep == 1)).all()))
    if not hard or keep.shape != shape:
        given = f"{keep.dtype} {list(keep.shape)}" if tensor else type(keep).__name__
        raise HatError(f"{where}: a policy must decide by a bool tensor {list(shape)} or None, got {given}")


class KeepAll:
    """The dense model through the adaptive code."""

    def __call__(self, layer, site, x, rows, state):
        return None


class Forced:
    """Decisions recorded earlier or made by hand; positions count from the start of the cache."""

    def __init__(self, masks: Masks):
        self.masks = masks

    def check(self, state: Trace) -> None:
        """Raise `HatError` unless each mask is of a site, has the forward's sequences and reaches its last token."""
        masks, end = self.masks, state.start + state.tokens
        units = {place: state.mask_shapes.get(place[1]) for place in masks.keep} | dict.fromkeys(masks.exits, ())
        for place, mask in (masks.keep | masks.exits).items():
            if len(mask) != state.batch or mask.shape[1] < end or mask.shape[2:] != units[place]:
                expected = f"[{state.batch}, >= {end}], units {units[place]}"
                raise HatError(f"the forced mask of {place!r} must be {expected}, got {list(mask.shape)}")

    def __call__(self, layer, site, x, rows, state):
        return self._rows(self.masks.keep.get((layer, site)), rows, state)

    def exits(self, depth, h, rows, state):
        return self._rows(self.masks.exits.get(depth), rows, state)

    def _rows(self, mask: Tensor | None, rows: Tensor | None, state: Trace) -> Tensor | None:
        if mask is None:
            return None
        window = mask[:, state.start : state.start + state.tokens].flatten(0, 1)
        return window if rows is None else window[rows]


class Random:
    """Control: keep each unit with probability ``share``, by a hash of (seed, layer, site, unit, `prefixes`): the same
    in decode as in a parallel forward, alone as in a batch, and another one in every text."""

    def __init__(self, share: float, seed: int = 0):
        self.share, self.seed = share, seed

    def __call__(self, layer, site, x, rows, state):
        text = state.prefix.flatten()
        text = text if rows is None else text[rows]
        salt = _mix(torch.tensor(hash((self.seed, layer)) ^ sum(map(ord, site)), device=x.device))
        shape = state.mask_shapes.get(site, ())  # without units, one draw a row
        units = text[:, None] + torch.arange(*shape, device=x.device) if shape else text
        uniform = (_mix(_mix(units) + salt) >> 11).double() / 2**52
        return uniform.abs() < self.share


class Static:
    """Control: the same choice for every token. ``keep[layer, site]`` is bool ``[units]``, or ``[]`` (FFN)."""

    def __init__(self, keep: dict[tuple[int, str], Tensor]):
        self.keep = keep

    def __call__(self, layer, site, x, rows, state):
        mask = self.keep.get((layer, site))
        return None if mask is None else mask.to(x.device).expand(x.shape[0], *mask.shape)


def prefixes(tokens: Tensor, state: Trace, cache: Cache | None) -> Tensor:
    """A hash of each token and all before it in its document, int64 ``[B, T]``, the same however a text is padded,
    batched or split. ``tokens`` are ids, or zeros where only embeddings are known. Hashes are kept with the cache, by
    row, and go along with its rows; tokens that the engine ran are left out."""
    before = remembered(cache, "prefixes", state.position.new_zeros(state.batch, state.start))
    each = torch.where(state.real, _mix(_mix(tokens) + state.position), 0)
    sums = before[:, -1:].sum(1, keepdim=True) + each.cumsum(1)
    first = torch.where(state.real & (state.position == 0), torch.arange(state.tokens, device=sums.device), -1)
    first = first.cummax(1).values  # where the document of each token begins; -1 for before this forward
    found = sums - torch.where(first < 0, 0, (sums - each).gather(1, first.clamp(min=0)))
    if cache is not None:
        remember(cache, "prefixes", torch.cat([before, found], dim=1))
    return found


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele et al. 2014) on int64, wrapping; a well-spread integer hash."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor  # masked: a logical shift of signed integers
    return z
