"""Routing patterns against forwards evaluated by hand, other numbers of the library, and made-up tokens."""

import numpy as np
import pandas as pd
import pytest
import tiny_runs
from scipy.stats import spearmanr

from hat_lib.config import HatError
from hat_lib.evaluation import routing
from hat_lib.evaluation.perplexity import Score, compare
from hat_lib.evaluation.routing import MEASURES
from hat_lib.evaluation.tokens import LOSSES, TokenTable, token_table
from hat_lib.text.token_classes import CLASSES

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module", params=tiny_runs.GRAINS)
def found(request, strided):
    return token_table(tiny_runs.skipping(request.param), strided, progress=False)


def made_up(n_blocks=12, size=50, seed=0, **columns):
    """Tokens made without a model; `columns` replace what is drawn."""
    draw, n = np.random.default_rng(seed), n_blocks * size
    block, position = np.divmod(np.arange(n), size)
    share = draw.uniform(0.4, 0.8, n)
    tokens = pd.DataFrame({"doc": "d", "block": block, "position": position, "id": 5, "text": " x"})
    tokens["class"] = draw.choice(["name", "digits", "whole word"], n)
    tokens = tokens.assign(protected=position < 2, share=share, model_share=share, exit_layer=3, left=False)
    for name in LOSSES:
        tokens[f"{name}_of_token"], tokens[f"{name}_of_next"] = draw.normal(size=(2, n))
    tokens = tokens.assign(**columns)
    layers = np.tile(tokens["share"].to_numpy(dtype=np.float32), (3, 1))
    return TokenTable(tokens, layers, layers[:, None], ("ffn",), 0.6, 0.0, 0.6, 0.0, 0.6, 0.6)


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


def test_honest_forecasts_lie_on_the_diagonal_and_idle_ones_do_not():
    """Prices scattered around the forecast; then with the forecasts of other tokens."""
    draw, block = np.random.default_rng(0), np.repeat(np.arange(20), 100)
    forecast = np.exp(draw.normal(size=(6, 2000))) * 10.0 ** np.arange(6)[:, None]
    price = 1e-3 * forecast * draw.exponential(size=forecast.shape)
    table = routing.by_sensitivity(price, forecast, block, depths=2, bins=4)
    assert table[["first", "last"]].drop_duplicates().to_numpy().tolist() == [[0, 2], [3, 5]]
    assert (table["pairs"] == 3 * 2000 / 4).all() and table["bin"].tolist() == [0, 1, 2, 3] * 2
    assert table["forecast"].between(table["low"], table["high"]).sum() >= 7
    weighted = table.groupby("first")[["forecast", "mean"]].mean()
    np.testing.assert_allclose(weighted, 1, rtol=1e-9)  # both relative to the layer's mean
    idle = routing.by_sensitivity(price, np.roll(forecast, 1, axis=1), block, depths=2, bins=4)
    assert idle["low"].max() < 1 < idle["high"].min()


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
    hat = tiny_runs.skipping("channel")
    one = token_table(hat, [{"input_ids": [5, 6, 7, 8], "doc": "d", "n_context": 0}], progress=False)
    for make in routing.TABLES.values():
        table = make(one)
        for name in {"low", "high", "difference_low", "difference_high"} & set(table):
            assert table[name].isna().all()
    protected = token_table(hat, [{"input_ids": [5, 6], "doc": "d", "n_context": 0}], progress=False)
    with pytest.raises(HatError):
        routing.by_class(protected)


class TestIntervals:
    def test_are_those_of_evaluate(self, monkeypatch):
        """The mean of a measure over blocks, as in `compare` for the loss."""
        monkeypatch.setattr(routing, "RESAMPLES", 2000)
        draw = np.random.default_rng(1)
        tokens, added = draw.integers(20, 60, 9), draw.normal(0.1, 1, 9)
        means = routing._means(np.repeat(added / tokens, tokens)[None], *[np.repeat(np.arange(9), tokens)] * 2)
        theirs = compare(Score(np.zeros(9), tokens), Score(added, tokens))
        expected = np.log1p([theirs.increase, theirs.low, theirs.high])  # it takes the exponential first
        np.testing.assert_allclose(means.loc[0, ["mean", "low", "high"]].astype(float), expected, rtol=1e-5)
        assert means.loc[0, ["tokens", "blocks"]].tolist() == [tokens.sum(), 9]

    def test_a_class_that_is_different_is_found(self):
        found = made_up()
        more = found.tokens["share"] + 0.1 * (found.tokens["class"] == "name")
        rows = routing.by_class(made_up(share=more)).query("measure == 'share'").set_index("class")
        assert 0 < rows.loc["name", "difference_low"] < 0.1 * 2 / 3 < rows.loc["name", "difference_high"]
        assert rows.loc["digits", "difference_high"] < 0


class TestCorrelations:
    def test_rho_is_scipys_over_free_tokens(self, found, monkeypatch):
        monkeypatch.setattr(routing, "RESAMPLES", 50)
        table = routing.correlations(found)
        free = found.tokens[~found.tokens["protected"]]
        assert set(table["compute"]) == {"share", "exit_layer"} and len(table) == 16
        for row in table.itertuples():
            part = free[~free["left"]] if row.compute == "share" else free
            part = part[[row.compute, f"{row.quantity}_of_{row.of}"]].dropna()
            assert row.rho == pytest.approx(spearmanr(part).statistic, abs=1e-9) and row.tokens == len(part)
            assert row.low <= row.high
