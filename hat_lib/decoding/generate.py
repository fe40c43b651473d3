"""The way of a token through ``hat.lm.generate``, from top to bottom:

- ``generate``: is the engine allowed? Decided once a call: hooks, adapters or other forwards put on the base later are
  not noticed before the next one.
- ``_prefill``: the prompt, on the reference path, in full unless asked otherwise (``_prompt``).
- ``_loop``: greedy decoding and sampling, course after course of many tokens each, in compiled code.
- ``_forward``: all else (beams, drafts, other processors and criteria) goes through transformers' own loop, a token at
  a time; the engine runs those of few tokens (``_step``), the reference path the rest.

At the end, ``hat.trace`` is that of all new tokens. The engine (`hat_lib.engine`) decodes up to eight tokens at a time
on a CPU, here and in forwards inside ``with hat.engine():``. All else is the reference path's (`hat_lib.method`).
"""

from __future__ import annotations  # some of the names below are absent without numba

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from hat_lib.config import HatError
from hat_lib.decoding import obstacles, steering
from hat_lib.decoding.choice import choice_of, first_seen, one_by_one
from hat_lib.engine.arrays import DOWN, FFN, GREEDY, MAX_TOKENS, STILL, Choice
from hat_lib.method.setting import Setting
from hat_lib.method.trace import Trace

try:
    from hat_lib.engine.decoder import Decoder, Place, Result, Steering
    from hat_lib.engine.team import paced, size, use_torch_threads
    from hat_lib.engine.weights import packed_bytes, unfit

    UNAVAILABLE = None
except Exception as error:  # numba is missing, or does not support this Python or this CPU
    UNAVAILABLE = f"numba cannot be used here ({type(error).__name__}: {error})"

WEIGHT_FORMATS = ("base", "int8", "q4")
PATIENCE = 0.03
"""seconds that a course takes, about: Ctrl-C waits for its end"""


@dataclass
class Call:
    """A call of ``generate`` under way in a thread."""

    engine: bool
    """whether the engine may run its tokens"""
    gate_prompt: bool
    """whether the prompt's tokens spend by capacity, too; else they run in full"""
    threads: int
    """torch's number of threads when it began"""
    streamer: object = None
    prefilled: bool = False
    prompt: bool = False
    """whether the prompt runs now"""
    last_only: bool = False
    """whether nobody reads the final states of the prompt's tokens but the last"""

    def put(self, ids: np.ndarray) -> None:
        """Show the streamer the next token of each text, ``[B, 1]``."""
        if self.streamer is not None:
            self.streamer.put(torch.from_numpy(ids[:, 0].copy()))

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


