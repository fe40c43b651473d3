"""Keys and values with room to grow, behind transformers' cache.

A `DynamicLayer` is copied whole for each token that is appended. Here all layers of a cache share two arrays that
double in length whenever they are full; the ``keys`` and ``values`` that transformers sees of a layer are views of the
part that is in use. So a cache may be cropped, continued, copied and reordered, on this path or on any other.
"""

from __future__ import annotations

from functools import cached_property
from itertools import repeat
from operator import is_

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from hat_lib.engine.weights import as_numpy

LEAST_ROOM = 128


class Room:
    """``keys`` and ``values [L, B, G, room, h]`` of all layers of a cache."""

    def __init__(self, layers: int, batch: int, heads: int, room: int, size: int, dtype: torch.dtype):
        shape = (layers, batch, heads, room, size)
        with torch.inference_mode(False):  # else nothing outside inference mode could write to them
            self.keys, self.values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

        self.length, self.apart = 0, False
        """tokens that its layers show, and whether one of them may show something else"""

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, as views of the same memory."""
        return as_numpy(self.keys), as_numpy(self.values)

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "arrays"}  # a copy makes arrays of its own memory

    @property
    def size(self) -> int:
        return self.keys.shape[3]


class GrowingLayer(DynamicLayer):
    """One layer of a cache: the first ``room.length`` tokens of the room that all layers share.

    ``keys`` and ``values`` are what transformers reads and assigns. As long as it assigns the beginning of what it
    read, as `crop` does, the layer stays in its room; other tensors, such as reordered beams, are kept outside until
    the next `room_for`.
    """

    def __init__(self, room: Room, index: int):
        super().__init__()
        self.room, self.index = room, index
        self.dtype, self.device, self.is_initialized = room.keys.dtype, room.keys.device, True
        self._held: dict[str, int | Tensor | None] = {}
        """what it shows instead, as keys or values: this many tokens of the room, or a tensor outside it"""

    def _read(self, name: str) -> Tensor | None:
        held = self._held.get(name, self.room.length)
        return getattr(self.room, name)[self.index, :, :, :held] if isinstance(held, int) else held

    def _assign(self, name: str, value: Tensor | None) -> None:
        if "_held" not in vars(self):  # by the base class, before there is anything
            return
        own = getattr(self.room, name)[self.index]
        ours = value is not None and value.data_ptr() == own.data_ptr() and value.stride() == own.stride()
        self._held[name] = value.shape[2] if ours and value.shape[:2] == own.shape[:2] else value
        self.room.apart = True

    keys = property(lambda self: self._read("keys"), lambda self, value: self._assign("keys", value))
    values = property(lambda self: self._read("values"), lambda self, value: self._assign("values", value))

    @property
    def shown(self) -> int | None:
        """How many tokens of the room it shows; None while transformers has put other tensors here."""
        keys, values = (self._held.get(name, self.room.length) for name in ("keys", "values"))
        return keys if isinstance(keys, int) and keys == values else None

    def get_seq_length(self) -> int:
        return super().get_seq_length() if (shown := self.shown) is None else shown

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append tokens from the reference path, in place while there is room."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if recorded or self.shown is None or end > self.room.size or len(key_states) != self.room.keys.shape[1]:
            return super().update(key_states, value_states, *args, **kwargs)
        self._held, self.room.apart = {"keys": end, "values": end}, True  # until the next step the others lag behind
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values


def room_for(cache: Cache, batch: int, heads: int, size: int, dtype: torch.dtype, more: int) -> Room:
    """The arrays of a cache, with room for ``more`` tokens; its layers become `GrowingLayer` if they are not yet."""
    layers, length = cache.layers, cache.get_seq_length()
    first = layers[0]
    room = getattr(first, "room", None)
    ours = room is not None and all(map(is_, map(getattr, layers, repeat("room"), repeat(None)), repeat(room)))
    if ours and length + more <= room.size:
        if room.apart and all(layer.shown == length for layer in layers):
            room.length, room.apart = length, False
            for layer in layers:
                layer._held = {}
        if not room.apart:
            return room
    room = Room(len(layers), batch, heads, max(LEAST_ROOM, 2 * (length + more)), size, dtype)
    if length:
        for i, layer in enumerate(layers):
            room.keys[i, :, :, :length], room.values[i, :, :, :length] = layer.keys, layer.values
    room.length, layers[:] = length, [GrowingLayer(room, i) for i in range(len(layers))]
    return room
