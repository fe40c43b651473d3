"""What controls decide by: random draws, and the same choice for every token."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hat_lib.decoding.row_memory import remember, remembered
from hat_lib.method.trace import Trace

_PREFIXES: WeakKeyDictionary[Trace, Tensor] = WeakKeyDictionary()


class Random:
    """Keep each unit with probability ``share``, by a hash of (seed, layer, site, unit, `prefixes`): the same in decode
    as in a parallel forward, alone as in a batch, and another one in every text."""

    def __init__(self, share: float, seed: int = 0):
        self.share, self.seed = share, seed

    def __call__(self, layer, site, x, rows, trace):
        text = prefixes(trace).flatten()
        text = text if rows is None else text[rows]
        salt = _mix(torch.tensor(hash((self.seed, layer)) ^ sum(map(ord, site)), device=x.device))
        shape = trace.mask_shapes.get(site, ())  # without units, one draw a row
        units = text[:, None] + torch.arange(*shape, device=x.device) if shape else text
        uniform = (_mix(_mix(units) + salt) >> 11).double() / 2**52
        return uniform.abs() < self.share


class Static:
    """The same choice for every token. ``keep[layer, site]`` is bool ``[units]``, or ``[]`` (FFN)."""

    def __init__(self, keep: dict[tuple[int, str], Tensor]):
        self.keep = keep

    def __call__(self, layer, site, x, rows, trace):
        mask = self.keep.get((layer, site))
        return None if mask is None else mask.to(x.device).expand(x.shape[0], *mask.shape)


def prefixes(trace: Trace) -> Tensor:
    """A hash of each token and all before it in its document, int64 ``[B, T]``, the same however a text is padded,
    batched or split; kept with the cache, by row."""
    if trace in _PREFIXES:
        return _PREFIXES[trace]
    tokens, cache = trace.text
    before = remembered(cache, "prefixes", trace.position.new_zeros(trace.batch, trace.start))
    each = torch.where(trace.real, _mix(_mix(tokens) + trace.position), 0)
    sums = before[:, -1:].sum(1, keepdim=True) + each.cumsum(1)
    first = torch.where(trace.real & (trace.position == 0), torch.arange(trace.tokens, device=sums.device), -1)
    first = first.cummax(1).values  # where the document of each token begins; -1 for before this forward
    found = sums - torch.where(first < 0, 0, (sums - each).gather(1, first.clamp(min=0)))
    if cache is not None:
        remember(cache, "prefixes", torch.cat([before, found], dim=1))
    _PREFIXES[trace] = found
    return found


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele et al. 2014) on int64, wrapping; a well-spread integer hash."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor  # masked: a logical shift of signed integers
    return z
