"""Each figure draws its table, with labelled axes (those of committed results: tests/studies); findings are verdicts
from intervals, at equal work."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import tiny_runs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hat_lib import config
from hat_lib.config import HatError
from hat_lib.evaluation.routing import TABLES
from hat_lib.evaluation.tokens import token_table
from hat_lib.plotting import routing, style
from studies.plotting import findings, notebooks

NUMBERS = "ffn attention head work value ratio increase realised top1 agreement share forecast mean score threshold kl"
NUMBERS += " model_share price difference fifth decision gradient kept"
TABLE = pd.DataFrame({name: [0.2, 0.4, 0.7] for name in NUMBERS.split()})
TABLE = TABLE.assign(bound=0.5, low=0.1, high=300.0, increase_low=0.1, increase_high=[0.8, np.nan, 0.9])
for name in ("base", "method", "reader", "label", "decides", "class", "what", "scales", "text"):
    TABLE[name] = ["a", "a", "b"]
TABLE["variant"] = ["trained", "trained", "by chance"]
for name, column in {"layer": [1, 2, 3], "depth": [1, 2, 1], "layers": [22, 30, 16], "exit_rate": [0.1, 0.1, 0.3],
                     "first": [0, 0, 2], "last": [1, 1, 3], "capacity": [0.9, 0.7, 0.4], "tokens": [0, 0, 1024],
                     "verdict": ["kept", "missed", "missed"]}.items():  # fmt: skip
    TABLE[name] = column
STEP = np.arange(1, 13)
LOG = pd.DataFrame({"step": STEP, "kl": 2 / STEP, "capacity": np.linspace(0.3, 0.8, 12)})
FIGURES = {
    # figure: (its tables, panels, lines or bars or points with whiskers in the first panel)
    notebooks.weight_shares: ((TABLE,), 1, 3),
    notebooks.skipped_ffn: ((TABLE,), 1, 1),
    notebooks.grain_frontier: ((TABLE,), 1, 2),
    notebooks.sweep: ((TABLE,), 2, 2),
    notebooks.exits: ((TABLE,), 1, 2),
    notebooks.token_classes: ((TABLE,), 1, 1),
    notebooks.fifths: ((TABLE,), 1, 0),
    notebooks.sensitivity: ((TABLE,), 1, 1),
    notebooks.own_costs: ((TABLE,), 1, 2),
    notebooks.early_and_late: ((LOG,), 1, 0),
    notebooks.score_histogram: ((TABLE, TABLE), 1, 1),
    findings.bounds: ((TABLE, "per cent"), 1, 2),
    notebooks.leaving: ((TABLE,), 1, 0),
    notebooks.exit_depths: ((TABLE,), 1, 0),
    notebooks.soft_gradient: ((TABLE,), 1, 0),
    notebooks.by_hand: ((TABLE,), 1, 3),
    notebooks.divergence_ratio: ((TABLE,), 1, 0),
    notebooks.learning_curve: ((TABLE.iloc[[0, 0]].assign(tokens=[0, 1024]),), 1, 0),
}


def drawn_well(figure):
    labelled = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert labelled[-1].get_xlabel() and (labelled[0].get_ylabel() or labelled[0].get_yticklabels())
    FigureCanvasAgg(figure).draw()
    assert isinstance(figure, Figure) and plt.get_fignums() == []


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.__module__.split('.')[-1]}-{figure.__name__}")
def test_figure(figure):
    (first, *others), panels, containers = FIGURES[figure]
    drawn = figure(first, *others)
    drawn_well(drawn)
    assert len(drawn.axes) == panels and len(drawn.axes[0].containers) == containers
    for bad in (first.iloc[:, :1], first.iloc[:0]):
        with pytest.raises(HatError):
            figure(bad, *others)


@pytest.mark.parametrize(("rate", "panels"), [(0.0, 1), (0.2, 2)])
def test_figures_of_routing(rate, panels):
    """Of each table of a text that is drawn; where tokens leave, with their share."""
    hat, rows = tiny_runs.skipping("channel"), tiny_runs.random_blocks(8, 24)
    with hat.at(exit_rate=rate):
        found = token_table(hat, [{"input_ids": ids, "n_context": 0, "doc": "d"} for ids in rows], progress=False)
    for name, draw in routing.FIGURES.items():
        table = TABLES[name](found)
        drawn = draw(table.assign(text=" $x$" + "=" * 60) if name == "layer_map" else table)
        drawn_well(drawn)
        assert len(drawn.axes) == {"layer_map": 4, "quantiles": 2 * panels}.get(name, panels)
    assert len(routing.layer_map(TABLES["layer_map"](found), ["share"]).axes) == 2


def test_at_equal_work():
    """Half the loss at less work, read at the work before the first step."""
    share, less = np.array([0.8, 0.6, 0.4]), np.array([0.77, 0.57, 0.37])
    kl, increase = lambda share: np.exp(1 - 8 * share), lambda share: np.exp(2 - 3 * share) - 1
    before = {"tokens": 0, "capacity": [0.75, 0.55, 0.35], "share": share, "kl": 2 * kl(share)}
    before = pd.DataFrame(before | {"increase": 2 * increase(share)})
    after = before.assign(tokens=1000, share=less, kl=kl(less), increase=increase(less))
    found = notebooks.at_equal_work(pd.concat([before, after])).query("tokens == 1000")
    np.testing.assert_allclose(found["share"], share)
    np.testing.assert_allclose(found["kl"], kl(share))
    np.testing.assert_allclose(found["increase"], increase(share))
    one = pd.concat([before, after]).query("capacity == 0.55")
    pd.testing.assert_frame_equal(notebooks.at_equal_work(one), one)


def test_shown_and_saved(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(config, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(style, "display", lambda picture, **how: shown.append((picture, how)))
    style.show(notebooks.skipped_ffn(TABLE), "one", "what to see")
    ((picture, how),) = shown
    assert picture._repr_mimebundle_()[1] == {"image/png": {"alt": "what to see"}} and how["include"] == ["image/png"]
    assert plt.imread(tmp_path / "figures" / "one.png")[0, 0, :3].tolist() == [1, 1, 1]  # on dark pages too


# Findings


def quality(**columns):
    row = {"granularity": "channel", "text": "addresses", "capacity": 0.9, "exit_rate": 0.0, "tokens": 4000}
    row |= {"variant": "trained", "realised": 0.89, "model_share": 0.9, "max_tokens": 4000}
    row |= dict(zip(style.COST, (0.05, 0.04, 0.06), strict=True))
    return pd.DataFrame(row | columns)


def test_rivals_do_the_same_work():
    variants = ["trained", "static", "random", "cosine"]
    table = quality(variant=variants, model_share=[0.9, 0.897, 0.903, 0.904], margin_low=0.01, margin_high=0.02)
    found = findings.rivals(table)
    assert found["variant"].tolist() == ["static", "random"], "cosine ran too much"


def test_kept_reads_the_claim_between_its_capacities_and_the_row_on_more_tokens():
    table = quality(capacity=[0.2, 0.4, 0.65, 0.65], tokens=[4000, 4000, 4000, 20_000])
    table["increase_high"] = [0.1, 0.1, 0.1, 0.06]
    found = findings.kept(table)
    assert found["capacity"].tolist() == [0.4, 0.65], "0.2 has no claim"
    assert found["promised"].tolist() == pytest.approx([0.12, 0.08 - 0.05 * 2 / 3])
    assert found["kept"].tolist() == ["kept", "open"]
