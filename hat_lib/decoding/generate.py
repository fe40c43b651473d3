"""What the engine runs: the tokens of ``hat.lm.generate``, and forwards inside ``with hat.engine():``.

The engine (`hat_lib.engine`) decodes up to eight tokens at a time on a CPU. Whether it may is decided once, when
``generate`` or the context begins: hooks, adapters or other forwards put on the base later are not noticed before the
next one. Greedy decoding and sampling run in a loop of their own (`hat_lib.decoding.token_loop`), all else (beams,
assistants, other logits processors, stopping criteria) in transformers', a token at a time. Everything that the engine
does not run is the reference path's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hat_lib.config import HatError
from hat_lib.decoding import obstacles, steering
from hat_lib.decoding.token_loop import TokenLoop, first_seen, one_by_one
from hat_lib.engine.arrays import DOWN, FFN, GREEDY, MAX_TOKENS, Choice, Decisions
from hat_lib.method.policies import Forced
from hat_lib.method.setting import Mode
from hat_lib.method.trace import Trace

try:
    from hat_lib.decoding.decisions import decisions, with_exits
    from hat_lib.engine.decoder import Decoder, Place, Result, Steering
    from hat_lib.engine.team import paced, size, use_torch_threads
    from hat_lib.engine.weights import packed_bytes, unfit

    UNAVAILABLE = None
except Exception as error:  # numba is missing, or does not support this Python or this CPU
    UNAVAILABLE = f"numba cannot be used here ({type(error).__name__}: {error})"

WEIGHT_FORMATS = ("base", "int8", "q4")
KEPT_DECISIONS = 32
"""of as many capacities and exit rates: entering a context at each token is then quick"""


@dataclass
class GenerateCall:
    """A call of ``generate`` under way in a thread."""

    engine: bool
    """whether the engine may run its tokens"""
    gate_prompt: bool
    """whether the prompt's tokens spend by capacity, too; else they run in full"""
    threads: int
    """torch's number of threads when it began"""
    beams: bool = False
    """whether forwards are of other rows than the texts that come out: beams, or drafts that may be rejected"""
    prefilled: bool = False
    prompt: bool = False
    """whether the prompt runs now"""
    ran: list[Trace] = field(default_factory=list)
    """states of the forwards so far, but for the prompt's"""

    def note(self, state: Trace) -> None:
        if self.prompt:
            state.covers = "prompt"
        else:
            self.ran.append(state)

    def joined(self) -> Trace | None:
        """What the new tokens ran; None if none was read."""
        if not self.ran:
            return None
        state = self.ran[-1] if self.beams else Trace.cat(self.ran)
        state.covers = "last step of generate" if self.beams else "new tokens"
        return state


