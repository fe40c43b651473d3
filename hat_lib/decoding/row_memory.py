"""What is remembered with a KV cache, by row: it goes along with whatever transformers does to the cache's rows."""

import functools
from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import Cache

CHANGES = {
    "reorder_cache": lambda cache, known, rows: known[rows.to(known.device)],
    "batch_select_indices": lambda cache, known, rows: known[rows.cpu() if isinstance(rows, Tensor) else rows],
    "batch_repeat_interleave": lambda cache, known, repeats: known.repeat_interleave(repeats, 0),
    "crop": lambda cache, known, count: known[:, : cache.get_seq_length()],
    "reset": lambda cache, known: known[:, :0],
}
"""methods of a cache that change rows or length -> what they make of ``known [B, T]``"""


def remember(cache: Cache, name: str, values: Tensor) -> None:
    """Keep ``values [B, T]`` of all tokens in a cache, by row: its class becomes a subclass of what it was, ``plain``,
    whose `CHANGES` change these, too."""
    if not hasattr(cache, "hat_memory"):
        cache.__class__, cache.hat_memory = _remembering(type(cache)), {}
    cache.hat_memory[name] = values


def remembered(cache: Cache | None, name: str, empty: Tensor) -> Tensor:
    """``empty [B, T]`` filled with what a cache remembers of its first T tokens; after the last of which something is
    known, its value is repeated."""
    known = getattr(cache, "hat_memory", {}).get(name)
    if known is not None and len(known) == len(empty) and (n := min(known.shape[1], empty.shape[1])):
        empty[:, :n], empty[:, n:] = known[:, :n], known[:, n - 1 : n]
    return empty


@functools.cache
def _remembering(plain: type) -> type:
    def changing(name: str, change: Callable) -> Callable:
        def run(self, *args, **named):
            getattr(plain, name)(self, *args, **named)
            self.hat_memory = {k: change(self, known, *args, *named.values()) for k, known in self.hat_memory.items()}

        return run

    methods = {name: changing(name, change) for name, change in CHANGES.items()}
    # Not to be found by its name, so pickled by what it was made of.
    methods["__reduce_ex__"] = lambda self, protocol: (_empty, (plain,), vars(self))
    return type(plain.__name__, (plain,), {"plain": plain, **methods})


def _empty(plain: type) -> Cache:
    return object.__new__(_remembering(plain))
