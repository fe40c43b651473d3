"""What transformers' generate was asked for, in the words of the engine's loop; None where that loop does not do it."""

import numpy as np
import torch
from torch import Tensor
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hat_lib.engine.arrays import GREEDY, Choice

OTHER_LOOPS = ("assistant_model", "custom_generate", "prompt_lookup_num_tokens", "penalty_alpha", "use_mtp",
               "assistant_early_exit", "constraints", "force_words_ids", "tokenizer", "stop_strings", "dola_layers",
               "synced_gpus")  # fmt: skip
"""settings of generate for which transformers does not sample token by token, or that ``custom_generate`` loses"""
MOST = 1 << 30
"""tokens, as good as endless"""
NUMBERS = {TemperatureLogitsWarper: ("temperature", np.float32), TopKLogitsWarper: ("top_k", lambda k: min(k, MOST)),
           TopPLogitsWarper: ("top_p", np.float32), MinPLogitsWarper: ("min_p", np.float32)}  # fmt: skip
"""logits processors of one number -> its name and type"""
ORDER = (RepetitionPenaltyLogitsProcessor, MinNewTokensLengthLogitsProcessor, *NUMBERS)
"""logits processors that the engine knows, in the order in which it applies them"""
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def asked(lm, given: dict, name: str):
    """What a call of generate asks for: as ``given``, or else as in a config that is given, or in the model's own."""
    config = given.get("generation_config") or lm.generation_config
    return given.get(name, getattr(config, name, None))


def one_by_one(lm, args: tuple, kwargs: dict) -> bool:
    """Whether a call of generate decodes greedily or samples, token by token."""
    others = any(asked(lm, kwargs, name) for name in OTHER_LOOPS)
    return len(args) < 2 and asked(lm, kwargs, "num_beams") in (None, 1) and not others


def choice_of(ids: Tensor, vocabulary: int, processors, criteria, config) -> Choice | None:
    """How the tokens that follow ``ids [B, T]`` are chosen, from what transformers gives a ``custom_generate``."""
    kinds, ends = [type(processor) for processor in processors], [type(one) for one in criteria]
    known = kinds == [kind for kind in ORDER if kind in kinds] and all(map(_does, processors))
    known &= ends.count(MaxLengthCriteria) == 1 and {*ends} <= {MaxLengthCriteria, EosTokenCriteria}
    known &= bool(config.do_sample) or not {*kinds} & {*NUMBERS}  # which may round two logits to one
    asked = config.return_dict_in_generate and any(getattr(config, name) for name in OUTPUTS)
    stops = [one.eos_token_id.numpy().ravel() for one in criteria if type(one) is EosTokenCriteria]
    if not known or asked or stops and config._pad_token_tensor is None or not isinstance(criteria.max_length, int):
        return None
    found, fields = dict(zip(kinds, processors, strict=True)), {"sample": bool(config.do_sample)}
    if stops:
        fields |= {"stops": np.concatenate(stops).astype(np.int64), "pad": int(config._pad_token_tensor)}
    if (penalty := found.get(RepetitionPenaltyLogitsProcessor)) is not None:
        ignored = penalty.prompt_ignore_length
        ignored = torch.as_tensor(ignored if isinstance(ignored, int | Tensor) else 0)
        if ignored.shape not in ((), ids.shape[:1]) or (ignored > ids.shape[1]).any():  # of tokens to come, some
            return None
        text = ids.masked_fill(torch.arange(ids.shape[1]) < ignored[..., None], vocabulary).clamp(max=vocabulary)
        seen = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool).scatter_(1, text, True)
        fields |= {"penalty": np.float32(penalty.penalty), "seen": seen[:, :-1].contiguous().numpy()}
    if (shortest := found.get(MinNewTokensLengthLogitsProcessor)) is not None:
        if {*shortest.eos_token_id.ravel().tolist()} != {*fields.get("stops", GREEDY.stops).tolist()}:
            return None
        earliest = shortest.min_new_tokens + shortest.prompt_length_to_skip - ids.shape[1]
        fields["earliest"] = min(max(earliest, 0), MOST)
    numbers = {name: number(getattr(found[kind], name)) for kind, (name, number) in NUMBERS.items() if kind in found}
    return GREEDY._replace(**fields, **numbers)


def _does(processor) -> bool:
    """Whether the loop follows what a processor was given besides its number."""
    kept = 1 if type(processor) is TopKLogitsWarper else getattr(processor, "min_tokens_to_keep", 1)  # top_k has it
    return kept == 1 and getattr(processor, "filter_value", -np.inf) == -np.inf


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
