"""Each figure draws its table, with labelled axes; the figures of committed results are drawn in tests/studies."""

from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hat_lib import config
from hat_lib.config import HatError
from hat_lib.plotting import frontier, routing, style, training
from studies.plotting import findings, reference_runs, speed

WEIGHT_SHARES = pd.DataFrame({"base": ["a", "b"], "ffn": [0.6, 0.7], "attention": [0.2, 0.2], "head": [0.2, 0.1]})
SKIPPED_FFN = pd.DataFrame({"layer": [1, 2, 3], "ratio": [1.1, 2.5, 0.99], "low": [1, 2, 0.9], "high": [1.2, 3, 1.1]})
GRAIN_FRONTIER = pd.DataFrame({"method": ["x", "x", "y"], "work": [0.9, 0.6, 0.7], "increase": [-0.004, 0.06, 40.0]})
GRAIN_FRONTIER = GRAIN_FRONTIER.assign(low=[-0.01, 0.03, 30.0], high=[0.002, 0.1, 60.0])
SWEEP = pd.DataFrame(
    [("method", 0.4, 0.42, 0.3, 0.2, 0.4, 0.8), ("mine", np.nan, 0.88, 0.01, np.nan, np.nan, 0.9)],
    columns=["decides", "capacity", "realised", *style.COST, "top1"],
)
EXITS = pd.DataFrame({"exit_rate": [0.1, 0.1, 0.3], "layers": [22, 30, 16], "share": [0.1, 0.9, 0.1]})
SENSITIVITY = pd.DataFrame({"first": [0, 0, 2, 2], "last": [1, 1, 3, 3], "forecast": [0.5, 2.0, 0.4, 3.0]})
SENSITIVITY = SENSITIVITY.assign(mean=[0.6, 1.8, 0.5, 2.0], low=[0.5, 1.6, 0.4, 1.5], high=[0.7, 2.1, 0.6, 2.5])
SCORES = pd.DataFrame({"score": np.r_[0.0, np.geomspace(0.01, 5, 200)]})
THRESHOLDS = pd.DataFrame({"capacity": [0.9, 0.7, 0.4], "threshold": [0.1, 0.5, 2.0], "share": [0.6, 0.4, 0.2]})
CURVE = pd.DataFrame({"tokens": [0, 0, 1024, 1024], "capacity": [0.75, 0.4, 0.75, 0.4]})
CURVE = CURVE.assign(kl=[0.01, 0.8, 0.012, 0.5], increase=[0.01, 1.1, 0.0, 0.6], share=[0.8, 0.45, 0.8, 0.45])
RATES = pd.DataFrame({"granularity": ["channel", "token"] * 2, "exit_rate": [0.1, 0.1, 1, 1], "agreement": 0.5})
DEPTHS = pd.DataFrame({"reader": ["lens"] * 3 + ["ours"] * 2, "depth": [1, 2, 3, 1, 3], "agreement": 0.3})

CLASSES = pd.DataFrame({"class": ["space", "digits", "name"], "tokens": [10, 2000, 3]})
POSITIONS = pd.DataFrame({"first": [0, 2, 4], "last": [1, 3, 7], "protected": [True, False, False]})
QUANTITIES = [f"{name}_of_{which}" for name in ("surprisal", "entropy") for which in ("token", "next")]
QUANTILES = pd.concat([pd.DataFrame({"quantity": name, "median": [0.1, 2.0, 6.0]}) for name in QUANTITIES])


def measures(groups, left=0.0):
    """Executed share and exits of groups, three of each kind, with intervals."""
    table = groups.assign(mean=np.resize([0.5, 0.59, 0.7], len(groups)))
    table = table.assign(low=table["mean"] - 0.02, high=table["mean"] + 0.02, difference=table["mean"] - 0.6)
    table = table.assign(difference_low=table["difference"] - 0.02, difference_high=table["difference"] + 0.02)
    return pd.concat([table.assign(measure="share"), table.assign(measure="left", mean=left)])


def layer_map():
    layer, token = (grid.ravel() for grid in np.meshgrid(range(4), range(3), indexing="xy"))
    texts, depths = np.array([" $x$" + "=" * 60, "🦙", "\n"]), np.array([4, 2, 4])
    table = pd.DataFrame({"token": token, "text": texts[token], "exit_layer": depths[token], "layer": layer})
    share = np.where(layer < table["exit_layer"], 0.2 * layer + 0.1 * token, np.nan)
    return table.assign(share=share, difference=share - 0.4)


def log():
    """Of both phases and grains."""
    step = np.tile(np.arange(1, 13), 2)
    table = pd.DataFrame({"granularity": ["channel"] * 12 + ["token"] * 12, "step": step, "steps": 12, "kl": 2 / step})
    table = table.assign(capacity=0.6, share=0.62, gate_loss=0.6, agreement=0.2, exit_rate=0.3)
    return table.assign(**{f"share_{layer}": 0.6 for layer in range(4)})


