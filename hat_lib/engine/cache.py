"""Keys and values with room to grow, behind transformers' cache.

A `DynamicLayer` is copied whole for each token that is appended. Here all layers of a cache share two arrays that are
twice as long each time they are full; what transformers sees of a layer, ``keys`` and ``values``, is a view of the
part that is in use. So a cache may be cropped, continued, copied and reordered, on this path or on any other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

LEAST_ROOM = 128


class Room:
    """``keys`` and ``values [L, B, G, room, h]`` of all layers of a cache."""

    def __init__(self, layers: int, batch: int, heads: int, room: int, size: int, dtype: torch.dtype):
        shape = (layers, batch, heads, room, size)
        with torch.inference_mode(False):  # else nothing outside of inference mode could write to them
            self.keys, self.values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    @property
    def size(self) -> int:
        return self.keys.shape[3]


class GrowingLayer(DynamicLayer):
    """One layer of a cache whose keys and values are a view of the room that it shares with the others."""

    def __init__(self, room: Room, index: int, length: int):
        super().__init__()
        self.room, self.index = room, index
        self.dtype, self.device, self.is_initialized = room.keys.dtype, room.keys.device, True
        self.show(length)

    def show(self, length: int) -> None:
        """Let ``length`` tokens be seen."""
        self.keys, self.values = (a[self.index, :, :, :length] for a in (self.room.keys, self.room.values))

    @property
    def in_place(self) -> bool:
        """False once transformers has put other tensors here, as after beams were reordered."""
        if self.keys is None:
            return False
        own, seen = self.room.keys[self.index], self.keys
        return seen.data_ptr() == own.data_ptr() and seen.stride() == own.stride() and len(seen) == len(own)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append tokens of the reference path, in place while there is room."""
        start, more = self.get_seq_length(), key_states.shape[-2]
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if recorded or not self.in_place or start + more > self.room.size or len(key_states) != len(self.keys):
            return super().update(key_states, value_states, *args, **kwargs)
        self.show(start + more)
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values


def room_for(cache: Cache, batch: int, heads: int, size: int, dtype: torch.dtype, more: int) -> Room:
    """The arrays of a cache, with room for ``more`` tokens; its layers become `GrowingLayer` if they are not yet."""
    layers, length = cache.layers, cache.get_seq_length()
    first = layers[0]
    if isinstance(first, GrowingLayer):
        room = first.room
        ours = all(isinstance(a, GrowingLayer) and a.room is room and a.in_place for a in layers)
        if ours and length + more <= room.size:
            return room
    room = Room(len(layers), batch, heads, max(LEAST_ROOM, 2 * (length + more)), size, dtype)
    for i, layer in enumerate(layers):
        if length:
            room.keys[i, :, :, :length], room.values[i, :, :, :length] = layer.keys, layer.values
        layers[i] = GrowingLayer(room, i, length)
    return room
