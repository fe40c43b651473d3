"""The way of a token through ``hat.lm.generate``, from top to bottom:

- ``generate``: is the engine allowed? Decided once a call: hooks, adapters or other forwards put on the base later are
  not noticed before the next one.
- ``_prefill``: the prompt, on the reference path, in full unless asked otherwise.
- ``_loop``: greedy decoding and sampling, course after course of many tokens each, in compiled code.
- ``_forward``: all else (beams, drafts, other processors and criteria) goes through transformers' own loop, a token at
  a time; the engine runs those of few tokens (``_step``), the reference path the rest.

What is the prompt's is told by position: where one forward holds a prompt and drafts, it is run as two. A forward that
does not read the text that comes out (a logits processor's, as for guidance, or a streamer's) is run like any other,
and ``hat.trace``, at the end that of all new tokens, does not contain it. The engine (`hat_lib.engine`) decodes up to
eight tokens at a time on a CPU, here and in forwards inside ``with hat.engine():``. All else is the reference path's
(`hat_lib.method`).
"""

from __future__ import annotations  # some of the names below are absent without numba

import functools
import math
import threading
import time
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from hat_lib.config import HatError
from hat_lib.decoding import obstacles, steering
from hat_lib.decoding.choice import asked, choice_of, first_seen, one_by_one
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


CALL: ContextVar[Call | None] = ContextVar("call", default=None)
"""the call of generate under way in this thread, the innermost if one runs inside another's streamer"""


@dataclass
class Call:
    """A call of ``generate``."""

    decoding: Decoding
    """whose it is"""
    engine: bool
    """whether the engine may run its tokens"""
    gate_prompt: bool
    """whether the prompt's tokens spend by capacity, too; else they run in full"""
    threads: int
    """torch's number of threads when it began"""
    streamer: object = None
    own_loop: bool = False
    """whether the caller brought the loop: its first forward is then taken for the prompt, and all for the text's"""
    last_only: bool = False
    """whether nobody reads the final states of the prompt's tokens but the last"""
    prompt_end: float | None = None
    """tokens in the cache after the prompt: all that come before are the prompt's; None until that is known"""
    next_input: Tensor | None = None
    """what the text's next forward reads"""
    cache: Cache | None = None
    traces: list[Trace] = field(default_factory=list)
    """of the text's forwards"""

    def reads(self, given: dict) -> bool:
        """Whether a forward reads the text, rather than something that a processor or a streamer is interested in."""
        return self.own_loop or _input(given) is self.next_input

    def note(self, trace: Trace, cache: Cache | None, prompt: bool = False) -> None:
        """Take in what a forward of the text ran."""
        self.cache = cache
        if prompt:
            trace.covers = "prompt"
        self.traces.append(trace)

    def put(self, ids: np.ndarray) -> None:
        """Show the streamer the next token of each text, ``[B, 1]``."""
        if self.streamer is not None:
            outside = copy_context()  # a forward in there is not the text's
            outside.run(CALL.set, None)
            outside.run(self.streamer.put, torch.from_numpy(ids[:, 0].copy()))

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    def trace(self, one: bool) -> Trace | None:
        """Of all new tokens that were read, if the rows of each forward are those of the texts that come out; else of
        the last step. Without new tokens, of the prompt. None if nothing ran."""
        new = [trace for trace in self.traces if trace.covers != "prompt"]
        if not (new and one):
            if new:
                new[-1].covers = "last step of generate"
            return self.traces[-1] if self.traces else None
        # A forward that begins where another one was not yet at its end, takes the place of drafts that were rejected.
        ends = [trace.start for trace in new[1:]] + [self.cache.get_seq_length() if self.cache else math.inf]
        lengths = [max(0, min(trace.tokens, end - trace.start)) for trace, end in zip(new, ends, strict=True)]
        whole = Trace.cat(new, lengths)
        whole.covers = "new tokens"
        return whole


