"""What is remembered with a KV cache, by row: it goes along with whatever transformers does to the cache's rows."""

from __future__ import annotations

import functools

from torch import Tensor
from transformers.cache_utils import Cache


def remember(cache: Cache, name: str, values: Tensor) -> None:
    """Keep ``values [B, T]`` of all tokens in a cache, by row: it becomes one of a subclass of its class, ``plain``, in
    which what changes rows and length changes these, too."""
    if not isinstance(cache, _Remembering):
        cache.__class__ = _remembering(type(cache))
        cache.hat_memory = {}
    cache.hat_memory[name] = values


def remembered(cache: Cache | None, name: str, empty: Tensor) -> Tensor:
    """``empty [B, T]`` filled with what a cache remembers of its first T tokens; after the last of which something is
    known, its value is repeated."""
    known = cache.hat_memory.get(name) if isinstance(cache, _Remembering) else None
    if known is not None and len(known) == len(empty) and (n := min(known.shape[1], empty.shape[1])):
        empty[:, :n], empty[:, n:] = known[:, :n], known[:, n - 1 : n]
    return empty


@functools.cache
def _remembering(plain: type) -> type:
    return type(plain.__name__, (_Remembering, plain), {"plain": plain})


def _empty(plain: type) -> Cache:
    return object.__new__(_remembering(plain))


class _Remembering:
    def _change(self, change) -> None:
        self.hat_memory = {name: change(known) for name, known in self.hat_memory.items()}

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._change(lambda known: known[beam_idx.to(known.device)])

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        indices = indices.cpu() if isinstance(indices, Tensor) else indices
        self._change(lambda known: known[indices])

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._change(lambda known: known.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        self._change(lambda known: known[:, : self.get_seq_length()])

    def reset(self):
        super().reset()
        self.hat_memory = {}

    def __reduce_ex__(self, protocol):  # the class is not found by its name
        return _empty, (self.plain,), vars(self)
