"""Decoder: the engine of one base. Takes a few tokens and a cache, returns their logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hat_lib.engine import team
from hat_lib.engine.arrays import FFN, PARTIALS, PIECE, Decisions, Rows, Scratch
from hat_lib.engine.cache import buffer_for
from hat_lib.engine.step import decode_step
from hat_lib.engine.weights import pack, widths

MAX_TOKENS = 8
"""in one step"""


class Decoder:
    """Runs `decode_step` on a base; the arguments are those of `hat_lib.engine.weights.pack`."""

    def __init__(self, lm, form: str = "base", corrections=None, *, strength: float = 1.0, preview: bool = False):
        self.lm, self.weights = lm, pack(lm, form, corrections, strength=strength, preview=preview)
        self.head_dim, self.dtype = lm.config.head_dim, lm.dtype
        self.inputs, self.outputs = widths(lm)
        self.channels = np.array(self.inputs)[:, None, None]
        """inputs of each product, ``[4, 1, 1]``"""
        self._scratch: dict[tuple[int, int], Scratch] = {}
        self._angles = np.zeros((2, 0, self.head_dim // 2), np.float32)

    def keep_everything(self) -> Decisions:
        """Decisions of the dense model."""
        layers, d = self.weights.norms.shape[1:]
        qkv, o, gate_up, down = (np.full((layers, c), -1, np.float32) for c in self.inputs)
        return Decisions(
            qkv_threshold=qkv,
            o_threshold=o,
            gate_up_threshold=gate_up,
            down_threshold=down,
            sensitivity=_zeros(layers, 0),
            sensitivity_bias=_zeros(layers),
            ffn=_zeros(layers, 0),
            ffn_threshold=_zeros(layers, 1),
            correction_down=_zeros(0, 0, d),
            correction_up=_zeros(0, d, 0),
            correction_shift=_zeros(0, d),
            exit=np.full(layers, -1),
            gate=_zeros(0, d),
            gate_threshold=_zeros(0, 1),
            scale=_zeros(0, d),
            shift=_zeros(0, d),
            reduce=_zeros(0, 0, d),
            expand=_zeros(0, d, 0),
            head_threshold=_zeros(0),
            margin=np.float32(0),
        )

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
        logit_rows: np.ndarray | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """Run ``B * T <= 8`` tokens; their keys and values are appended to the cache.

        Args:
            ids: int64 ``[B, T]``.
            position, protected: int64 and bool ``[B, T]``; positions are those of the rotary embedding.
            first: int64 ``[B]``: the first position in the cache that a sequence sees.
            scale: float32 ``[B * T]``, factor on all thresholds of each token; None for 1.
            logit_rows: int64 ``[B, N]``, or of another shape: which of the ``B * T`` tokens are asked for their
                logits; no more than there are, and None for all.
            threads: at most this many, and no more than there are cores; None for as many as torch uses.

        Returns logits ``[B, N, V]`` in the base's dtype; channels kept at each product, int64 ``[L, 5, B, T]``; layers
        run, int64 ``[B, T]``; and, with a shortlist, the channels and logits that the head read, int64 ``[2, B, N]``.
        """
        w, (b, t), start = self.weights, ids.shape, cache.get_seq_length()
        layers, vocabulary = w.norms.shape[1], len(w.head)
        buffer = buffer_for(cache, b, w.kv_heads, self.head_dim, self.dtype, t)
        threads = max(1, min(threads or torch.get_num_threads(), team.cores()))
        cos, sin = self._rotary(position.flatten())
        if logit_rows is None:
            logit_rows = np.arange(b * t).reshape(b, t)
        # Flattened copies: to numba, an array of one number with the strides of a slice has another type.
        rows = Rows(
            ids=ids.flatten(),
            sequence=np.arange(b).repeat(t),
            slot=np.tile(np.arange(start, start + t), b),
            first=first.repeat(t),
            protected=protected.flatten(),
            scale=np.ones(b * t, np.float32) if scale is None else scale.flatten(),
            cos=cos,
            sin=sin,
            logit_rows=logit_rows.flatten(),
            keys=buffer.keys,
            values=buffer.values,
            kept=np.zeros((threads, layers, FFN + 1, b * t), np.int32),
            exits=np.empty(b * t, np.int64),
            head=np.zeros((threads, 2, logit_rows.size), np.int32),
            logits=np.empty((logit_rows.size, vocabulary), buffer.keys.dtype),
        )
        team.run(decode_step, (w, decide, rows, self._scratch_for(threads, b * t, buffer.size)), threads)
        for layer in cache.layers:
            layer.length = start + t
        logits = torch.from_numpy(rows.logits.reshape(*logit_rows.shape, vocabulary)).view(self.dtype)
        kept, head = rows.kept.sum(0).reshape(layers, FFN + 1, b, t), rows.head.sum(0).reshape(2, *logit_rows.shape)
        return logits, kept, rows.exits.reshape(b, t), head

    def _rotary(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin ``[R, h/2]`` of the base's own rotary embedding, rounded as it rounds them."""
        if position.max() >= self._angles.shape[1]:
            length = 2 * int(position.max()) + 256
            with torch.no_grad():
                like = torch.zeros(1, 1, 1, dtype=self.dtype)
                tables = self.lm.model.rotary_emb(like, torch.arange(length)[None])
            self._angles = torch.stack([a[0, :, : self.head_dim // 2].float() for a in tables]).numpy()
        return self._angles[0, position], self._angles[1, position]

    def _scratch_for(self, threads: int, rows: int, length: int) -> Scratch:
        known = self._scratch.get((threads, rows))
        if known is not None and known.positions.shape[1] >= length + 8:
            return known
        w, widest = self.weights, max(self.inputs) + 8 * PARTIALS
        d, mixed, _, ffn = self.inputs
        qkv, _, gate_up, _ = self.outputs
        queries = w.heads // w.kv_heads
        self._scratch[threads, rows] = Scratch(
            h=_zeros(threads, rows, d),
            x=_zeros(threads, rows, d),
            qkv=_zeros(rows, qkv),
            mixed=_zeros(rows, mixed),
            partials=_zeros(2, PARTIALS, rows, d),
            gate_up=_zeros(rows, gate_up),
            ffn=_zeros(rows, ffn),
            index=np.zeros((threads, widest), np.uint64),
            gathered=_zeros(threads, rows, widest),
            ends=np.zeros((threads, PARTIALS), np.int64),
            candidates=np.zeros((threads, PIECE), np.int64),
            queries=_zeros(threads, queries, self.head_dim),
            scores=_zeros(threads, queries, length + 8),
            positions=np.arange(length + 8, dtype=np.uint64)[None].repeat(threads, 0),
            scale=_zeros(threads, rows),
            flags=np.zeros((threads, 5, rows), bool),
            uncounted=np.zeros((threads, rows), np.int32),
            small=_zeros(threads, 4096),
            preview=_zeros(rows, w.preview.shape[1]),
            best=_zeros(threads, rows),
        )
        return self._scratch[threads, rows]


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)
