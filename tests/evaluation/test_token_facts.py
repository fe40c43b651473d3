"""What the map of a prompt shows: shares as in the trace, scores against thresholds, and next tokens of both models."""

import numpy as np
import pytest
import tiny_runs

from hat_lib.config import HatError
from hat_lib.evaluation.explain import explain
from hat_lib.evaluation.token_facts import LIKELIEST, MOST, token_facts

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:token grain at capacity"),
]
PROMPT = "In 2025 a naïve fox 🦙 met the Kings."


@pytest.fixture(scope="module", params=tiny_runs.GRAINS)
def hat(request):
    hat = tiny_runs.adaptive(request.param)
    hat.capacity, hat.exit_rate = 0.6, 0.5
    return hat


def test_it_reads_the_prompt_once_as_the_base_and_once_as_set(hat):
    with hat.collect() as forwards:
        token_facts(hat, PROMPT)
    assert [(f.routed, f.gated) for f in forwards] == [(False, False), (True, True)]


def test_shares_are_those_of_explain_and_of_the_trace(hat):
    found, theirs = token_facts(hat, PROMPT), explain(hat, PROMPT)
    for name in ("token", "protected", "share", "exit"):
        np.testing.assert_array_equal(found.explanation.tokens[name], theirs.tokens[name])
    np.testing.assert_array_equal(found.share, theirs.frame.pivot(index="layer", columns="position", values="share"))
    np.testing.assert_allclose(np.einsum("lst,s->lt", found.site_share, hat.site_work), found.share, rtol=1e-5)
    assert np.isnan(found.share).any(), "some leave early"
    np.testing.assert_array_equal(np.isnan(found.site_share[:, 0]), np.isnan(found.share))


def test_a_score_over_the_threshold_is_what_runs(hat):
    found = token_facts(hat, PROMPT)
    free = ~found.explanation.tokens["protected"].to_numpy()
    score, share = found.score[:, :, free], found.site_share[:, :, free]
    decided = np.isfinite(score) & np.isfinite(share)
    assert decided.any()
    if hat.config.granularity == "token":
        assert found.scored == "score − threshold"
        assert ((score > 0) == (share == 1))[decided].all()
    else:
        assert found.scored == "score / threshold"
        assert np.corrcoef(score[decided], share[decided])[0, 1] > 0.3
        scores = {}

        def watch(layer, site, x, rows, state):
            scores[layer, site] = hat.scores(layer, site, x)

        with hat.using(watch):
            hat.lm(hat.base.tokenizer(PROMPT, return_tensors="pt").input_ids)
        expected = scores[0, "qkv"].mean(-1) / hat.calibration.thresholds_at(0.6)[0, "qkv"]
        np.testing.assert_allclose(found.score[0, 0], expected, rtol=1e-5)


def test_next_tokens_are_the_likeliest_of_each_model(hat):
    found, ids = token_facts(hat, PROMPT), hat.base.tokenizer(PROMPT, return_tensors="pt").input_ids
    with hat.dense():
        base = hat.lm(ids).logits[0].softmax(-1)
    ours = hat.lm(ids).logits[0].softmax(-1)
    entropy = -(base * base.log()).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4)
    for side, p in ((found.base_next, base), (found.hat_next, ours)):
        np.testing.assert_allclose([[v for _, v in row] for row in side], p.topk(LIKELIEST).values, rtol=1e-4)
        likeliest = hat.base.tokenizer.decode([ids[0, 0], p[0].argmax()])
        assert likeliest == hat.base.tokenizer.decode([ids[0, 0]]) + side[0][0][0]


def test_all_about_a_token_in_words(hat):
    found = token_facts(hat, PROMPT)
    tokens = found.explanation.tokens
    left = int(tokens.index[tokens["exit"] < len(found.share)][0])
    assert "protected: it runs in full" in found.about(0) and found.headline(0) == "token 0: “I”"
    assert f"left after {tokens['exit'][left]} of {len(found.share)} layers" in found.about(left)
    last = found.matrices(left, len(found.share) - 1)
    assert last[f"layer {len(found.share) - 1}"].tolist() == ["–"] * len(found.sites)
    assert found.matrices(0)["mean"].tolist() == ["100.0%"] * len(found.sites)
    assert f"{found.entropy[left]:.2f} nats" in found.about(left)
    assert list(found.next_tokens(3)) == ["base", "p", "adaptive", "p "] and len(found.next_tokens(3)) == LIKELIEST


def test_at_full_capacity_both_models_say_the_same(hat):
    with hat.at(1.0, 0.0):
        found = token_facts(hat, PROMPT)
    assert found.base_next == found.hat_next and (found.share == 1).all() and np.isnan(found.score).all()
    assert "–" in found.about(3, 1)


@pytest.mark.parametrize(
    ("prompt", "words"), [(" ", "a prompt must be text"), ("ab " * MOST, f"a map has room for {MOST} tokens")]
)
def test_bad_input_before_anything_runs(hat, monkeypatch, prompt, words):
    monkeypatch.setattr(hat.lm.model, "forward", None)
    with pytest.raises(HatError, match=words):
        token_facts(hat, prompt)
