"""AdaptiveInference: text at a capacity, at a target speedup, or exactly the base's::

    infer = AdaptiveInference(hat)
    infer.generate("The future of AI is", capacity=0.62)
    infer.generate(["One prompt", "and another"], target_speedup=1.1)
    infer.generate("The future of AI is", capacity=0.5, mode="lossless")

What comes back is a `Generation`: the text and, for everything requested, what was realised.
"""

import math
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, DynamicCache, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from hat_lib.base.load import load_base
from hat_lib.config import HatError, check_count
from hat_lib.decoding.speculation import Speculation
from hat_lib.decoding.speed import (
    VERSUS,
    SpeedCurve,
    check_target,
    now,
    replay,
    seeded,
    speed_curve,
    steer_to_capacity,
    timed,
)
from hat_lib.method.cost import state_cost
from hat_lib.method.trace import Trace
from hat_lib.text.plain import check_whole

MODES = ("adaptive", "lossless")
TEMPERATURE_MIN = 1e-3
"""below it, logits divided by the temperature may overflow, and the likeliest token would be drawn anyway"""

UNACCOUNTED = ("return_dict_in_generate", "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens",
               "use_mtp", "custom_generate", "penalty_alpha", "inputs", "input_ids", "inputs_embeds", "attention_mask",
               "position_ids", "past_key_values", "cache")  # fmt: skip
"""settings of transformers' generate that do not continue the prompts token by token, or return something else"""

# Threads may share a model, but not a tokenizer whose padding is being set.
_TOKENIZING = threading.Lock()


def check_sampling(max_new_tokens: int, temperature: float, seed: int) -> None:
    """Raise `HatError` for settings that cannot be sampled with."""
    check_count("max new tokens", max_new_tokens, 1)
    check_count("seed", seed, 0, 2**64 - 1)  # torch's range
    if temperature != 0 and not TEMPERATURE_MIN <= temperature < math.inf:
        raise HatError(f"temperature must be 0 (greedy) or a number of at least {TEMPERATURE_MIN}, got {temperature}")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """New text, and what it took: ``B`` prompts; ``T`` columns of left-padded prompt and new tokens."""

    texts: list[str]
    """the continuation of each prompt"""
    ids: Tensor
    """int64 ``[B, T]``"""
    prompt_length: int
    """columns of ``ids`` before the first new token"""
    new_tokens: int
    """in all sequences, end-of-text tokens included"""
    seconds: float
    requested_capacity: float
    requested_exit_rate: float
    trace: Trace | None
    """what the new tokens ran, without the last, which is not read, and with ``gate_prompt`` the prompt's; in lossless
    mode what drafts ran; None for no tokens"""
    model_share: float
    """executed work / the dense model's on this text; in lossless mode that of all that ran, prompt, drafts and
    verification, which is usually above 1"""
    token_share: Tensor | None
    """work as a share of dense, fp32 ``[B, T - 1]``: column t chose the token in column t + 1; nan at padding. None in
    lossless mode"""
    speculation: list[Speculation]
    """lossless mode: of each prompt"""
    versus: str
    realised_speedup: float | None
    """over ``versus``, measured on this text: of decode or, in lossless mode, prompts included; None if not asked for
    or if the text is too short"""
    target_speedup: float | None
    predicted_speedup: float | None
    predicted_range: tuple[float, float] | None
    """from the slowest and the fastest turns of the measurement behind the prediction"""

    @property
    def capacity(self) -> float:
        """Realised by the tokens of `trace`, like the exit rate; nan for none."""
        return self.trace.capacity if self.trace else math.nan

    @property
    def exit_rate(self) -> float:
        return self.trace.exit_rate if self.trace else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds

    @property
    def acceptance(self) -> float:
        """Lossless mode: share of the drafted tokens that were accepted; nan for none."""
        return sum(s.accepted for s in self.speculation) / (sum(s.drafted for s in self.speculation) or math.nan)

    @property
    def draft_share(self) -> float:
        """Lossless mode: work of the drafting steps / that of as many dense ones; nan for none."""
        return sum(s.drafting for s in self.speculation) / (sum(s.drafted for s in self.speculation) or math.nan)