class Decoding:
    """Replaces ``forward``, ``generate`` and three of its parts on a model's ``lm``, from `attach` to `detach`."""

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
        replacing = {"forward": self._forward, "generate": self._generate, "_prefill": self._prefill,
                     "prepare_inputs_for_generation": self._prepare_inputs,
                     "_get_candidate_generator": self._get_candidate_generator}  # fmt: skip
        self._original = {name: getattr(self.lm, name) for name in replacing}
        for name, ours in replacing.items():
            wrapped = functools.partial(ours)  # whose signature is transformers', which generate reads
            setattr(self.lm, name, functools.update_wrapper(wrapped, self._original[name]))

    def detach(self) -> None:
        for name in self._original:
            vars(self.lm).pop(name, None)
        self.forget()

    @property
    def call(self) -> Call | None:
        """The call of generate under way in this thread, if it is this model's."""
        call = CALL.get()
        return call if call is not None and call.decoding is self else None

    @property
    def traces(self) -> list[Trace]:
        """Of the forwards by which this thread's last call of generate read its text, prompt and new tokens."""
        return getattr(self._thread, "traces", [])

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
        threads, engine = torch.get_num_threads(), self.why_not() is None
        own_loop = kwargs.get("custom_generate") is not None
        call = Call(self, engine, gate_prompt, threads, kwargs.get("streamer"), own_loop)
        beams = (asked(self.lm, kwargs, "num_beams") or 1) > 1
        if engine and one_by_one(self.lm, args, kwargs):
            kwargs["custom_generate"] = self._loop
        # Python itself ends this context, whatever is interrupted: no call is left behind for the next forward.
        inside = copy_context()
        inside.run(CALL.set, call)
        try:
            try:
                return inside.run(self._original["generate"], *args, **kwargs)
            finally:
                torch.set_num_threads(threads)
                self._thread.traces = call.traces
                if (trace := call.trace(one=not (beams or own_loop))) is not None:
                    self.context.last = trace
        finally:
            torch.set_num_threads(threads)  # once more, for an interrupt may have come first

    def _prefill(self, input_ids, *args, **kwargs):
        """In chunks, if prefill_chunk_size is set."""
        if (call := self.call) is not None:
            call.prompt_end = math.inf
        out = self._original["_prefill"](input_ids, *args, **kwargs)
        if call is not None:
            call.prompt_end = out.cache.get_seq_length() if out.get("cache") else input_ids.shape[1]
        return out

    def _get_candidate_generator(self, *args, input_ids: Tensor, model_kwargs: dict, **kwargs):
        """Where assisted generation begins, whose first forward reads the prompt and drafts."""
        self.call.prompt_end = model_kwargs["cache"].get_seq_length() + input_ids.shape[1]
        rest = {"input_ids": input_ids, "model_kwargs": model_kwargs, **kwargs}
        return self._original["_get_candidate_generator"](*args, **rest)

    def _prepare_inputs(self, *args, **kwargs):
        """Before each forward in which transformers reads the text."""
        given = self._original["prepare_inputs_for_generation"](*args, **kwargs)
        if self.call is not None:
            self.call.next_input = _input(given)
        return given

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
            call.note(self.context.last, cache)
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
        if args:
            given["input_ids"] = args[0]
        if "past_key_values" in given:  # transformers' earlier name for it
            given["cache"] = given.pop("past_key_values")
        if call is None or not call.reads(given):
            return self._run(call, setting, given, args, kwargs)
        cache, tokens = given.get("cache"), _input(given).shape[1]
        start = 0 if cache is None else cache.get_seq_length()
        if call.prompt_end is None:
            call.prompt_end = start + tokens
        of_prompt = min(max(call.prompt_end - start, 0), tokens)
        if 0 < of_prompt < tokens:
            return self._prompt_and_rest(given, of_prompt)
        if of_prompt:
            if call.engine:
                use_torch_threads(paced(call.threads), call.threads)
            setting = setting if call.gate_prompt else setting.holding(**self.hat.in_full)
            out = self._reference(args, kwargs, setting, call.last_only)
        else:
            out = self._run(call, setting, given, args, kwargs)
        call.note(self.context.last, cache, prompt=bool(of_prompt))
        return out

    def _prompt_and_rest(self, given: dict, count: int) -> CausalLMOutputWithPast:
        """A forward whose first ``count`` tokens are the prompt's, as two: with drafts after it, or in a call without a
        cache, which reads the whole text again for each token."""
        cache, mask, keep = given.get("cache"), given.get("attention_mask"), given.get("logits_to_keep", 0)
        within = DynamicCache(config=self.lm.config) if cache is None else cache
        name, end = "inputs_embeds" if given.get("input_ids") is None else "input_ids", within.get_seq_length() + count
        outs = []
        for part in (slice(count), slice(count, None)):
            some = {name: given[name][:, part], "cache": within, "use_cache": True, "logits_to_keep": 0}
            if given.get("position_ids") is not None:
                some["position_ids"] = given["position_ids"][..., part]
            if mask is not None and part.stop:
                some["attention_mask"] = mask[:, :end]
            if isinstance(keep, int) and keep and part.stop:  # all logits of the prompt would be many
                some["logits_to_keep"] = max(keep - given[name].shape[1] + count, 1)
            self.call.next_input = some[name]
            outs.append(self._forward(**given | some))
        first, second = outs
        logits = torch.cat([first.logits, second.logits], dim=1)
        found = {"logits": logits[:, -keep:] if isinstance(keep, int) else logits[:, keep], "cache": cache}
        if second.hidden_states:
            pairs = zip(first.hidden_states, second.hidden_states, strict=True)
            found["hidden_states"] = tuple(torch.cat(pair, 1) for pair in pairs)
        if second.attentions:  # whose queries before the prompt's end see no keys after it
            pairs, later = zip(first.attentions, second.attentions, strict=True), given[name].shape[1] - count
            found["attentions"] = tuple(b if b is None else torch.cat([F.pad(a, (0, later)), b], 2) for a, b in pairs)
        return CausalLMOutputWithPast(**found)

    def _run(self, call: Call | None, setting: Setting, given: dict, args: tuple, kwargs: dict):
        """On the engine if it may, else on the reference path."""
        wanted, out = setting.engine if call is None else call.engine, None
        if wanted and len(args) < 2 and obstacles.takes(given, self.lm) and obstacles.of_setting(setting) is None:
            out = self._step(call, setting, **{name: given.get(name) for name in obstacles.ARGUMENTS})
        if call is not None:
            torch.set_num_threads(call.threads) if out is None else use_torch_threads(1, call.threads)
        return self._reference(args, kwargs, setting) if out is None else out

    def _reference(self, args: tuple, kwargs: dict, setting: Setting, last_only: bool = False):
        forward = self.hat.new_forward(setting)
        forward.last_only = last_only
        out = self.context.run(forward, self._original["forward"], *args, **kwargs)
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
        found = self.course(token[None].numpy(), cache, steps, choice, first=first, position=position, logits=True)
        self.call.note(self.context.last, cache)
        return found

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

    def prepare(self) -> float:
        """See `HierarchicalTransformer.prepare`."""
        began, setting = time.perf_counter(), self.context.setting
        self.hat.refresh()
        if self.why_not() is None and self._key(setting) not in self._decoders:
            _first_step(self._decoder(setting))
        return time.perf_counter() - began

    def _key(self, setting: Setting) -> tuple[str, bool]:
        return setting.weight_format, self.hat.has_shortlist or setting.thresholds.shortlist

    def _decoder(self, setting: Setting) -> Decoder:
        """The packed model, as its weights were at the last prompt."""
        hat = self.hat
        key = weight_format, shortlist = self._key(setting)
        with self._lock:
            if key not in self._decoders:
                parts = {"routers": hat.routers, "gates": hat.gates, "corrections": hat.corrections}
                norm = hat.head_norm if shortlist else None
                try:
                    self._decoders[key] = Decoder(self.lm, weight_format, **parts, head_norm=norm)
                except ValueError as error:  # a weight that the format cannot hold
                    raise HatError(f"{hat.base.name}: {error}") from error
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


def _input(given: dict) -> Tensor | None:
    """What a forward reads: ids, int64 ``[B, T]``, or embeddings, ``[B, T, D]``."""
    ids = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


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
        for dtype in (torch.float32, torch.bfloat16):
            _first_step(Decoder(LlamaForCausalLM(config).to(dtype)))


def _first_step(decoder: Decoder) -> None:
    """Run any token, which compiles the loop."""
    one, cache = np.zeros((1, 1), np.int64), DynamicCache(config=decoder.lm.config)
    decoder.step(one, cache, decoder.dense, Place(one, one[0], one.astype(bool)))
