"""Decoder: the engine of one base. Takes a few tokens and a cache, returns their logits or the tokens that follow."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from hat_lib.base.families import head_size
from hat_lib.engine import team
from hat_lib.engine.arrays import FFN, GREEDY, PARTIALS, STILL, Choice, Course, Rows, Shared, Steering
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


class Decoder:
    """Runs `decode` on a base; the arguments are those of `hat_lib.engine.weights.pack`."""

    def __init__(self, lm, form: str = "base", **parts):
        self.lm, self.weights = lm, pack(lm, form, **parts)
        self.head_dim, self.dtype = head_size(lm.config), lm.dtype
        self.stored = np.uint16 if lm.dtype == torch.bfloat16 else np.float32
        self.inputs, self.outputs = widths(lm)
        self.channels = np.array(self.inputs)[:, None, None]
        """inputs of each product, ``[4, 1, 1]``"""
        self.dense = Thresholds.dense(len(self.weights.rotates), FFN, len(self.weights.gates.router))
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
        if logit_rows is None:
            logit_rows = np.arange(ids.size).reshape(ids.shape)
        scale = np.ones(ids.size, np.float32) if scale is None else scale
        return self._run(ids, cache, thresholds, place, scale, logit_rows, threads, steering=STILL, choice=GREEDY)

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
        b, scale = len(ids), np.exp(steering.offset[: len(ids)])
        return self._run(
            ids, cache, thresholds, place, scale, np.arange(b)[:, None], threads, steps=steps, choice=choice,
            steering=steering, unprotected=unprotected, ended=np.zeros(b, bool) if ended is None else ended,
            ids=np.zeros((steps, b), np.int64), offsets=np.zeros((steps, b), np.float32),
            logits=np.empty((steps if logits else 0, b, len(self.weights.head)), self.stored),
        )  # fmt: skip

    def _run(
        self, tokens, cache, thresholds, place, scale, logit_rows, threads, /, *, steering, steps: int = 1, **given
    ) -> Result:
        """Run steps; ``given`` are fields of `Course`. Where none is for ``ids``, no tokens are chosen."""
        w, (b, t), start, n = self.weights, tokens.shape, cache.get_seq_length(), logit_rows.size
        layers, end = w.norms.shape[1], start + max(t, steps)
        buffer = buffer_for(cache, (b, w.kv_heads, self.head_dim, self.dtype), end - start)
        threads = team.size(threads or torch.get_num_threads())
        # Flattened copies: to numba, an array of one number with the strides of a slice has another type.
        rows = Rows(
            ids=tokens.flatten(),
            sequence=np.arange(b).repeat(t),
            slot=np.tile(np.arange(start, start + t), b),
            first=place.first.repeat(t),
            position=place.position.flatten(),
            protected=place.protected.flatten(),
            scale=scale.flatten(),
            logit_rows=logit_rows.flatten(),
            angles=self._rotary(int(place.position.max()) + steps),
            keys=buffer.keys,
            values=buffer.values,
            logits=np.empty((n, len(w.head)), self.stored),
        )
        course = Course(**{
            "steps": steps,
            "steering": steering,
            "unprotected": np.zeros(b, np.int64),
            "ended": np.zeros(b, bool),
            "ids": np.zeros((0, b), np.int64),
            "offsets": np.zeros((0, b), np.float32),
            "kept": np.zeros((steps, threads, layers, FFN + 1, b * t), np.int32),
            "exits": np.empty((steps, b * t), np.int64),
            "head": np.zeros((steps, threads, 2, n), np.int32),
            "logits": np.empty((0, n, len(w.head)), self.stored),
            "ran": np.zeros(1, np.int64),
            **given,
        })  # fmt: skip
        args = w, thresholds, rows, self._shared(threads, b * t, -(-end // PIECE)), course
        while not team.run(decode, args, threads) and course.ran[0] >= 0:
            course.kept[course.ran[0] :] = course.head[course.ran[0] :] = 0  # of the step that was called off
        if course.ran[0] == OUTSIDE:
            token = next(token for token in rows.ids if not 0 <= token < len(w.embed))
            raise IndexError(f"token id {token} is not in the vocabulary of {len(w.embed)} tokens")
        if course.ran[0] == UNDRAWN:
            raise RuntimeError("no token can be drawn: there is NaN or infinity among the logits")
        ran, logits, shape = 1, rows.logits, logit_rows.shape
        if "ids" in given:
            ran = int(course.ran[0])
            logits, shape = course.logits[:ran].swapaxes(0, 1), (b, ran)
        for layer in cache.layers:
            layer.length = start + t * ran
        wanted = len(course.logits) or "logits" not in given
        # Of T tokens of a sequence and steps, one is one.
        return Result(
            torch.from_numpy(logits.reshape(*shape, len(w.head))).view(self.dtype) if wanted else None,
            course.kept[:ran].sum(1).transpose(1, 2, 3, 0).reshape(layers, FFN + 1, b, t * ran),
            course.exits[:ran].T.reshape(b, t * ran),
            course.head[:ran].sum(1).transpose(1, 2, 0).reshape(2, *shape),
            course.ids[:ran].T,
            course.offsets[:ran].T,
        )

    def _rotary(self, positions: int) -> np.ndarray:
        """`Rows.angles` of the base's own rotary embedding, rounded as it does; for so many positions or more."""
        angles = self._angles
        if positions >= angles.shape[1]:
            with torch.no_grad():
                like = torch.zeros(1, 1, 1, dtype=self.dtype)
                tables = self.lm.model.rotary_emb(like, torch.arange(2 * positions + 256)[None])
            cos, sin = (F.pad(a[0, :, : self.head_dim // 2].float(), (0, 0, 1, 0)) for a in tables)
            cos[0] = 1
            # Another thread's text may be shorter, and its table takes this one's place at any time.
            self._angles = angles = torch.stack([cos, sin]).numpy()
        return angles

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
            preview=_empty(rows, max(len(w.preview_scale), w.preview.shape[1])),
            candidates=np.empty((threads, len(w.head) if w.preview.size else 0), np.int64),
            best=_empty(threads, rows),
            likeliest=np.empty((threads, rows), np.int64),
        )


def _empty(*shape: int) -> np.ndarray:
    return np.empty(shape, np.float32)
