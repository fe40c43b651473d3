"""`explain`: the trace of one forward, token by token, as a table and as coloured text."""

import numpy as np
import pytest
import tiny_runs
import torch

from hat_lib.config import HatError
from hat_lib.evaluation.explain import explain
from hat_lib.evaluation.routing import patterns

pytestmark = pytest.mark.usefixtures("no_grad")
PROMPT = "In 2025 a naïve fox 🦙 met the Kings."


@pytest.fixture(scope="module", params=tiny_runs.GRAINS)
def hat(request):
    return tiny_runs.skipping(request.param)


def test_is_the_trace_of_the_prompt(hat):
    found, ids = explain(hat, PROMPT), hat.base.tokenizer(PROMPT).input_ids
    theirs = patterns(hat, [{"input_ids": ids, "doc": "p", "n_context": 0}], progress=False)
    np.testing.assert_allclose(found.frame.pivot(index="layer", columns="position", values="share"), theirs.share)
    for mine, other in {"token": "text", "exit": "exit_layer"}.items():
        assert found.tokens[mine].tolist() == theirs.tokens[other].tolist()
    for name in ("position", "id", "protected", "share", "model_share"):
        np.testing.assert_array_equal(found.tokens[name], theirs.tokens[name])
    assert list(found.frame) == ["token", "position", "layer", "share", "exit"]
    assert "".join(found.tokens["token"]) == PROMPT and not found.tokens["new"].any()
    assert (found.capacity, found.exit_rate) == pytest.approx((theirs.capacity, theirs.exit_rate))
    assert found.exit_rate > 0 and found.frame["share"].isna().any(), "some leave early"


def test_one_forward_as_the_model_is_set_and_a_continuation_with_it(hat):
    with hat.collect() as forwards:
        explain(hat, PROMPT)
    assert len(forwards) == 1
    with hat.dense():
        assert explain(hat, PROMPT).frame["share"].eq(1).all()
    ids = hat.base.tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = hat.lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    found = explain(hat, PROMPT, max_new_tokens=5)
    assert found.tokens["id"].tolist() == expected[0].tolist()
    assert found.tokens["new"].tolist() == [False] * ids.shape[1] + [True] * (expected.shape[1] - ids.shape[1])


def test_it_is_shown_as_coloured_text(hat):
    found = explain(hat, PROMPT)
    coloured = (found.tokens["token"] != "").sum()
    assert found._repr_html_() == found.html() and found.html().count('title="') == coloured
    assert "set on other text" in found.html() and "set on other text" in str(found)
    free = found.tokens.loc[~found.tokens["protected"], "model_share"]
    assert f">{free.min():.2f}<" in found.html() and f"{free.max():.2f}<" in found.html()
    assert "≤ 0.99" in found.html(low=0.99, high=1.5)


@pytest.mark.parametrize(
    ("prompt", "more", "words"),
    [
        ("", 0, "a prompt must be text"),
        (7, 0, "a prompt must be text, got 7"),
        ("\ud800 x", 0, r"the prompt has half a character, \\ud800, at 0: expected whole ones"),
        (PROMPT, -1, "max_new_tokens must be"),
        ("a " * 3000, 0, "exceed the context of the base: 2048"),
    ],
)
def test_bad_input_before_anything_runs(hat, monkeypatch, prompt, more, words):
    monkeypatch.setattr(hat.lm.model, "forward", None)
    with pytest.raises(HatError, match=words):
        explain(hat, prompt, max_new_tokens=more)
