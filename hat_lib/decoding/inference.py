"""AdaptiveInference: text at a capacity, at a target speedup, or exactly the base's.

    infer = AdaptiveInference(hat)
    infer.generate("The future of AI is", capacity=0.62)
    infer.generate(["One prompt", "and another"], target_speedup=1.1)
    infer.generate("The future of AI is", capacity=0.5, mode="lossless")

What comes back is a `Generation`: the text and, for everything requested, what was realised.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from hat_lib.base.load import load_base
from hat_lib.config import HatError, check_count
from hat_lib.decoding.speculation import Speculation, speculate
from hat_lib.decoding.speed import (
    SpeedCurve,
    check_target,
    check_versus,
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


@dataclass(frozen=True)
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
    mode: str
    requested_capacity: float
    requested_exit_rate: float
    capacity: float
    """realised over the new tokens that were read, like the next two, and over the prompt's with ``gate_prompt``; in
    lossless mode over drafts; nan without any: the last new token is not read"""
    exit_rate: float
    exit_histogram: dict[int, int]
    """layers run -> tokens that ran that many"""
    model_share: float
    """executed work / the dense model's on this text; in lossless mode that of all that ran, prompt, drafts and
    verification, which is usually above 1"""
    versus: str
    token_share: Tensor | None = None
    """work as a share of dense, fp32 ``[B, T - 1]``: column t chose the token in column t + 1; nan at padding. None in
    lossless mode"""
    target_speedup: float | None = None
    predicted_speedup: float | None = None
    predicted_range: tuple[float, float] | None = None
    """from the slowest and the fastest turns of the measurement behind the prediction"""
    realised_speedup: float | None = None
    """over ``versus``, measured on this text: of decode or, in lossless mode, prompts included; None if not asked for
    or if the text is too short"""
    speculation: list[Speculation] | None = None
    """lossless mode: one for each prompt"""
    acceptance: float = math.nan
    """lossless mode: share of the drafted tokens that were accepted"""
    draft_share: float = math.nan
    """lossless mode: work of the drafting steps / that of as many dense ones"""

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


class AdaptiveInference:
    """Generates with a `HierarchicalTransformer` and compares its speed with a baseline's. Threads may share one.

    Args:
        hat: each call leaves it at the capacity and exit rate it had.
        versus: what speedups are relative to: "dense", our own dense path, or "hf", plain transformers, for which a
            second copy of the base is loaded when first needed.
    """

    def __init__(self, hat, versus: str = "dense"):
        self.hat, self.versus = hat, check_versus(versus)

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
        streamer=None,
        **settings,
    ) -> Generation:
        """Continue one prompt, or several as a batch. Raises `HatError` for bad input, before anything is generated.

        Args:
            capacity, exit_rate: None means what ``hat`` is set to.
            target_speedup: replaces ``capacity`` by the largest one that reaches it (`SpeedCurve.capacity_for`); at
                the channel grain, the text is steered to it.
            mode: "adaptive", or "lossless": ``hat`` drafts, the base decides (`speculate`), one prompt after another.
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
        hat, tokenizer = self.hat, self.hat.base.tokenizer
        if chat:
            prompts = [_turn(tokenizer, prompt) for prompt in prompts]
        how = {"return_token_type_ids": False, "add_special_tokens": not chat, "verbose": False}
        with _TOKENIZING:
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, **how)
        inputs = inputs.to(hat.base.device)
        length, context = inputs.input_ids.shape[1], hat.lm.config.max_position_embeddings
        if length + max_new_tokens > context:
            what = f"{length} prompt tokens + {max_new_tokens} new ones"
            raise HatError(f"{what} exceed the context of {hat.base.name}: {context}")

        predicted = {}
        with hat.at(capacity, exit_rate):
            if target_speedup is not None:
                curve = self.curve(exit_rate, len(prompts))
                capacity = curve.capacity_for(target_speedup)
                predicted = {"predicted_speedup": curve.at(capacity), "predicted_range": curve.spread(capacity)}
            measure = (target_speedup is not None or mode == "lossless") if measure is None else measure
            run = self._lossless if mode == "lossless" else self._adaptive
            with hat.at(capacity), nullcontext() if target_speedup is None else steer_to_capacity(hat):
                found = run(inputs, max_new_tokens, temperature, seed, measure, streamer, settings)
        return replace(found, target_speedup=target_speedup, **predicted)

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

    def _adaptive(self, inputs, max_new_tokens, temperature, seed, measure, streamer, settings) -> Generation:
        hat, device = self.hat, self.hat.base.device
        how = {"max_new_tokens": max_new_tokens, "pad_token_id": hat.base.tokenizer.pad_token_id}
        how |= {"streamer": streamer, "do_sample": temperature > 0}
        if temperature:
            how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        how |= settings
        length, gate_prompt = inputs.input_ids.shape[1], settings.get("gate_prompt", False)
        with ExitStack() as stack:
            states = stack.enter_context(hat.collect())
            stack.enter_context(torch.inference_mode())
            if how["do_sample"]:
                stack.enter_context(seeded(seed, device))
            began = time.perf_counter()
            ids = hat.lm.generate(**inputs, **how)
            seconds = time.perf_counter() - began
        real = self._real(ids, inputs.attention_mask, settings)
        if (self._setting(settings, "num_beams") or 1) > 1 or len(states[0].real) != len(ids):
            states = self._rerun(ids, real, length, gate_prompt)  # without the forwards of discarded beams
        whole, chunks = Trace.cat(states), int(np.searchsorted(np.cumsum([s.tokens for s in states]), length)) + 1
        whole.real = whole.real & real[:, 1:]  # steps run only for the sake of other rows do not count
        spent, realised = whole if gate_prompt else None, None
        if not gate_prompt and states[chunks:]:
            spent = Trace.cat(states[chunks:])
            spent.real = whole.real[:, length:]
        if measure and ids.shape[1] - length > 3:
            pads = F.pad(inputs.attention_mask, (0, ids.shape[1] - length), value=1)  # of a row that has ended, read
            pads = pads.repeat_interleave(len(ids) // len(pads), dim=0)
            realised = timed(hat, self._reference, ids, None if bool(pads.all()) else pads)
        cost = state_cost(hat, whole)
        shares = {"token_share": (cost.executed / cost.dense).float(), "model_share": cost.model_share}
        return self._generation("adaptive", ids, real, length, seconds, spent, realised_speedup=realised, **shares)

    @torch.inference_mode()
    def _rerun(self, ids: Tensor, real: Tensor, length: int, gate_prompt: bool) -> list[Trace]:
        """States of prompt and new tokens, if they are run once more."""
        hat, cache, mask = self.hat, DynamicCache(config=self.hat.lm.config), real.long()
        with hat.collect() as states:
            with nullcontext() if gate_prompt else hat.dense():
                hat.lm.model(input_ids=ids[:, :length], attention_mask=mask[:, :length], cache=cache, use_cache=True)
            if ids.shape[1] > length + 1:
                hat.lm.model(input_ids=ids[:, length:-1], attention_mask=mask[:, :-1], cache=cache, use_cache=True)
        return states

    def _lossless(self, inputs, max_new_tokens, temperature, seed, measure, streamer, _) -> Generation:
        """One prompt after another; results are combined with the same padding as in `_adaptive`."""
        prompts = [ids[None, mask] for ids, mask in zip(inputs.input_ids, inputs.attention_mask.bool(), strict=True)]
        how = {"temperature": temperature, "seed": seed, "streamer": streamer}
        began = time.perf_counter()
        found = [speculate(self.hat, ids, max_new_tokens, **how) for ids in prompts]
        seconds = time.perf_counter() - began
        new = [s.ids[0, -s.new_tokens :] for s in found]
        pad = self.hat.base.tokenizer.pad_token_id
        tail = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=pad)
        ids = torch.cat([inputs.input_ids, tail], dim=1)
        drafts = [s.drafts for s in found if s.drafts]
        trace, real = Trace.cat(drafts) if drafts else None, self._real(ids, inputs.attention_mask, {})
        drafted = sum(s.drafted for s in found) or math.nan
        return self._generation(
            "lossless", ids, real, inputs.input_ids.shape[1], seconds, trace,
            speculation=found,
            acceptance=sum(s.accepted for s in found) / drafted,
            draft_share=sum(s.drafting for s in found) / drafted,
            realised_speedup=sum(map(self._seconds, found)) / seconds if measure else None,
            model_share=sum(s.ran for s in found) / sum(s.ids.shape[1] - 1 for s in found),
        )  # fmt: skip

    def _seconds(self, found: Speculation) -> float:
        """Seconds the reference takes for the same tokens: a prefill, and a step for each new token but the last."""
        model, around = self._reference
        lm, length = (self.hat.lm if model is self.hat else model), found.ids.shape[1] - found.new_tokens
        cache = DynamicCache(config=lm.config)
        with torch.inference_mode(), around(), self.hat.changed(weights="base"):
            began = now(model)
            lm(input_ids=found.ids[:, :length], cache=cache, use_cache=True, logits_to_keep=1)
            if found.new_tokens > 1:
                replay(model, found.ids[:, length:-1], cache)
            return now(model) - began

    def _real(self, ids: Tensor, prompt_mask: Tensor, settings: dict) -> Tensor:
        """bool ``[B, T]``: False at left padding and after the first newly generated end-of-text token."""
        mask = prompt_mask.bool().repeat_interleave(len(ids) // len(prompt_mask), dim=0)
        stop = self._setting(settings, "eos_token_id")
        stop = torch.as_tensor([] if stop is None else stop, dtype=torch.long, device=ids.device)
        ends = torch.isin(ids[:, mask.shape[1] :], stop).long()
        return torch.cat([mask, ends.cumsum(1) - ends == 0], dim=1)

    def _generation(self, mode, ids, real, length, seconds, trace: Trace | None, **more) -> Generation:
        hat, decode = self.hat, self.hat.base.tokenizer.decode
        depths = () if trace is None else zip(*trace.exit_layer[trace.real].unique(return_counts=True), strict=True)
        new = zip(ids[:, length:], real[:, length:], strict=True)
        return Generation(
            texts=[decode(row[keep], skip_special_tokens=True) for row, keep in new],
            ids=ids,
            prompt_length=length,
            new_tokens=int(real[:, length:].sum()),
            seconds=seconds,
            mode=mode,
            requested_capacity=hat.capacity,
            requested_exit_rate=hat.exit_rate,
            capacity=trace.capacity if trace else math.nan,
            exit_rate=trace.exit_rate if trace else math.nan,
            exit_histogram={int(depth): int(count) for depth, count in depths},
            versus=self.versus,
            **more,
        )


def _turn(tokenizer, text: str) -> str:
    """A user's turn as the model knows it, up to where its answer begins."""
    if not tokenizer.chat_template:
        raise HatError("the tokenizer has no chat template: leave out chat, or use an instruct model")
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
