"""Decoder: the engine of one base. Takes a few tokens and a cache, returns their logits or the tokens that follow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hat_lib.base.families import head_size
from hat_lib.engine import team
from hat_lib.engine.arrays import FFN, GREEDY, MAX_TOKENS, PARTIALS, Choice, Course, Rows, Shared
from hat_lib.engine.attention import PIECE
from hat_lib.engine.cache import buffer_for
from hat_lib.engine.loop import OUTSIDE, UNDRAWN, decode
from hat_lib.engine.weights import pack, widths
from hat_lib.method.thresholds import Thresholds


class Place(NamedTuple):
    """Where the tokens of a step are; ``B`` sequences of ``T`` tokens."""

    position: np.ndarray
    """of the rotary embedding, int64 ``[B, T]``"""
    first: np.ndarray
    """the first position in the cache that a sequence sees, int64 ``[B]``"""
    protected: np.ndarray
    """bool ``[B, T]``"""


class Steering(NamedTuple):
    """Thresholds that move during a course of tokens (`hat_lib.decoding.steering`)."""

    offset: np.ndarray
    """of each sequence, float32 ``[B]``; moved"""
    gain: float
    asked: float
    limit: float
    shares: np.ndarray
    """work that one channel of each product stands for, of all in a layer, float32 ``[4]``"""


class Result(NamedTuple):
    """What some tokens ran, ``T`` of each of ``B`` sequences."""

    logits: Tensor | None
    """``[B, N, V]`` in the base's dtype"""
    kept: np.ndarray
    """channels kept at each product, and 1 where the FFN ran, int32 ``[L, 5, B, T]``"""
    exits: np.ndarray
    """layers run, int64 ``[B, T]``"""
    head: np.ndarray
    """with a shortlist, the channels and logits that the head read, int32 ``[2, B, N]``"""
    ids: np.ndarray | None = None
    """the token chosen after each, int64 ``[B, T]``"""
    offsets: np.ndarray | None = None
    """of steering, after each, float32 ``[B, T]``"""


STILL = Steering(np.zeros(MAX_TOKENS, np.float32), 0.0, 0.0, 0.0, np.zeros(FFN, np.float32))


