"""Decoder: the engine of one base. Takes a few tokens and a cache, returns their logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hat_lib.engine import team
from hat_lib.engine.cache import room_for
from hat_lib.engine.kernels import LEAVES
from hat_lib.engine.step import FFN, PIECE, Decisions, Rows, Scratch, decode_step
from hat_lib.engine.weights import pack, widths

ROWS = 8
"""tokens at a time, at most"""


class Decoder:
    """Runs `decode_step` on a base.

    Args:
        lm: a `LlamaForCausalLM` on the CPU, in float32 or bfloat16; its products' weights are copied.
        form: of the copy, "base", "int8" or "q4".
        corrections, strength, preview: as for `pack`.
    """

    def __init__(self, lm, form: str = "base", corrections=None, *, strength: float = 1.0, preview: bool = False):
        self.lm, self.weights = lm, pack(lm, form, corrections, strength=strength, preview=preview)
        self.size, self.dtype = lm.config.head_dim, lm.dtype
        self.inputs, self.outputs = widths(lm)
        self.channels = np.array(self.inputs)[:, None, None]
        """inputs of each product, ``[4, 1, 1]``"""
        self._scratch: dict[tuple[int, int], Scratch] = {}
        self._angles = np.zeros((2, 0, self.size // 2), np.float32)

    def everything(self) -> Decisions:
        """Decisions of the dense model."""
        w, z = self.weights, lambda *shape: np.zeros(shape, np.float32)
        layers, d = w.norms.shape[1:]
        cuts = [np.full((layers, c), -1, np.float32) for c in self.inputs]
        return Decisions(
            *cuts, z(layers, 0), z(layers), z(layers, 0), z(layers, 1),
            z(0, 0, d), z(0, d, 0), z(0, d), np.full(layers, -1),
            z(0, d), z(0, 1), z(0, d), z(0, d), z(0, 0, d), z(0, d, 0), z(0), np.float32(0),
        )  # fmt: skip

    def step(
        self,
        ids: np.ndarray,
        cache: Cache,
        decide: Decisions,
        *,
        position: np.ndarray,
        first: np.ndarray,
        protected: np.ndarray,
        scale: np.ndarray | None = None,
        read: np.ndarray | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """Run ``B * T <= 8`` tokens; their keys and values are appended to the cache.

        Args:
            ids: int64 ``[B, T]``.
            position, protected: int64 and bool ``[B, T]``; positions are those of the rotary embedding.
            first: int64 ``[B]``: the first position in the cache that a sequence sees.
            scale: float32 ``[B * T]``, factor on all cuts of each token; None for 1.
            read: int64 ``[B, N]``, or of another shape: which of the ``B * T`` tokens are asked for their logits; no
                more than there are, and None for all.
            threads: at most this many, and no more than there are cores; None for as many as torch uses.

        Returns logits ``[B, N, V]`` in the base's dtype; channels kept at each product, int64 ``[L, 5, B, T]``; layers
        run, int64 ``[B, T]``; and, for a gated head, the channels and logits that it read, int64 ``[2, B, N]``.
        """
        w, (b, t), n = self.weights, ids.shape, cache.get_seq_length()
        room = room_for(cache, b, w.kv_heads, self.size, self.dtype, t)
        threads = max(1, min(threads or torch.get_num_threads(), team.cores()))
        scratch = self._room(threads, b * t, room.size)
        # Copies: to numba, an array of one number with the strides of what it was sliced from has another type.
        cos, sin = self._rotary(position.flatten())
        layers = len(w.qkv)
        read = np.arange(b * t).reshape(b, t) if read is None else read
        logits = np.empty((read.size, len(w.head)), room.arrays[0].dtype)
        rows = Rows(
            ids=ids.flatten(),
            sequence=np.arange(b).repeat(t),
            slot=np.tile(np.arange(n, n + t), b),
            first=first.repeat(t),
            protected=protected.flatten(),
            scale=np.ones(b * t, np.float32) if scale is None else scale.flatten(),
            cos=cos,
            sin=sin,
            keys=room.arrays[0],
            values=room.arrays[1],
            kept=np.zeros((threads, layers, FFN + 1, b * t), np.int32),
            exits=np.empty(b * t, np.int64),
            head=np.zeros((threads, 2, read.size), np.int32),
            read=read.flatten(),
            logits=logits,
        )
        team.run(decode_step, (w, decide, rows, scratch), threads)
        room.length = n + t
        logits = torch.from_numpy(logits.reshape(*read.shape, len(w.head))).view(self.dtype)
        kept, head = rows.kept.sum(0).reshape(layers, FFN + 1, b, t), rows.head.sum(0).reshape(2, *read.shape)
        return logits, kept, rows.exits.reshape(b, t), head

    def _rotary(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin ``[R, h/2]`` of the base's own rotary embedding, rounded as it rounds them."""
        if position.max() >= self._angles.shape[1]:
            length = 2 * int(position.max()) + 256
            with torch.no_grad():
                some = torch.zeros(1, 1, 1, dtype=self.dtype)
                tables = self.lm.model.rotary_emb(some, torch.arange(length)[None])
            self._angles = torch.stack([a[0, :, : self.size // 2].float() for a in tables]).numpy()
        return self._angles[0, position], self._angles[1, position]

    def _room(self, threads: int, rows: int, length: int) -> Scratch:
        known = self._scratch.get((threads, rows))
        if known is not None and known.places.shape[1] >= length + 8:
            return known
        (qkv, d, gate_up, _), z = self.outputs, lambda *shape: np.zeros(shape, np.float32)
        mixed, widest, w = self.inputs[1], max(self.inputs) + 8 * LEAVES, self.weights
        group = w.heads // w.kv_heads
        self._scratch[threads, rows] = Scratch(
            h=z(threads, rows, d),
            x=z(threads, rows, d),
            qkv=z(rows, qkv),
            mixed=z(rows, mixed),
            leaves=z(2, LEAVES, rows, d),
            gate_up=z(rows, gate_up),
            ffn=z(rows, self.inputs[3]),
            index=np.zeros((threads, widest), np.uint64),
            picked=z(threads, rows, widest),
            ends=np.zeros((threads, LEAVES), np.int64),
            words=np.zeros((threads, PIECE), np.int64),
            queries=z(threads, group, self.size),
            scores=z(threads, group, length + 8),
            places=np.arange(length + 8, dtype=np.uint64)[None].repeat(threads, 0),
            scale=z(threads, rows),
            rows=np.zeros((threads, 5, rows), bool),
            unused=np.zeros((threads, rows), np.int32),
            small=z(threads, 4096),
            preview=z(rows, w.preview.shape[1]),
            best=z(threads, rows),
        )
        return self._scratch[threads, rows]