BOUNDS = pd.DataFrame({"label": ["a", "b", "c"], "value": [1.0, 4.0, 400.0], "verdict": ["kept", "missed", "missed"]})
BOUNDS = BOUNDS.assign(low=BOUNDS["value"] - 0.5, high=BOUNDS["value"] + 0.5, bound=3.0)

FIGURES = {
    # figure: (its tables, panels, lines or bars or points with whiskers in the first panel)
    style.weight_shares: ((WEIGHT_SHARES,), 1, 3),
    style.skipped_ffn: ((SKIPPED_FFN,), 1, 1),
    style.grain_frontier: ((GRAIN_FRONTIER,), 1, 2),
    frontier.sweep: ((SWEEP,), 2, 2),
    speed.exits: ((EXITS,), 1, 2),
    routing.layer_map: ((layer_map(),), 4, 0),
    routing.by_class: ((measures(CLASSES),), 1, 1),
    routing.by_position: ((measures(POSITIONS),), 1, 1),
    routing.by_quantile: ((measures(QUANTILES),), 2, 2),
    routing.by_sensitivity: ((SENSITIVITY,), 1, 2),
    routing.score_histogram: ((SCORES, THRESHOLDS), 1, 1),
    training.routers: ((log(),), 3, 0),
    training.gates: ((log(),), 3, 0),
    findings.bounds: ((BOUNDS, "per cent"), 1, 2),
    reference_runs.gates: ((log(), RATES), 3, 0),
    training.exit_depths: ((DEPTHS,), 1, 0),
    training.learning_curve: ((CURVE,), 1, 0),
}


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.__module__.split('.')[-1]}-{figure.__name__}")
def test_figure(figure):
    tables, panels, containers = FIGURES[figure]
    drawn = figure(*tables)
    assert isinstance(drawn, Figure) and len(drawn.axes) == panels and len(drawn.axes[0].containers) == containers
    labelled = [ax for ax in drawn.axes if ax.get_label() != "<colorbar>"]
    assert labelled[-1].get_xlabel() and (labelled[0].get_ylabel() or labelled[0].get_yticklabels())
    FigureCanvasAgg(drawn).draw()
    assert plt.get_fignums() == []
    first, *others = tables
    column = "capacity" if figure is training.routers else "kl" if "kl" in first else first.columns[0]
    for bad in (first.drop(columns=column), first.iloc[:0]):
        with pytest.raises(HatError):
            figure(bad, *others)


def test_show(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "FIGURES", tmp_path / "figures")
    shown = []
    monkeypatch.setattr(style, "display", lambda picture, **how: shown.append((picture, how)))
    style.show(style.skipped_ffn(SKIPPED_FFN), "one", "what to see")
    assert plt.imread(tmp_path / "figures" / "one.png")[0, 0, :3].tolist() == [1, 1, 1]  # on dark pages too
    assert (tmp_path / "figures" / "one.png").read_bytes() == style.png(style.skipped_ffn(SKIPPED_FFN))
    ((picture, how),) = shown
    assert picture._repr_mimebundle_()[1] == {"image/png": {"alt": "what to see"}} and how["include"] == ["image/png"]


def test_at_equal_work():
    """Half the loss at less work, read at the work before the first step."""
    share, less = np.array([0.8, 0.6, 0.4]), np.array([0.77, 0.57, 0.37])
    kl, increase = lambda share: np.exp(1 - 8 * share), lambda share: np.exp(2 - 3 * share) - 1
    before = {"tokens": 0, "capacity": [0.75, 0.55, 0.35], "share": share, "kl": 2 * kl(share)}
    before = pd.DataFrame(before | {"increase": 2 * increase(share)})
    after = before.assign(tokens=1000, share=less, kl=kl(less), increase=increase(less))
    found = training.at_equal_work(pd.concat([before, after])).query("tokens == 1000")
    np.testing.assert_allclose(found["share"], share)
    np.testing.assert_allclose(found["kl"], kl(share))
    np.testing.assert_allclose(found["increase"], increase(share))
    one = pd.concat([before, after]).query("capacity == 0.55")
    pd.testing.assert_frame_equal(training.at_equal_work(one), one)


def test_live(tmp_path, monkeypatch):
    """One picture, updated in place; none before there is a row."""
    shown, handle = [], Mock()
    monkeypatch.setattr(config, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(style, "display", lambda picture, **how: shown.append(picture) or handle)
    path, whole = tmp_path / "log.csv", log().query("granularity == 'token'")
    live = training.Live(path, training.gates, "gates", "what it shows", every=0)
    for rows in (0, 5, len(whole)):
        whole.head(rows).to_csv(path, index=False)
        live(rows == len(whole))
    assert len(shown) == 1 and handle.update.call_count == 1
    assert (tmp_path / "figures" / "gates.png").read_bytes() == style.png(training.gates(whole))
