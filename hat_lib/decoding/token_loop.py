"""The loop over tokens of ``hat.lm.generate``: many tokens in one call of the engine.

`TokenLoop.generate` is what transformers calls as ``custom_generate``, with inputs, cache and configuration prepared.
It takes greedy decoding and sampling with temperature, top k, top p, min p and a repetition penalty; whatever else was
asked for goes to transformers' own loop, a token at a time.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hat_lib.decoding.obstacles import places
from hat_lib.engine.arrays import GREEDY, MAX_TOKENS, Choice

OTHER_LOOPS = ("assistant_model", "custom_generate", "prompt_lookup_num_tokens", "penalty_alpha", "use_mtp",
               "assistant_early_exit", "constraints", "force_words_ids", "tokenizer", "stop_strings", "dola_layers",
               "synced_gpus")  # fmt: skip
"""settings of generate for which transformers does not sample token by token, or that ``custom_generate`` loses"""
ORDER = (RepetitionPenaltyLogitsProcessor, MinNewTokensLengthLogitsProcessor, TemperatureLogitsWarper,
         TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)  # fmt: skip
"""logits processors that the engine knows, in the order in which it applies them"""
PATIENCE = 0.03
"""seconds that a call takes, about: Ctrl-C waits for its end"""


def one_by_one(lm, args: tuple, kwargs: dict) -> bool:
    """Whether a call of generate decodes greedily or samples, token by token."""
    config = kwargs.get("generation_config") or lm.generation_config

    def value(name: str):
        return kwargs.get(name, getattr(config, name, None))

    return len(args) < 2 and value("num_beams") in (None, 1) and not any(value(name) for name in OTHER_LOOPS)


class TokenLoop:
    """The loop of one call of generate; ``path`` is the model's `FastPath`, ``call`` its `GenerateCall`."""

    def __init__(self, path, call, streamer=None):
        self.path, self.call, self.streamer = path, call, streamer

    def generate(self, lm, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        """Like `GenerationMixin._sample`."""
        choice = self._choice(input_ids, logits_processor, stopping_criteria, generation_config)
        first = self._first(input_ids, generation_config, model_kwargs)
        if choice is None or first is None:
            rest = input_ids, logits_processor, stopping_criteria, generation_config
            return type(lm)._sample(lm, *rest, streamer=self.streamer, **model_kwargs)
        with self.path.hat.changed(last_only=not self.call.gate_prompt):
            outputs = lm._prefill(input_ids, generation_config, model_kwargs)
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())
        following = scores.softmax(-1).multinomial(1) if choice.sample else scores.argmax(-1, keepdim=True)
        ids = self._go_on(following, outputs.cache, choice, first, model_kwargs, stopping_criteria.max_length,
                          input_ids.shape[1])  # fmt: skip
        ids = torch.cat([input_ids, ids], dim=1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=ids, cache=outputs.cache)
        return ids

    def _go_on(self, following, cache, choice, first, model_kwargs, end, length) -> Tensor:
        """All new tokens, int64 ``[B, T]``, of which the first are known."""
        following, (b, more) = following.numpy(), (len(following), end - length - 1)
        uniform = torch.rand(more if choice.sample else 0, b, dtype=torch.float64).numpy()
        position = np.full(b, cache.get_seq_length())
        if (given := model_kwargs.get("position_ids")) is not None:
            position = np.broadcast_to(given[:, -1].numpy() + 1, b)
        ended, done, steps, found = np.isin(following[:, 0], choice.stops), 0, 1, [following]
        if choice.seen.size:
            choice.seen[np.arange(b), following[:, 0]] = True
        self._tell(following)
        while done < more and not ended.all():
            steps = min(steps, more - done)
            began = time.perf_counter()
            now = choice._replace(uniform=uniform[done : done + steps], earliest=max(choice.earliest - done - 1, 0))
            result = self.path.course(
                found[-1][:, -1:], cache, steps, now, first=first, position=position + done, ended=ended,
                threads=self.call.threads,
            )  # fmt: skip
            found.append(result.ids)
            self._tell(result.ids)
            done += result.ids.shape[1]
            each = (time.perf_counter() - began) / result.ids.shape[1]
            steps = 1 if self.streamer is not None else max(1, min(2 * steps, int(PATIENCE / each)))
        if self.streamer is not None:
            self.streamer.end()
        return torch.from_numpy(np.concatenate(found, axis=1))

    def _tell(self, ids: np.ndarray) -> None:
        if self.streamer is not None:
            self.streamer.put(torch.from_numpy(ids[:, 0].copy()))

    def _first(self, input_ids, generation_config, model_kwargs) -> np.ndarray | None:
        """The first position that each sequence sees; None if this is not for the engine."""
        config = generation_config
        asked = config.return_dict_in_generate and any(
            (config.output_scores, config.output_logits, config.output_attentions, config.output_hidden_states)
        )
        b, cache, position = len(input_ids), model_kwargs.get("cache"), model_kwargs.get("position_ids")
        if asked or b > MAX_TOKENS or not self.path.fits(cache, b) or self.path.forced:
            return None
        if position is not None and not places(position, b, position.shape[-1]):
            return None
        mask, past, n = model_kwargs.get("attention_mask"), cache.get_seq_length(), input_ids.shape[1]
        whole = mask is not None and mask.shape[1] == n > past  # else only what follows the cache was given
        return first_seen(mask, b, 1, n if whole else past + n)

    def _choice(self, input_ids, processors, criteria, generation_config) -> Choice | None:
        """How tokens are chosen; None if the engine cannot."""
        kinds = [type(processor) for processor in processors]
        if kinds != [kind for kind in ORDER if kind in kinds]:
            return None
        if any(type(criterion) not in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria):
            return None
        if criteria.max_length is None:
            return None
        found = dict(zip(kinds, processors, strict=True))
        made = {"sample": bool(generation_config.do_sample), "stops": _stops(criteria)}
        if made["stops"].size:
            made["pad"] = int(generation_config._pad_token_tensor)
        if (penalty := found.get(RepetitionPenaltyLogitsProcessor)) is not None:
            seen = torch.zeros(len(input_ids), len(self.path.lm.lm_head.weight), dtype=torch.bool)
            ignored = penalty.prompt_ignore_length
            ignored = [0] * len(seen) if ignored is None else ignored.tolist()
            for row, ids, padding in zip(seen, input_ids, ignored, strict=True):
                row[ids[padding:]] = True
            made |= {"penalty": np.float32(penalty.penalty), "seen": seen.numpy()}
        if (shortest := found.get(MinNewTokensLengthLogitsProcessor)) is not None:
            made["earliest"] = shortest.min_new_tokens
        for kind, name in ((TemperatureLogitsWarper, "temperature"), (TopPLogitsWarper, "top_p")):
            if kind in found:
                made[name] = np.float32(getattr(found[kind], name))
        if TopKLogitsWarper in found:
            made["top_k"] = int(found[TopKLogitsWarper].top_k)
        if MinPLogitsWarper in found:
            made["min_p"] = np.float32(found[MinPLogitsWarper].min_p)
        return GREEDY._replace(**made)


def first_seen(mask: Tensor | None, b: int, t: int, length: int) -> np.ndarray | None:
    """The first position that each sequence sees, int64 ``[B]``; None for a mask of another shape than ``[B, length]``,
    with holes, or with padding on the right among the last t tokens."""
    if mask is None:
        return np.zeros(b, np.int64)
    if mask.shape != (b, length):
        return None
    mask = (mask != 0).numpy()
    first = mask.argmax(1)
    whole = np.array_equal(mask.sum(1), mask.shape[1] - first) and mask[:, -t:].all()
    return first if whole else None


def _stops(criteria) -> np.ndarray:
    """The tokens that end a text, int64."""
    found = [c.eos_token_id.numpy() for c in criteria if type(c) is EosTokenCriteria]
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)
