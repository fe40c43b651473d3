"""The token table and its routing patterns, against forwards evaluated by hand and other numbers of the library."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_runs import GRAINS, gating, skipping

from hat_lib import explain
from hat_lib.config import HatError
from hat_lib.evaluation import routing
from hat_lib.evaluation.perplexity import Score, compare, score_each
from hat_lib.evaluation.routing import MEASURES
from hat_lib.evaluation.tokens import LIKELIEST, LOSSES, prompt_blocks, token_table
from hat_lib.text.blocks import load_text
from hat_lib.text.token_classes import CLASSES

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:token grain at capacity")]
PROMPT = "In 2025 a naïve fox 🦙 met the Kings."
TEXT = "In 2025 Ada met 3 of the Kings, and they didn’t say a naïve word 🦙.\nThe quick brown fox jumps. " * 5


@pytest.fixture(scope="module")
def strided(tiny_base, tmp_path_factory):
    """Windows of one document, with context; the last one is shorter."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(TEXT)
    return list(load_text(path, tiny_base.tokenizer, split="train", block_size=64, stride=40))


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
    for p, found_p in zip((theirs.exp(), ours.exp()), found.next_p, strict=True):
        np.testing.assert_allclose(found_p[: len(p)], p.topk(LIKELIEST).values, rtol=1e-4)
    assert (found.next_ids[0, : len(theirs), 0] == theirs.argmax(-1).numpy()).all()
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


# Routing patterns


def test_classes_hold_the_means_of_their_tokens(found):
    table = routing.by_class(found)
    free = found.tokens[~found.tokens["protected"]]
    for measure in MEASURES:
        rows = table[table["measure"] == measure].set_index("class")
        groups = free.groupby("class")[measure]
        expected = groups.mean().dropna()
        assert list(rows.index) == [c for c in CLASSES if c in expected.index]
        np.testing.assert_allclose(rows["mean"], expected[rows.index].astype(float))
        np.testing.assert_allclose(rows["difference"], expected[rows.index] - free[measure].mean(), atol=1e-12)
        assert rows["tokens"].tolist() == groups.count()[rows.index].tolist()


def test_quantiles_are_equal_groups_in_order(found):
    table = routing.by_quantile(found, bins=4).query("measure == 'share'")
    free = found.tokens[~found.tokens["protected"]]
    assert list(table["quantity"].unique()) == [
        "surprisal_of_token", "surprisal_of_next", "entropy_of_token", "entropy_of_next",
    ]  # fmt: skip
    for quantity, rows in table.groupby("quantity"):
        assert rows["tokens"].sum() == free[quantity].count() and np.ptp(rows["tokens"]) <= 1
        assert (rows["most"].to_numpy()[:-1] <= rows["least"].to_numpy()[1:]).all()
        lowest = free.nsmallest(int(rows["tokens"].iloc[0]), quantity)
        assert rows["mean"].iloc[0] == pytest.approx(lowest["share"].mean())


def test_layers_hold_means_over_the_tokens_that_entered(found):
    table = routing.by_layer(found).set_index(["layer", "site"])["mean"]
    free = ~found.tokens["protected"].to_numpy()
    for layer in range(len(found.share)):
        assert table[layer, "all"] == pytest.approx(np.nanmean(found.share[layer, free]), rel=1e-5)
        for i, site in enumerate(found.sites):
            assert table[layer, site] == pytest.approx(np.nanmean(found.site_share[layer, i, free]), rel=1e-5)


def test_short_text_has_no_interval(monkeypatch):
    monkeypatch.setattr(routing, "RESAMPLES", 50)
    hat = skipping("channel")
    one = token_table(hat, [{"input_ids": [5, 6, 7, 8], "doc": "d", "n_context": 0}], progress=False)
    for make in routing.TABLES.values():
        table = make(one)
        for name in {"low", "high", "difference_low", "difference_high"} & set(table):
            assert table[name].isna().all()
    protected = token_table(hat, [{"input_ids": [5, 6], "doc": "d", "n_context": 0}], progress=False)
    with pytest.raises(HatError):
        routing.by_class(protected)


def test_intervals_are_those_of_evaluate(monkeypatch):
    """The mean of a measure over blocks, as in `compare` for the loss."""
    monkeypatch.setattr(routing, "RESAMPLES", 2000)
    draw = np.random.default_rng(1)
    tokens, added = draw.integers(20, 60, 9), draw.normal(0.1, 1, 9)
    means = routing.means(np.repeat(added / tokens, tokens)[None], *[np.repeat(np.arange(9), tokens)] * 2)
    theirs = compare(Score(np.zeros(9), tokens), Score(added, tokens))
    expected = np.log1p([theirs.increase, theirs.low, theirs.high])  # it takes the exponential first
    np.testing.assert_allclose(means.loc[0, ["mean", "low", "high"]].astype(float), expected, rtol=1e-5)
    assert means.loc[0, ["tokens", "blocks"]].tolist() == [tokens.sum(), 9]


def test_a_class_that_is_different_is_found(found):
    odd = found.tokens["position"] % 2 == 1
    tokens = found.tokens.assign(share=found.tokens["share"] + 0.1 * odd)
    tokens["class"] = np.where(odd, "name", "digits")
    rows = routing.by_class(replace(found, tokens=tokens)).query("measure == 'share'").set_index("class")
    assert 0 < rows.loc["name", "difference_low"] < 0.05 < rows.loc["name", "difference_high"]
    assert rows.loc["digits", "difference_high"] < 0


def test_correlations_are_scipys_over_free_tokens(found, monkeypatch):
    monkeypatch.setattr(routing, "RESAMPLES", 50)
    table = routing.correlations(found)
    free = found.tokens[~found.tokens["protected"]]
    assert set(table["compute"]) == {"share", "exit_layer"} and len(table) == 16
    for row in table.itertuples():
        part = free[~free["left"]] if row.compute == "share" else free
        part = part[[row.compute, f"{row.quantity}_of_{row.of}"]].dropna()
        assert row.rho == pytest.approx(spearmanr(part).statistic, abs=1e-9) and row.tokens == len(part)
        assert row.low <= row.high