class Decoding:
    """Replaces ``forward``, ``generate`` and ``_prefill`` of a model's ``lm``, from `attach` to `detach`."""

    def __init__(self, hat, context):
        self.hat, self.context, self.lm = hat, context, hat.lm
        self._decoders: dict[tuple[str, bool], Decoder] = {}
        """by weight format, and whether it can make a shortlist"""
        self._lock = threading.Lock()
        self._thread = threading.local()
        self.never = UNAVAILABLE or obstacles.of_base(self.lm, hat.config.granularity)

    def attach(self, hooks: list[RemovableHandle]) -> None:
        """Once the model's own ``hooks`` and forwards are in place."""
        self._snapshot = obstacles.Snapshot(self.lm, self.hat.config.n_layers, hooks)
        self._original = {name: getattr(self.lm, name) for name in ("forward", "generate", "_prefill")}
        for name, ours in (("forward", self._forward), ("generate", self._generate), ("_prefill", self._prefill)):
            wrapped = functools.partial(ours)  # whose signature is transformers', which generate reads
            setattr(self.lm, name, functools.update_wrapper(wrapped, self._original[name]))

    def detach(self) -> None:
        for name in self._original:
            vars(self.lm).pop(name, None)
        self.forget()

    @property
    def call(self) -> Call | None:
        """The call of generate under way in this thread."""
        return getattr(self._thread, "call", None)

    def why_not(self) -> str | None:
        """Why the engine would decode nothing, as things stand; None if it would."""
        return self.never or self._snapshot.obstacle() or obstacles.of_setting(self.context.setting)

    def describe(self) -> str:
        """Which path decodes, in words."""
        if (why := self.why_not()) is not None:
            return f"reference path ({why})"
        threads, read = size(torch.get_num_threads()), self.context.setting.weight_format
        read = str(self.lm.dtype).removeprefix("torch.") if read == "base" else read
        return f"engine ({read}, {threads} thread{'s' if threads > 1 else ''})"

    # -- generate ------------------------------------------------------------------------------------

    def _generate(self, *args, gate_prompt: bool = False, **kwargs):
        self.hat.refresh()
        before, threads, plain = self.call, torch.get_num_threads(), one_by_one(self.lm, args, kwargs)
        engine, streamer = self.why_not() is None, kwargs.get("streamer")
        self._thread.call = Call(engine, gate_prompt, threads, streamer)
        if engine and plain:
            kwargs["custom_generate"] = self._loop
        try:
            with self.hat.collect() as traces:
                return self._original["generate"](*args, **kwargs)
        finally:
            torch.set_num_threads(threads)
            self._thread.call = before
            if new := [trace for trace in traces if trace.covers != "prompt"]:
                # Beams, and drafts that may be rejected, are other rows than the texts that come out.
                self.context.last = trace = Trace.cat(new) if plain else new[-1]
                trace.covers = "new tokens" if plain else "last step of generate"

    def _prefill(self, *args, **kwargs):
        """In chunks, if prefill_chunk_size is set."""
        with self._prompt():
            return self._original["_prefill"](*args, **kwargs)

    @contextmanager
    def _prompt(self) -> Iterator[None]:
        """A context in which forwards are the prompt's of a call of generate, which runs in full unless it is to spend
        by capacity, on the reference path."""
        call = self.call
        if call is None or call.prompt:
            yield
            return
        call.prefilled = call.prompt = True
        if call.engine:
            use_torch_threads(paced(call.threads), call.threads)
        try:
            with self.hat.collect() as traces, nullcontext() if call.gate_prompt else self.hat.dense():
                yield
        finally:
            call.prompt = False
            for trace in traces:
                trace.covers = "prompt"

    # -- greedy decoding and sampling ----------------------------------------------------------------

    def _loop(self, lm, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        """Like `GenerationMixin._sample`, which takes what the engine does not."""
        call, (b, length) = self.call, input_ids.shape
        choice = choice_of(input_ids, len(lm.lm_head.weight), logits_processor, stopping_criteria, generation_config)
        first = self._first(input_ids, model_kwargs)
        if choice is None or first is None:
            rest = input_ids, logits_processor, stopping_criteria, generation_config
            return type(lm)._sample(lm, *rest, streamer=call.streamer, **model_kwargs)
        call.last_only = not call.gate_prompt
        outputs = lm._prefill(input_ids, generation_config, model_kwargs)
        call.last_only, cache = False, outputs.cache
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())
        ids = (scores.softmax(-1).multinomial(1) if choice.sample else scores.argmax(-1, keepdim=True)).numpy()
        position, more = np.full(b, cache.get_seq_length()), stopping_criteria.max_length - length - 1
        if (given := model_kwargs.get("position_ids")) is not None:
            position = np.broadcast_to(given[:, -1].numpy() + 1, position.shape)
        uniform = torch.rand(more if choice.sample else 0, b, dtype=torch.float64).numpy()
        if choice.seen.size:
            choice.seen[np.arange(b), ids[:, 0]] = True
        call.put(ids)
        ended, found, done, steps = np.isin(ids[:, 0], choice.stops), [ids], 0, 1
        while done < more and not ended.all():
            began, steps = time.perf_counter(), min(steps, more - done)
            now = choice._replace(uniform=uniform[done : done + steps], earliest=max(choice.earliest - done - 1, 0))
            place = {"first": first, "position": position + done, "ended": ended}
            ids = self.course(found[-1][:, -1:], cache, steps, now, **place, threads=call.threads).ids
            found.append(ids)
            call.put(ids)
            done += ids.shape[1]
            each = (time.perf_counter() - began) / ids.shape[1]
            steps = 1 if call.streamer is not None else max(1, min(2 * steps, int(PATIENCE / each)))
        call.end()
        text = torch.cat([input_ids, torch.from_numpy(np.concatenate(found, axis=1))], dim=1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=text, cache=cache)
        return text

    def _first(self, input_ids: Tensor, model_kwargs: dict) -> np.ndarray | None:
        """The first position that each sequence sees; None if this is not for the engine."""
        (b, n), cache, position = input_ids.shape, model_kwargs.get("cache"), model_kwargs.get("position_ids")
        if b > MAX_TOKENS or not obstacles.fits(cache, self.lm, b) or not obstacles.places(position, b):
            return None
        mask, past = model_kwargs.get("attention_mask"), cache.get_seq_length()
        whole = mask is not None and mask.shape[1] == n > past  # else only what follows the cache was given
        return first_seen(mask, b, 1, n if whole else past + n)

    def course(
        self, ids: np.ndarray, cache: Cache, steps: int, choice: Choice = GREEDY, *, first: np.ndarray,
        position: np.ndarray, ended: np.ndarray | None = None, logits: bool = False, threads: int | None = None,
    ) -> Result:  # fmt: skip
        """Decode a token of each sequence, ``ids [B, 1]``, and those that follow it, by the setting.

        Args:
            choice: how tokens are chosen, greedily by default.
            first, position: of each sequence, int64 ``[B]``: the first position in the cache that it sees, and the next
                one of the rotary embedding.
            ended, logits: as for `hat_lib.engine.decoder.Decoder.course`.
        """
        b, start, setting = len(ids), cache.get_seq_length(), self.context.setting
        rank, protected = np.minimum(start - first, position), self.hat.config.protected_tokens
        decoder, offset = self._decoder(setting), np.zeros(b, np.float32)
        if setting.gain:
            offset = steering.offsets(cache, b, start)
        result = decoder.course(
            ids, cache, setting.thresholds, Place(position[:, None], first, (rank < protected)[:, None]), steps, choice,
            unprotected=np.maximum(protected - rank, 0), ended=ended, logits=logits, threads=threads,
            steering=self._steering(setting, decoder, offset),
        )  # fmt: skip
        if setting.moving:
            steering.set_offsets(cache, start, result.offsets)
        ranks = rank[:, None] + np.arange(result.exits.shape[1])
        self.hat.note(self._trace(setting, ranks, start, cache, decoder, result))
        return result

    def _steering(self, setting: Setting, decoder: Decoder, offset: np.ndarray) -> Steering:
        if not setting.moving:
            return STILL._replace(offset=offset)
        layers, head = self.hat.config.n_layers, self.hat.head_work if setting.thresholds.shortlist else 0.0
        whole, asked = layers + head, steering.asked_for(setting.thresholds, layers, head)
        channel = np.array(self.hat.site_work) / decoder.channels[:, 0, 0] / whole
        read = head / whole / np.array(decoder.weights.head.shape[::-1])
        shares = (a.astype(np.float32) for a in (np.broadcast_to(channel, FFN), read))
        return Steering(offset, *map(np.float32, (setting.moving, asked, steering.LIMIT)), *shares)

    # -- a token at a time, by whatever loop -----------------------------------------------------------

    def _forward(self, *args, **kwargs):
        """Like `LlamaForCausalLM.forward`."""
        call, setting, given = self.call, self.context.setting, dict(kwargs)
        if call is not None and not call.prefilled:
            with self._prompt():
                return self._reference(*args, **kwargs)
        if args:
            given["input_ids"] = args[0]
        if "past_key_values" in given:  # transformers' earlier name for it
            given["cache"] = given.pop("past_key_values")
        wanted = setting.engine if call is None else call.engine and not call.prompt
        out = None
        if wanted and len(args) < 2 and obstacles.takes(given, self.lm) and obstacles.of_setting(setting) is None:
            out = self._step(call, setting, **{name: given.get(name) for name in obstacles.ARGUMENTS})
        if call is not None and not call.prompt:
            torch.set_num_threads(call.threads) if out is None else use_torch_threads(1, call.threads)
        return self._reference(*args, **kwargs) if out is None else out

    def _reference(self, *args, **kwargs):
        with self.hat.begin() as forward:
            forward.last_only = self.call is not None and self.call.last_only
            out = self._original["forward"](*args, **kwargs)
        self.hat.end(forward)
        return out

    def _step(self, call, setting, input_ids, attention_mask, position_ids, cache, logits_to_keep, **_):
        """A forward of the engine; None if it cannot run it after all."""
        # In numpy: after a step the CPU's caches hold nothing of torch, and its operations cost several times as much.
        (b, t), start = input_ids.shape, cache.get_seq_length()
        if not start and call is None:
            self.hat.refresh()  # as the reference path does at a prompt
        if (first := first_seen(attention_mask, b, t, start + t)) is None:
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
        decoder, place = self._decoder(setting), Place(position, first, rank < self.hat.config.protected_tokens)
        scale = np.exp(steering.offsets(cache, b, start)).repeat(t) if setting.gain else None
        threads = None if call is None else call.threads
        result = decoder.step(
            input_ids.numpy(), cache, setting.thresholds, place, scale=scale, logit_rows=logit_rows, threads=threads
        )
        trace = self._trace(setting, rank, start, cache, decoder, result)
        steering.move(cache, trace, setting.thresholds, setting.moving)
        self.hat.note(trace)
        return CausalLMOutputWithPast(logits=result.logits, cache=cache)

    def replay(self, ids: Tensor, cache: Cache, mask: Tensor | None) -> None:
        """See `HierarchicalTransformer.replay`."""
        (b, tokens), start = ids.shape, cache.get_seq_length()
        if not tokens:
            raise HatError(f"there must be tokens to replay, got {list(ids.shape)}")
        if mask is not None and mask.shape != (b, start + tokens):
            raise HatError(f"the mask must cover the cache, too: {[b, start + tokens]}, got {list(mask.shape)}")
        fits = ids.dtype == torch.int64 and 0 < b <= MAX_TOKENS and obstacles.fits(cache, self.lm, b)
        first = first_seen(mask, b, tokens, start + tokens) if fits and self.why_not() is None else None
        if first is not None:
            choice = GREEDY._replace(given=ids.roll(-1, 1).numpy().T.copy())  # after the last, any
            self.course(ids[:, :1].numpy(), cache, tokens, choice, first=first, position=start - first)
            return
        with self.hat.engine(), self.context.collecting_alone() as traces:
            token_by_token(self.lm, ids, cache, mask)
        self.hat.note(Trace.cat(traces))

    def draft(self, token: Tensor, cache: Cache, steps: int, choice: Choice) -> Result | None:
        """Decode ``token [1]`` and what follows in one course, logits included; None if the engine may not."""
        if self.why_not() is not None or not obstacles.fits(cache, self.lm, 1):
            return None
        first, position = np.zeros(1, np.int64), np.array([cache.get_seq_length()])
        return self.course(token[None].numpy(), cache, steps, choice, first=first, position=position, logits=True)

    # -- what ran --------------------------------------------------------------------------------------

    def _trace(self, setting: Setting, rank: np.ndarray, start: int, cache, decoder: Decoder, result: Result) -> Trace:
        real, token = torch.ones(rank.shape, dtype=torch.bool), self.hat.config.granularity == "token"
        trace = self.hat.new_trace(setting, real, torch.from_numpy(rank), start, cache)
        executed = result.kept[:, FFN:] if token else result.kept[:, : DOWN + 1] / decoder.channels
        trace.executed = torch.from_numpy(executed.astype(np.float32))
        trace.exit_layer = torch.from_numpy(result.exits.astype(np.int16))
        if setting.thresholds.shortlist:
            (vocabulary, width), (channels, candidates) = decoder.weights.head.shape, result.head
            trace.note_head(torch.from_numpy((channels / width + candidates / vocabulary).astype(np.float32)))
        return trace

    def _decoder(self, setting: Setting) -> Decoder:
        """The packed model, as its weights were at the last prompt."""
        hat = self.hat
        key = weight_format, shortlist = setting.weight_format, hat.has_shortlist or setting.thresholds.shortlist
        with self._lock:
            if key not in self._decoders:
                parts = {"routers": hat.routers, "gates": hat.gates, "corrections": hat.corrections}
                norm = hat.head_norm if shortlist else None
                self._decoders[key] = Decoder(self.lm, weight_format, **parts, head_norm=norm)
            return self._decoders[key]

    def check_format(self, weight_format: str) -> None:
        """Raise `HatError` for a format that is unknown, or that does not fit the base."""
        if weight_format not in WEIGHT_FORMATS:
            raise HatError(f"weight format must be one of {', '.join(WEIGHT_FORMATS)}, got {weight_format!r}")
        if why := None if self.never else unfit(self.lm, weight_format):
            raise HatError(f"weight format {why}")

    def forget(self) -> None:
        """Drop packed weights; they are made again when next needed. Waits for a thread that is making some: it would
        keep what it made of weights as they were."""
        with self._lock:
            self._decoders = {}

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights, not counting the base's own memory."""
        return sum(packed_bytes(decoder.weights) for decoder in self._decoders.values())


def token_by_token(lm, ids: Tensor, cache: Cache, mask: Tensor | None = None) -> None:
    """Read ``ids [B, T]`` after a cache; ``mask [B, T in the cache and here]`` is 0 at left padding."""
    for t, token in enumerate(ids.split(1, dim=1), start=cache.get_seq_length() + 1):
        seen = None if mask is None else mask[:, :t]
        lm(input_ids=token, attention_mask=seen, cache=cache, use_cache=True, logits_to_keep=1)


def warm() -> None:
    """Compile the engine for bases in float32 and bfloat16, unless already cached; takes about a minute."""
    if UNAVAILABLE is None:
        sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), 8)
        config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
        one = np.zeros((1, 1), np.int64)
        for dtype in (torch.float32, torch.bfloat16):
            decoder, cache = Decoder(LlamaForCausalLM(config).to(dtype)), DynamicCache(config=config)
            decoder.step(one, cache, decoder.dense, Place(one, one[0], one.astype(bool)))
