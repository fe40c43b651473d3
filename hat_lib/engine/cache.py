"""Keys and values that grow in place, behind transformers' cache.

A `DynamicLayer` is copied whole for each token that is appended. Here all layers of a cache share two arrays that
double in length when they are full; what transformers sees of a layer are views of the part in use. So a cache may be
cropped, continued, copied and reordered, on this path or on any other. A view that somebody has taken never changes:
after a crop its part is not written to again.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

MIN_SIZE = 128


class KeyValueBuffer:
    """``keys`` and ``values [L, B, G, size, h]`` of all layers of a cache; bfloat16 as its bits, uint16."""

    def __init__(self, layers: int, form: tuple, size: int):
        (batch, heads, head_dim, self.dtype), self.form, self.size = form, form, size
        shape = (layers, batch, heads, size, head_dim)
        stored = torch.uint16 if self.dtype == torch.bfloat16 else torch.float32
        # By torch: numpy asks for huge pages, whose first strided copy takes ten times as long on some machines.
        self.keys, self.values = (torch.empty(shape, dtype=stored).numpy() for _ in range(2))
        self.shown = False
        """whether somebody may hold a view"""

    def view(self, name: str, layer: int, length: int) -> Tensor:
        """The first tokens of a layer, ``[B, G, length, h]``."""
        return torch.from_numpy(getattr(self, name)[layer, :, :, :length]).view(self.dtype)


class GrowingLayer(DynamicLayer):
    """One layer of a cache: the first ``length`` tokens of the shared buffer.

    Other tensors that transformers assigns, such as reordered beams, are kept outside the buffer (``length`` is then
    None) until the next `buffer_for`.
    """

    def __init__(self, buffer: KeyValueBuffer, index: int, length: int):
        self.buffer, self.index, self.length = buffer, index, None
        self._outside: dict[str, Tensor | None] = {}
        super().__init__()  # which assigns keys and values
        self.length, self.dtype, self.device, self.is_initialized = length, buffer.dtype, torch.device("cpu"), True

    def _get(self, name: str) -> Tensor | None:
        if self.length is None:
            return self._outside[name]
        self.buffer.shown = True
        return self.buffer.view(name, self.index, self.length)

    def _set(self, name: str, value: Tensor | None) -> None:
        if self.length is not None:  # the other of the two stays as it is
            self._outside = {"keys": self.keys, "values": self.values}
            self.length = None
        self._outside = self._outside | {name: value}

    keys = property(lambda self: self._get("keys"), lambda self, value: self._set("keys", value))
    values = property(lambda self: self._get("values"), lambda self, value: self._set("values", value))

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.length is None else self.length

    def crop(self, tokens_to_remove: int) -> None:
        if self.length is None or tokens_to_remove >= 0 or self.buffer.shown:
            super().crop(tokens_to_remove)
        else:
            self.length = max(0, self.length + tokens_to_remove)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append tokens from the reference path, in place while they fit."""
        start, count = self.get_seq_length(), key_states.shape[-2]
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        fits = self.length is not None and start + count <= self.buffer.size
        if recorded or not fits or _form(key_states) != self.buffer.form:
            return super().update(key_states, value_states, *args, **kwargs)
        self.length = start + count
        keys, values = (self.buffer.view(name, self.index, self.length) for name in ("keys", "values"))
        keys[:, :, start:], values[:, :, start:] = key_states, value_states
        return keys, values


def _form(keys: Tensor) -> tuple:
    return (*keys.shape[:2], keys.shape[-1], keys.dtype)


def holds(cache: Cache, form: tuple) -> bool:
    """Whether all layers of a cache hold equally many keys and values, of this batch, heads, their size and dtype."""
    held = {(form, cache.get_seq_length())}
    for layer in cache.layers:
        if type(layer) is GrowingLayer and layer.length is not None:
            held.add((layer.buffer.form, layer.length))
        elif layer.is_initialized:
            held |= {(_form(t), t.shape[-2]) for t in (layer.keys, layer.values)}
        else:
            held.add((form, 0))
    return len(held) == 1


def buffer_for(cache: Cache, form: tuple, more: int) -> KeyValueBuffer:
    """The buffer of a cache of this form, as for `holds`, with space for ``more`` tokens; its layers become
    `GrowingLayer` if they are not yet."""
    layers, length = cache.layers, cache.get_seq_length()
    if all(type(layer) is GrowingLayer for layer in layers):
        buffer, places = layers[0].buffer, [(layer.buffer, layer.index, layer.length) for layer in layers]
        fits = buffer.form == form and length + more <= buffer.size
        if fits and places == [(buffer, i, length) for i in range(len(layers))]:
            return buffer
    buffer = KeyValueBuffer(len(layers), form, max(MIN_SIZE, 2 * (length + more)))
    for i in range(len(layers) if length else 0):
        buffer.view("keys", i, length).copy_(layers[i].keys)
        buffer.view("values", i, length).copy_(layers[i].values)
    layers[:] = [GrowingLayer(buffer, i, length) for i in range(len(layers))]
    return buffer