class FastPath:
    """Replaces ``lm.forward`` and ``lm.generate`` of an adapted model, from `attach` to `detach`."""

    def __init__(self, hat, context):
        self.hat, self.context, self.lm = hat, context, hat.lm
        self.form = "base"
        """of the packed weights, one of `WEIGHT_FORMATS`"""
        self._decoders: dict[tuple[str, bool], Decoder] = {}
        """by form, and whether it can make a shortlist"""
        self._decisions: dict[tuple, Decisions] = {}
        self._lock = threading.Lock()
        self.never = UNAVAILABLE or obstacles.of_base(self.lm, hat.config.granularity)

    def attach(self, hooks: list[RemovableHandle]) -> None:
        """Once the model's own ``hooks`` and forwards are in place."""
        self._snapshot = obstacles.Snapshot(self.lm, self.hat.config.n_layers, hooks)
        self._reference, original, prefill = self.lm.forward, self.lm.generate, self.lm._prefill

        @functools.wraps(self._reference)  # generate reads its signature
        def forward(*args, **kwargs):
            return self.forward(*args, **kwargs)

        @functools.wraps(original)
        def generate(*args, gate_prompt=False, **kwargs):
            self.hat.refresh()
            before, threads, plain = self.context.call, torch.get_num_threads(), one_by_one(self.lm, args, kwargs)
            call = GenerateCall(self.why_not() is None, gate_prompt, threads, beams=not plain)
            if call.engine and plain:
                kwargs["custom_generate"] = TokenLoop(self, call, kwargs.get("streamer")).generate
            try:
                self.context.call = call
                return original(*args, **kwargs)
            finally:
                torch.set_num_threads(threads)
                self.context.call = before
                self.context.last = call.joined() or self.context.last

        @functools.wraps(prefill)
        def whole_prompt(*args, **kwargs):  # in chunks, if prefill_chunk_size is set
            with self.prompt():
                return prefill(*args, **kwargs)

        self.lm.forward, self.lm.generate, self.lm._prefill = forward, generate, whole_prompt

    def detach(self) -> None:
        for name in ("forward", "generate", "_prefill"):
            vars(self.lm).pop(name, None)
        self.forget()

    def forget(self) -> None:
        """Drop packed weights and decisions; they are made again when next needed. Waits for a thread that is making
        some: it would keep what it made of weights as they were."""
        with self._lock:
            self._decoders, self._decisions = {}, {}

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights, not counting the base's own memory."""
        return sum(packed_bytes(decoder.weights) for decoder in self._decoders.values())

    def unfit(self, form: str) -> str | None:
        """Why the engine cannot keep this base's weights in a form, or None."""
        return None if self.never else unfit(self.lm, form)

    def describe(self) -> str:
        """Which path decodes, in words."""
        if (why := self.why_not()) is not None:
            return f"reference path ({why})"
        threads = size(torch.get_num_threads())
        form = self.context.mode.weights or self.form
        form = str(self.lm.dtype).removeprefix("torch.") if form == "base" else form
        return f"engine ({form}, {threads} thread{'s' if threads > 1 else ''})"

    def why_not(self) -> str | None:
        """Why the engine would decode nothing, as things stand; None if it would."""
        return self.never or self._snapshot.obstacle() or obstacles.of_mode(self.context.mode, self.hat)

    def fits(self, cache: Cache | None, batch: int) -> bool:
        """Whether the engine can write so many rows to a cache."""
        return obstacles.fits(cache, self.lm, batch)

    @property
    def forced(self) -> bool:
        """Whether decisions differ from position to position."""
        return Forced in (type(self.context.mode.policy), type(self.context.mode.exits))

    def _takes(self, given: dict, mode: Mode) -> bool:
        """Whether a call of forward is one for the engine."""
        if not obstacles.takes(given, self.lm) or obstacles.of_mode(mode, self.hat) is not None:
            return False
        forced_channels = type(mode.policy) is Forced and self.hat.config.granularity == "channel"
        return not forced_channels or given["input_ids"].numel() == 1

    # -- forwards -----------------------------------------------------------------------------------

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """A context in which forwards are the prompt's of a call of generate, which runs in full unless it is to spend
        by capacity, on the reference path."""
        call = self.context.call
        if call is None or call.prompt:
            yield
            return
        call.prefilled = call.prompt = True
        if call.engine:
            use_torch_threads(paced(call.threads), call.threads)
        try:
            with nullcontext() if call.gate_prompt else self.hat.dense():
                yield
        finally:
            call.prompt = False

    def forward(self, *args, **kwargs):
        """Like `LlamaForCausalLM.forward`."""
        call, mode, given = self.context.call, self.context.mode, dict(kwargs)
        if call is not None and not call.prefilled:
            with self.prompt():
                return self._on_reference(*args, **kwargs)
        if args:
            given["input_ids"] = args[0]
        if "past_key_values" in given:  # transformers' earlier name for it
            given["cache"] = given.pop("past_key_values")
        wanted = mode.engine if call is None else call.engine and not call.prompt
        out = None
        if wanted and len(args) < 2 and self._takes(given, mode):
            out = self._step(call, mode, **{name: given.get(name) for name in obstacles.ARGUMENTS})
        if call is not None and not call.prompt:
            torch.set_num_threads(call.threads) if out is None else use_torch_threads(1, call.threads)
        return self._on_reference(*args, **kwargs) if out is None else out

    def _on_reference(self, *args, **kwargs):
        with self.context.frame() as frame:
            out = self._reference(*args, **kwargs)
        self.hat.note(frame.state, frame.mode)
        return out

    def _step(self, call, mode, input_ids, attention_mask, position_ids, cache, logits_to_keep, **_):
        """Run what the engine `_takes`; None if it cannot after all."""
        # In numpy: after a step the CPU's caches hold nothing of torch, and its operations cost several times as much.
        (b, t), start = input_ids.shape, cache.get_seq_length()
        if not start and call is None:
            self.hat.refresh()  # as the reference path does at a prompt
        first = first_seen(attention_mask, b, t, start + t)
        if first is None:
            return None
        position = np.arange(start, start + t)[None].repeat(b, 0)
        rank = position - first[:, None]
        if position_ids is not None:
            position = position_ids.numpy().repeat(b // len(position_ids), 0)
            rank = np.minimum(rank, position)
        kept = 0 if logits_to_keep is None else logits_to_keep
        kept = slice(-kept, None) if isinstance(kept, int) else np.asarray(kept)
        if (logit_rows := np.arange(b * t).reshape(b, t)[:, kept]).size > b * t:
            return None  # logits asked for twice
        protected = rank < self.hat.config.protected_tokens
        state = self._state(mode, rank, start, cache)
        decoder, decide = self._ready(mode, slice(start, start + t))
        result = decoder.step(
            input_ids.numpy(),
            cache,
            decide,
            Place(position, first, protected),
            scale=None if state.steering is None else state.steering.numpy(),
            logit_rows=logit_rows,
            threads=None if call is None else call.threads,
        )
        self._fill(state, mode, decoder, result)
        steering.move(cache, state, mode.own.layer_capacity, mode.moving)
        self.hat.note(state, mode)
        return CausalLMOutputWithPast(logits=result.logits, cache=cache)

    def course(
        self,
        ids: np.ndarray,
        cache: Cache,
        steps: int,
        choice: Choice = GREEDY,
        *,
        first: np.ndarray,
        position: np.ndarray,
        ended: np.ndarray | None = None,
        logits: bool = False,
        threads: int | None = None,
    ) -> Result:
        """Decode a token of each sequence, ``ids [B, 1]``, and those that follow it, with the decisions of the mode.

        Args:
            choice: how tokens are chosen, greedily by default.
            first, position: of each sequence, int64 ``[B]``: the first position in the cache that it sees, and the next
                one of the rotary embedding.
            ended, logits: as for `hat_lib.engine.decoder.Decoder.course`.
        """
        b, start, mode = len(ids), cache.get_seq_length(), self.context.mode
        rank = np.minimum(start - first, position)
        protected = self.hat.config.protected_tokens
        decoder, decide = self._ready(mode, slice(start, start + 1))
        shares = np.zeros(FFN, np.float32)
        if mode.moving:
            shares[:] = np.array(self.hat.site_work) / decoder.channels[:, 0, 0]
        offset = steering.offsets(cache, b, start) if mode.steer else np.zeros(b, np.float32)
        result = decoder.course(
            ids,
            cache,
            decide,
            Place(position[:, None], first, (rank < protected)[:, None]),
            steps,
            choice,
            unprotected=np.maximum(protected - rank, 0),
            steering=Steering(offset, mode.moving, mode.own.layer_capacity, steering.LIMIT, shares),
            ended=ended,
            logits=logits,
            threads=threads,
        )
        if mode.moving:
            steering.keep(cache, start, result.offsets)
        ranks = rank[:, None] + np.arange(result.exits.shape[1])
        state = self._state(mode, ranks, start, cache)
        self._fill(state, mode, decoder, result)
        self.hat.note(state, mode)
        return result

    def replay(self, ids: Tensor, cache: Cache, mask: Tensor | None) -> None:
        """See `HierarchicalTransformer.replay`."""
        (b, tokens), start = ids.shape, cache.get_seq_length()
        if not tokens:
            raise HatError(f"there must be tokens to replay, got {list(ids.shape)}")
        if mask is not None and mask.shape != (b, start + tokens):
            raise HatError(f"the mask must cover the cache, too: {[b, start + tokens]}, got {list(mask.shape)}")
        fits = ids.dtype == torch.int64 and 0 < b <= MAX_TOKENS and self.fits(cache, b)
        fits = fits and not self.forced and self.why_not() is None
        first = first_seen(mask, b, tokens, start + tokens) if fits else None
        if first is not None:
            known = ids.numpy()
            following = np.concatenate([known[:, 1:], known[:, :1]], axis=1).T.copy()  # of the last, any
            choice = GREEDY._replace(given=following)
            self.course(known[:, :1], cache, tokens, choice, first=first, position=start - first)
            return
        mode, steps = self.context.mode, []
        with self.hat.engine(), self.hat.changed(states=(steps,)):
            for t, token in enumerate(ids.split(1, dim=1), start=start + 1):
                seen = None if mask is None else mask[:, :t]
                self.lm(input_ids=token, attention_mask=seen, cache=cache, use_cache=True, logits_to_keep=1)
        self.hat.note(Trace.cat(steps), mode)

    def _state(self, mode: Mode, rank: np.ndarray, start: int, cache: Cache) -> Trace:
        real = torch.ones(rank.shape, dtype=torch.bool)
        return self.hat.new_state(mode, real, torch.from_numpy(rank), start, cache)

    def _fill(self, state: Trace, mode: Mode, decoder: Decoder, result: Result) -> None:
        """What a result says, in a state."""
        token = self.hat.config.granularity == "token"
        executed = result.kept[:, FFN:] if token else result.kept[:, : DOWN + 1] / decoder.channels
        state.executed = torch.from_numpy(executed.astype(np.float32))
        state.exit_layer = torch.from_numpy(result.exits.astype(np.int16))
        if mode.head is not None:
            vocabulary, width = decoder.weights.head.shape
            channels, candidates = result.head
            state.note_head(torch.from_numpy((channels / width + candidates / vocabulary).astype(np.float32)))

    def _ready(self, mode: Mode, window: slice) -> tuple[Decoder, Decisions]:
        """The packed base, as its weights were at the last prompt, and the mode's decisions for these positions."""
        key = mode.weights or self.form, self.hat.has_shortlist
        with self._lock:
            if key not in self._decoders:
                corrections = self.hat.corrections if self.hat.config.granularity == "channel" else None
                self._decoders[key] = Decoder(self.lm, key[0], corrections or None, preview=key[1])
            return self._decoders[key], self._decide(mode, self._decoders[key], window)

    def _decide(self, mode: Mode, decoder: Decoder, window: slice) -> Decisions:
        """The mode's decisions as arrays, for tokens at these positions in the cache."""
        if type(mode.policy) is Forced:  # they differ between positions
            return decisions(self.hat, decoder.keep_everything(), mode, window)
        if type(mode.exits) is Forced:
            rest = self._decide(replace(mode, own=replace(mode.own, exits=None), exit_control=None), decoder, window)
            return with_exits(self.hat, rest, mode.exits, window)
        thresholds = [tuple(p.thresholds.items()) if hasattr(p, "thresholds") else None
                      for p in (mode.policy, mode.exits)]  # fmt: skip
        key = mode.head, mode.strength, *thresholds
        if key not in self._decisions:
            while len(self._decisions) >= KEPT_DECISIONS:
                del self._decisions[next(iter(self._decisions))]  # the oldest
            self._decisions[key] = decisions(self.hat, decoder.keep_everything(), mode, window)
        return self._decisions[key]


def warm() -> None:
    """Compile the engine for bases in float32 and bfloat16, unless already cached; takes about a minute."""
    if UNAVAILABLE is None:
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
        )
        one = np.zeros((1, 1), np.int64)
        for dtype in (torch.float32, torch.bfloat16):
            decoder, cache = Decoder(LlamaForCausalLM(config).to(dtype)), DynamicCache(config=config)
            decoder.step(one, cache, decoder.keep_everything(), Place(one, one[0], one.astype(bool)))