class Decoder:
    """Runs `decode` on a base; the arguments are those of `hat_lib.engine.weights.pack`."""

    def __init__(self, lm, form: str = "base", **parts):
        self.lm, self.weights = lm, pack(lm, form, **parts)
        self.head_dim, self.dtype = head_size(lm.config), lm.dtype
        self.inputs, self.outputs = widths(lm)
        self.channels = np.array(self.inputs)[:, None, None]
        """inputs of each product, ``[4, 1, 1]``"""
        self.dense = Thresholds.dense(len(self.weights.rotates), FFN, len(self.weights.gates.bias))
        self._angles = np.zeros((2, 0, self.head_dim // 2), np.float32)

    def step(
        self,
        ids: np.ndarray,
        cache: Cache,
        thresholds: Thresholds,
        place: Place,
        *,
        scale: np.ndarray | None = None,
        logit_rows: np.ndarray | None = None,
        threads: int | None = None,
    ) -> Result:
        """Run ``B * T <= 8`` tokens; their keys and values are appended to the cache.

        Args:
            ids: int64 ``[B, T]``.
            scale: float32 ``[B * T]``, factor on all thresholds of each token; None for 1.
            logit_rows: int64 ``[B, N]``, or of another shape: which of the ``B * T`` tokens are asked for their
                logits; no more than there are, and None for all.
            threads: at most this many, and no more than there are cores; None for as many as torch uses.
        """
        (b, t), vocabulary = ids.shape, len(self.weights.head)
        if logit_rows is None:
            logit_rows = np.arange(b * t).reshape(b, t)
        rows, course = self._run(
            ids, cache, thresholds, place, scale, logit_rows, threads, 1, GREEDY, STILL, choose=False
        )
        kept, head = course.kept[0].sum(0), course.head[0].sum(0)
        kept, head = kept.reshape(-1, FFN + 1, b, t), head.reshape(2, *logit_rows.shape)
        return Result(
            self._logits(rows.logits, (*logit_rows.shape, vocabulary)), kept, course.exits.reshape(b, t), head
        )

    def course(
        self,
        ids: np.ndarray,
        cache: Cache,
        thresholds: Thresholds,
        place: Place,
        steps: int,
        choice: Choice,
        *,
        unprotected: np.ndarray,
        steering: Steering = STILL,
        ended: np.ndarray | None = None,
        logits: bool = False,
        threads: int | None = None,
    ) -> Result:
        """Run a token of each sequence, and those that follow it, up to ``steps`` or until all texts have ended.

        Args:
            ids: int64 ``[B, 1]``, with its ``place``.
            choice: how tokens are chosen; ``uniform`` has a row for each step, and ``seen`` is brought up to date.
            unprotected: int64 ``[B]``, the step from which a sequence's tokens are no longer protected.
            ended: bool ``[B]``, texts that have ended before; brought up to date.
            logits: whether to return all logits.
        """
        b, every = len(ids), np.arange(len(ids))[:, None]
        _, course = self._run(
            ids, cache, thresholds, place, np.exp(steering.offset[:b]), every, threads, steps, choice, steering,
            unprotected=unprotected, ended=ended, logits=logits,
        )  # fmt: skip
        ran = int(course.ran[0])
        wanted = self._logits(course.logits[:ran].swapaxes(0, 1), (b, ran, -1)) if logits else None
        by_sequence = (
            course.kept[:ran].sum(1).transpose(1, 2, 3, 0),
            course.exits[:ran].T,
            course.head[:ran].sum(1).transpose(1, 2, 0),
        )
        return Result(wanted, *by_sequence, course.ids[:ran].T, course.offsets[:ran].T)

    def _run(
        self, ids, cache, thresholds, place, scale, logit_rows, threads, steps, choice, steering, *,
        choose=True, unprotected=None, ended=None, logits=False,
    ) -> tuple[Rows, Course]:  # fmt: skip
        w, (b, t), start = self.weights, ids.shape, cache.get_seq_length()
        layers, vocabulary, n = w.norms.shape[1], len(w.head), logit_rows.size
        buffer = buffer_for(cache, b, w.kv_heads, self.head_dim, self.dtype, max(t, steps))
        threads = team.size(threads or torch.get_num_threads())
        cos, sin = self._rotary(int(place.position.max()) + steps)
        # Flattened copies: to numba, an array of one number with the strides of a slice has another type.
        rows = Rows(
            ids=ids.flatten(),
            sequence=np.arange(b).repeat(t),
            slot=np.tile(np.arange(start, start + t), b),
            first=place.first.repeat(t),
            position=place.position.flatten(),
            protected=place.protected.flatten(),
            scale=np.ones(b * t, np.float32) if scale is None else scale.flatten(),
            logit_rows=logit_rows.flatten(),
            cos=cos,
            sin=sin,
            keys=buffer.keys,
            values=buffer.values,
            logits=np.empty((n, vocabulary), buffer.keys.dtype),
        )
        course = Course(
            steps=steps,
            choice=choice,
            unprotected=np.zeros(b, np.int64) if unprotected is None else unprotected,
            gain=np.float32(steering.gain),
            asked=np.float32(steering.asked),
            limit=np.float32(steering.limit),
            shares=steering.shares,
            offset=steering.offset,
            ended=np.zeros(b, bool) if ended is None else ended,
            ids=np.zeros((steps if choose else 0, b), np.int64),
            offsets=_zeros(steps if choose else 0, b),
            kept=np.zeros((steps, threads, layers, FFN + 1, b * t), np.int32),
            exits=np.empty((steps, b * t), np.int64),
            head=np.zeros((steps, threads, 2, n), np.int32),
            logits=np.empty((steps if logits else 0, n, vocabulary), buffer.keys.dtype),
            ran=np.zeros(1, np.int64),
        )
        pieces = -(-(start + max(t, steps)) // PIECE)
        args = w, thresholds, rows, self._shared(threads, b * t, pieces), course
        while not team.run(decode, args, threads) and course.ran[0] >= 0:
            course.kept[course.ran[0] :] = course.head[course.ran[0] :] = 0  # of the step that was called off
        if course.ran[0] == OUTSIDE:
            token = next(token for token in rows.ids if not 0 <= token < len(w.embed))
            raise IndexError(f"token id {token} is not in the vocabulary of {len(w.embed)} tokens")
        if course.ran[0] == UNDRAWN:
            raise RuntimeError("no token can be drawn: there is NaN or infinity among the logits")
        for layer in cache.layers:
            layer.length = start + (int(course.ran[0]) if choose else t)
        return rows, course

    def _logits(self, stored: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(stored.reshape(shape)).view(self.dtype)

    def _rotary(self, positions: int) -> np.ndarray:
        """cos and sin ``[2, positions or more, h/2]`` of the base's own rotary embedding, rounded as it rounds them."""
        if positions > self._angles.shape[1]:
            with torch.no_grad():
                like = torch.zeros(1, 1, 1, dtype=self.dtype)
                tables = self.lm.model.rotary_emb(like, torch.arange(2 * positions + 256)[None])
            self._angles = torch.stack([a[0, :, : self.head_dim // 2].float() for a in tables]).numpy()
        return self._angles

    def _shared(self, threads: int, rows: int, pieces: int) -> Shared:
        w, (d, _, _, ffn), (qkv, _, gate_up, _) = self.weights, self.inputs, self.outputs
        shape = rows, pieces, w.heads
        return Shared(
            qkv=_empty(PARTIALS, rows, qkv),
            states=_empty(2, PARTIALS, rows, d),
            lowered=_empty(4, PARTIALS, rows, w.qkv.reduce.shape[1]),
            gate_up=_empty(rows, gate_up),
            ffn=_empty(rows, ffn),
            tops=_empty(*shape),
            totals=_empty(*shape),
            pieces=_empty(*shape, self.head_dim),
            preview=_empty(rows, w.preview.shape[1]),
            best=_empty(threads, rows),
            likeliest=np.empty((threads, rows), np.int64),
        )


def _empty(*shape: int) -> np.ndarray:
    return np.empty(shape, np.float32)


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)
