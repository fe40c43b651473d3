"""The token table against forwards evaluated by hand and against other numbers of the library."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny_runs import GRAINS, adaptive, gating, skipping

from hat_lib import explain
from hat_lib.config import HatError
from hat_lib.evaluation.perplexity import score_each
from hat_lib.evaluation.tokens import LIKELIEST, LOSSES, prompt_blocks, token_table

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:token grain at capacity")]
PROMPT = "In 2025 a naïve fox 🦙 met the Kings."


@pytest.fixture(scope="module", params=GRAINS)
def hat(request):
    return skipping(request.param)


@pytest.fixture(scope="module")
def found(hat, strided):
    return token_table(hat, strided, progress=False)


def test_losses_are_those_of_both_models_at_their_places(hat, strided, found):
    ids = torch.tensor([strided[0]["input_ids"]])
    ours = hat.lm(ids).logits[0].double().log_softmax(-1)
    with hat.dense():
        theirs = hat.lm(ids).logits[0].double().log_softmax(-1)
    frame = found.tokens[found.tokens["block"] == 0]
    follows = torch.arange(ids.shape[1] - 1), ids[0, 1:]
    for name, values in {"surprisal": -theirs[follows], "added_loss": theirs[follows] - ours[follows]}.items():
        np.testing.assert_allclose(frame[f"{name}_of_next"][:-1], values, rtol=1e-4, atol=1e-4)
        assert np.isnan(frame[f"{name}_of_next"].iloc[-1])
    entropy, kl = -(theirs.exp() * theirs).sum(-1), (theirs.exp() * (theirs - ours)).sum(-1)
    np.testing.assert_allclose(frame["entropy_of_next"], entropy, rtol=1e-4)
    np.testing.assert_allclose(frame["kl_of_next"], kl, rtol=1e-3, atol=1e-5)
    for name in LOSSES:
        assert np.isnan(frame[f"{name}_of_token"].iloc[0])
        np.testing.assert_array_equal(frame[f"{name}_of_token"][1:], frame[f"{name}_of_next"][:-1])


def test_work_is_that_of_the_trace(hat, strided, found):
    hat.lm(torch.tensor([strided[0]["input_ids"]]))
    state, n = hat.trace, len(strided[0]["input_ids"])
    frame, exit_layer = found.tokens.iloc[:n], state.exit_layer[0].numpy()
    assert 0 < frame["left"].sum() < n and frame["exit_layer"].tolist() == exit_layer.tolist()
    np.testing.assert_array_equal(np.isnan(found.share[:, :n]), np.arange(state.n_layers)[:, None] >= exit_layer)
    np.testing.assert_allclose(np.nan_to_num(found.share[:, :n]), state.share[:, 0], rtol=1e-6)
    np.testing.assert_allclose(np.nan_to_num(found.site_share[:, :, :n]), state.site_share[:, :, 0], rtol=1e-6)
    np.testing.assert_allclose(frame["share"], np.nanmean(found.share[:, :n], axis=0), rtol=1e-5)


@pytest.mark.parametrize("make", [partial(skipping, "channel"), partial(skipping, "token"), gating])
def test_agrees_with_score(make, strided):
    """Also where the head has a shortlist."""
    hat, whole = make(), [{**row, "n_context": 0} for row in strided]  # `score` counts the context's work, too
    with hat.at(0.5):
        found, (_, (scored,)) = token_table(hat, whole, progress=False), score_each(hat, whole, progress=False)
    for name in ("capacity", "layer_capacity", "exit_rate", "model_share"):
        assert getattr(found, name) == pytest.approx(getattr(scored, name), rel=1e-3)
    assert (abs(found.capacity - found.layer_capacity) > 0.01) == hat.has_shortlist
    assert found.tokens["model_share"].mean() == pytest.approx(scored.model_share, rel=1e-3)
    assert found.tokens["left"].mean() == pytest.approx(scored.exit_rate, rel=1e-6)
    surprisal = found.tokens["surprisal_of_token"] + found.tokens["added_loss_of_token"]
    np.testing.assert_allclose(surprisal.groupby(found.tokens["block"]).sum(), scored.nll, rtol=1e-4)
    assert found.tokens["kl_of_token"].mean() == pytest.approx(scored.kl, rel=1e-3)


def test_context_is_left_out_and_still_read(strided, found):
    assert {row["n_context"] for row in strided} == {0, 24}
    ids = [i for row in strided for i in row["input_ids"][row["n_context"] :]]
    assert found.tokens["id"].tolist() == ids and found.share.shape[1] == len(ids) == found.next_ids.shape[1]
    second = found.tokens[found.tokens["block"] == 1]
    assert second["position"].iloc[0] == 24 and second["surprisal_of_token"].notna().all()
    assert not second["protected"].any()


def test_refusals(hat, strided, monkeypatch):
    monkeypatch.setattr(hat.lm.model, "forward", None)  # nothing may run
    for rows in [], [{**strided[0], "input_ids": []}], [{**strided[0], "input_ids": [5] * 2049}]:
        with pytest.raises(HatError):
            token_table(hat, rows, progress=False)
    with pytest.raises(HatError):
        token_table(hat.lm, strided, progress=False)
    for prompt in ("", 7, "\ud800 x", "a " * 3000):
        with pytest.raises(HatError):
            explain(hat, prompt)


def test_explain_is_the_table_of_its_prompt(hat):
    found = explain(hat, PROMPT)
    expected = token_table(hat, prompt_blocks(hat.base.tokenizer, {"prompt": PROMPT}), progress=False)
    assert found.tokens.equals(expected.tokens)
    free = found.tokens.loc[~found.tokens["protected"], "model_share"]
    assert f">{free.min():.2f}<" in found._repr_html_() and "1.00" in str(found)


def test_explain_goes_on_greedily(hat):
    ids = hat.base.tokenizer(PROMPT, return_tensors="pt").input_ids
    text = hat.lm.generate(ids, max_new_tokens=3, do_sample=False)
    assert explain(hat, PROMPT, max_new_tokens=3).tokens["id"].tolist() == text[0].tolist()
    with pytest.raises(HatError):
        explain(hat, PROMPT, max_new_tokens=5000)


@pytest.mark.parametrize("grain", GRAINS)
def test_next_tokens_are_the_likeliest_of_each_model(grain):
    hat = adaptive(grain)
    hat.capacity, hat.exit_rate = 0.6, 0.5
    found = explain(hat, PROMPT)
    ids = hat.base.tokenizer(PROMPT, return_tensors="pt").input_ids
    with hat.dense():
        base = hat.lm(ids).logits[0].softmax(-1)
    for p, found_p in zip((base, hat.lm(ids).logits[0].softmax(-1)), found.next_p, strict=True):
        np.testing.assert_allclose(found_p, p.topk(LIKELIEST).values, rtol=1e-4)
    assert (found.next_ids[0, :, 0] == base.argmax(-1).numpy()).all()