class AdaptiveInference:
    """Generates with a `HierarchicalTransformer` and compares its speed with a baseline's. Threads may share one.

    Args:
        hat: each call leaves it at the capacity and exit rate it had.
        versus: what speedups are relative to: "dense", our own dense path, or "hf", plain transformers, for which a
            second copy of the base is loaded when first needed.

    >>> out = AdaptiveInference(hat).generate(["One prompt", "and another"], max_new_tokens=4, capacity=0.5)
    >>> out.ids.shape, out.new_tokens, out.requested_capacity
    (torch.Size([2, 15]), 8, 0.5)
    """

    def __init__(self, hat, versus: str = "dense"):
        if versus not in VERSUS:
            raise HatError(f"versus must be one of {', '.join(VERSUS)}, got {versus!r}")
        self.hat, self.versus = hat, versus

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        capacity: float | None = None,
        exit_rate: float | None = None,
        target_speedup: float | None = None,
        mode: str = "adaptive",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        measure: bool | None = None,
        chat: bool = False,
        streamer: BaseStreamer | None = None,
        **settings,
    ) -> Generation:
        """Continue one prompt, or several as a batch. Raises `HatError` for bad input, before anything is generated.

        Args:
            capacity, exit_rate: None means what ``hat`` is set to.
            target_speedup: replaces ``capacity`` by the largest one that reaches it (`SpeedCurve.capacity_for`); at
                the channel grain, the text is steered to it.
            mode: "adaptive", or "lossless": ``hat`` drafts, the base decides (`Speculation`), one prompt after another.
            temperature: 0 takes the likeliest token; above 0 samples from the whole distribution.
            measure: take a few seconds to measure the realised speedup afterwards; None does so with a target and in
                lossless mode.
            chat: each prompt is a user's turn, put into the tokenizer's chat template.
            streamer, settings: as for ``hat.lm.generate``, which takes ``gate_prompt=True`` besides what transformers'
                takes, but for `UNACCOUNTED`; no settings in lossless mode.
        """
        several = isinstance(prompts, Iterable) and not isinstance(prompts, str)
        prompts = list(prompts) if several else [prompts]
        self._check(prompts, capacity, target_speedup, mode, settings)
        check_sampling(max_new_tokens, temperature, seed)
        inputs = self._inputs(prompts, chat, max_new_tokens)
        how = {"max_new_tokens": max_new_tokens, "streamer": streamer, "do_sample": temperature > 0}
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        how |= {"pad_token_id": self.hat.base.tokenizer.pad_token_id} | settings
        found = {"target_speedup": target_speedup, "predicted_speedup": None, "predicted_range": None}
        if measure is None:
            measure = target_speedup is not None or mode == "lossless"
        with self.hat.at(capacity, exit_rate):
            if target_speedup is None:
                return self._generation(inputs, how, mode, seed, measure, found)
            curve = self.curve(exit_rate, len(prompts))
            capacity = curve.capacity_for(target_speedup)
            found |= {"predicted_speedup": float(curve.at(capacity)), "predicted_range": curve.spread(capacity)}
            with self.hat.at(capacity), steer_to_capacity(self.hat):
                return self._generation(inputs, how, mode, seed, measure, found)

    def curve(self, exit_rate: float | None = None, batch: int = 1, *, refresh: bool = False) -> SpeedCurve:
        """Speedup by capacity on this machine; measured on the first call, or again with ``refresh``."""
        exit_rate = self.hat.exit_rate if exit_rate is None else exit_rate
        plain = lambda: self.plain  # noqa: E731 - loaded only if it is needed
        return speed_curve(self.hat, self.versus, exit_rate=exit_rate, batch=batch, plain=plain, refresh=refresh)

    @cached_property
    def plain(self) -> LlamaForCausalLM:
        """The same base in plain transformers."""
        base = self.hat.base
        return load_base(base.name, dtype=base.dtype, device=base.device).model

    @property
    def _reference(self):
        return (self.hat, self.hat.dense) if self.versus == "dense" else (self.plain, torch.inference_mode)

    # -- before -------------------------------------------------------------------------------------

    def _check(self, prompts, capacity, target, mode, settings) -> None:
        if mode not in MODES:
            raise HatError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if target is not None:
            check_target(target)
        if target is not None and capacity is not None:
            raise HatError(f"pass a capacity or a target speedup, not both (got {capacity} and {target})")
        if mode == "lossless" and (target is not None or settings):
            what = ", ".join(settings) or "a target speedup"
            raise HatError(f"lossless mode takes the capacity of its drafts, not {what}")
        for name in UNACCOUNTED:
            if (value := self._setting(settings, name)) is not None and value is not False:
                raise HatError(f"{name} cannot be set here: call hat.lm.generate, and read hat.trace")
        if self._setting(settings, "use_cache") is False:
            raise HatError("use_cache=False reads the whole text again for each token: leave it out")
        several = len(prompts) * (self._setting(settings, "num_return_sequences") or 1) > 1
        for name in ("stop_strings", "stopping_criteria"):
            if several and self._setting(settings, name):
                raise HatError(f"{name} may end each of several texts elsewhere: continue one prompt at a time")
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise HatError(f"prompts must be a text to continue, or several, got {prompts!r}")
        for prompt in prompts:
            check_whole("a prompt", prompt)

    def _setting(self, settings: dict, name: str):
        """What transformers' generate takes: as given, or as in a config that is given, or else the model's own."""
        found = settings.get(name)
        for config in (settings.get("generation_config"), self.hat.lm.generation_config):
            found = getattr(config, name, None) if found is None else found
        return found

    def _inputs(self, prompts: list[str], chat: bool, max_new_tokens: int) -> BatchEncoding:
        """Left-padded prompts."""
        base, tokenizer = self.hat.base, self.hat.base.tokenizer
        if chat and not tokenizer.chat_template:
            raise HatError("the tokenizer has no chat template: leave out chat, or use an instruct model")
        if chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        how = {"return_token_type_ids": False, "add_special_tokens": not chat, "verbose": False}
        with _TOKENIZING:
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, **how)
        length, context = inputs.input_ids.shape[1], base.model.config.max_position_embeddings
        if length + max_new_tokens > context:
            what = f"{length} prompt tokens + {max_new_tokens} new ones"
            raise HatError(f"{what} exceed the context of {base.name}: {context}")
        return inputs.to(base.device)

    # -- the text, and what it took -----------------------------------------------------------------

    def _generation(self, inputs, how: dict, mode: str, seed: int, measure: bool, found: dict) -> Generation:
        hat, decode, length = self.hat, self.hat.base.tokenizer.decode, inputs.input_ids.shape[1]
        speculation = [Speculation(hat, seed) for _ in inputs.input_ids] if mode == "lossless" else []
        sampling = seeded(seed, hat.base.device) if how["do_sample"] else nullcontext()
        with torch.inference_mode(), sampling:
            hat.prepare()
            if speculation:
                with hat.changed(weight_format="base"):  # which verifies
                    hat.prepare()
            began = time.perf_counter()
            ids, traces = self._drafted(inputs, speculation, how) if speculation else self._text(inputs, how)
            seconds = time.perf_counter() - began
        mask = inputs.attention_mask.bool().repeat_interleave(len(ids) // len(inputs.input_ids), dim=0)
        real = self._real(ids, mask, how)
        if speculation:
            counted = [trace for s in speculation for trace in s.drafts]
        else:
            if (self._setting(how, "num_beams") or 1) > 1 or len(traces[0].real) != len(ids):
                traces = self._rerun(ids, real, length, how)  # without the forwards of discarded beams
            counted = traces if how.get("gate_prompt") else [t for t in traces if t.covers != "prompt"]
        whole, trace = Trace.cat(traces), Trace.cat(counted) if counted else None
        if not speculation:
            whole.real = whole.real & real[:, 1:]  # steps run only for the sake of other rows do not count
            if trace is not None:
                trace.real = whole.real[:, -trace.tokens :]
                trace.covers = "prompt and new tokens" if how.get("gate_prompt") else "new tokens"
        cost, new = state_cost(hat, whole), zip(ids[:, length:], real[:, length:], strict=True)
        return Generation(
            texts=[decode(row[kept], skip_special_tokens=True) for row, kept in new],
            ids=ids,
            prompt_length=length,
            new_tokens=int(real[:, length:].sum()),
            seconds=seconds,
            requested_capacity=hat.capacity,
            requested_exit_rate=hat.exit_rate,
            trace=trace,
            # Of the text, all tokens but the last are read: once, unless drafts are.
            model_share=cost.model_share * int(whole.real.sum()) / (int(real.sum()) - len(ids)),
            token_share=None if speculation else (cost.executed / cost.dense).float(),
            speculation=speculation,
            versus=self.versus,
            realised_speedup=self._speedup(ids, real, mask, seconds, speculation) if measure else None,
            **found,
        )

    def _text(self, inputs, how: dict) -> tuple[Tensor, list[Trace]]:
        """Prompts and what follows, and the traces of the forwards that read it."""
        return self.hat.lm.generate(**inputs, **how), self.hat.text_traces

    def _drafted(self, inputs, speculation: list[Speculation], how: dict) -> tuple[Tensor, list[Trace]]:
        """The same by drafts, one prompt after another, padded like a batch."""
        new, traces = [], []
        for ids, mask, one in zip(inputs.input_ids, inputs.attention_mask.bool(), speculation, strict=True):
            prompt = ids[None, mask]
            alone = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "custom_generate": one}
            text, ran = self._text(alone, how)
            new.append(text[0, prompt.shape[1] :])
            traces += ran
        tail = pad_sequence(new, batch_first=True, padding_value=how["pad_token_id"])
        return torch.cat([inputs.input_ids, tail], dim=1), traces

    @torch.inference_mode()
    def _rerun(self, ids: Tensor, real: Tensor, length: int, how: dict) -> list[Trace]:
        """Traces of prompt and new tokens, if they are run once more."""
        hat, cache, mask = self.hat, DynamicCache(config=self.hat.lm.config), real.long()
        with hat.collect() as traces:
            with nullcontext() if how.get("gate_prompt") else hat.dense():
                hat.lm.model(input_ids=ids[:, :length], attention_mask=mask[:, :length], cache=cache, use_cache=True)
            traces[0].covers = "prompt"
            if ids.shape[1] > length + 1:
                hat.lm.model(input_ids=ids[:, length:-1], attention_mask=mask[:, :-1], cache=cache, use_cache=True)
        return traces

    def _real(self, ids: Tensor, mask: Tensor, how: dict) -> Tensor:
        """bool ``[B, T]``: False at left padding and after the first newly generated end-of-text token."""
        stop = self._setting(how, "eos_token_id")
        stop = torch.as_tensor([] if stop is None else stop, dtype=torch.long, device=ids.device)
        ends = torch.isin(ids[:, mask.shape[1] :], stop).long()
        return torch.cat([mask, ends.cumsum(1) - ends == 0], dim=1)

    def _speedup(self, ids: Tensor, real: Tensor, mask: Tensor, seconds: float, speculation: list) -> float | None:
        """Measured, of a text that took so many ``seconds``; None if it is too short."""
        length = mask.shape[1]
        if speculation:
            rows = zip(ids, real, mask, strict=True)
            return sum(self._seconds(row[None, kept], int(prompt.sum())) for row, kept, prompt in rows) / seconds
        if ids.shape[1] - length <= 3:
            return None
        seen = F.pad(mask, (0, ids.shape[1] - length), value=True)  # the pads of a row that has ended were read
        return timed(self.hat, self._reference, ids, None if seen.all() else seen.long())

    def _seconds(self, ids: Tensor, length: int) -> float:
        """What the reference takes for a text ``[1, T]``: its prompt, and a step for each new token but the last."""
        model, around = self._reference
        lm = self.hat.lm if model is self.hat else model
        cache = DynamicCache(config=lm.config)
        with torch.inference_mode(), around(), self.hat.changed(weight_format="base"):
            began = now(model)
            lm(input_ids=ids[:, :length], cache=cache, use_cache=True, logits_to_keep=1)
            if ids.shape[1] > length + 1:
                replay(model, ids[:, length:-1], cache)
            return now(model) - began
