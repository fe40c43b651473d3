"""Logits processors drawn with their arguments: the engine's loop against transformers'."""

import numpy as np
import torch
from transformers import generation as g

from hat_lib.decoding.choice import choice_of
from hat_lib.engine.compiling import compiled
from hat_lib.engine.loop import judged, restrict, weigh
from soak.paths import generated, prepared


@compiled()
def chances(logits, choice, step, weights):
    for r in range(logits.shape[0]):
        for v in range(logits.shape[1]):
            weights[r, v] = judged(logits[r, v], v, r, choice, step)
        weigh(weights[r], weights[r].max(), choice.temperature)
        restrict(weights[r], choice.top_k, choice.top_p, choice.min_p)


def agrees(expected: np.ndarray, logits: np.ndarray, choice, step: int = 0) -> bool:
    """Whether the loop draws as by probabilities ``[B, V]``; below 1e-9 they are taken for zero."""
    chances(logits, choice, step, found := np.empty_like(logits))
    found /= found.sum(1, keepdims=True)
    return np.array_equal(found > 1e-9, expected > 1e-9) and np.abs(found - expected).max() < 1e-5


def processors(case) -> None:
    """Greedily the same texts; when sampling the same distribution, unless a token is near a threshold."""
    hat, ids, draws = prepared(case)
    stop, n, config = int(generated(hat, ids)[0, -2]), case.tokens, g.GenerationConfig(do_sample=True)
    ignored = [None, int(draws.integers(n + 3)), torch.from_numpy(draws.integers(0, n + 2, case.batch))]
    fixed = [g.RepetitionPenaltyLogitsProcessor(float(draws.uniform(0.5, 2)), ignored[draws.integers(3)]),
             g.MinNewTokensLengthLogitsProcessor(int(draws.integers(n + 1)), int(draws.integers(n + 5)), stop),
             g.TemperatureLogitsWarper(float(draws.uniform(0.2, 2))),
             g.TopKLogitsWarper(int(draws.integers(1, 300)), min_tokens_to_keep=int(draws.integers(1, 9)))]  # fmt: skip
    how = {"logits_processor": fixed[:2], "eos_token_id": stop}
    own_loop = {"stopping_criteria": [lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)]}
    assert torch.equal(generated(hat, ids, **how), generated(hat, ids, **how, **own_loop))
    logits = hat.lm(ids).logits[:, -1].float() + torch.from_numpy(draws.normal(size=(len(ids), 260)).astype("f4"))
    (top_p, min_p), keep, some = draws.uniform(size=2), int(draws.integers(1, 3)), draws.random(6) < 0.8
    ends = g.StoppingCriteriaList([g.EosTokenCriteria(stop), g.MaxLengthCriteria(n + 9)])
    config._pad_token_tensor, found = torch.tensor(258), []
    for near in (0.999, 0.9989, 0.9991):
        warpers = g.TopPLogitsWarper(near * top_p), g.MinPLogitsWarper(near * min_p, min_tokens_to_keep=keep)
        chosen = g.LogitsProcessorList(one for one, taken in zip([*fixed, *warpers], some, strict=True) if taken)
        found.append((chosen(ids, logits.clone()).softmax(-1).numpy(), choice_of(ids, 260, chosen, ends, config)))
    (expected, choice), *others = found
    if choice is not None and all(np.array_equal(expected > 0, other > 0) for other, _ in others):
        assert agrees(expected, logits.numpy(), choice)
