"""Training curves: the figures of `hat_lib.plotting.training`, from tables and while a log grows."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from transformers import TrainerControl, TrainerState

from hat_lib import config
from hat_lib.config import HatError
from hat_lib.plotting import style as plots
from hat_lib.plotting import training as curves


def router_log(granularity, steps=12):
    step = np.arange(1, steps + 1)
    table = pd.DataFrame({"granularity": granularity, "step": step, "steps": steps, "kl": 2 / step, "capacity": 0.6})
    sites = {f"share_{s}": 0.6 if granularity == "channel" else np.nan for s in curves.SITES}
    return table.assign(share=0.62, **sites, **{f"share_{i}": 0.5 + 0.1 * i for i in range(4)})


def gate_log(granularity, steps=12):
    step = np.arange(1, steps + 1)
    table = pd.DataFrame({"granularity": granularity, "step": step, "steps": steps, "kl": 9 / step, "gate_loss": 0.6})
    return table.assign(agreement=0.2, exit_rate=0.3)


BOTH = pd.concat([router_log("channel"), router_log("token")])
EXITS = pd.DataFrame({"granularity": ["channel", "token"] * 3, "exit_rate": [0.1, 0.1, 0.5, 0.5, 1, 1]})
FIGURES = {
    "routers": (router_log("token"),),
    "gates": (gate_log("token"),),
    "reference_routers": (BOTH,),
    "reference_gates": (pd.concat([gate_log("channel"), gate_log("token")]), EXITS.assign(agreement=0.5)),
    "exit_depths": (pd.DataFrame({"reader": ["lens"] * 3 + ["ours"] * 2, "depth": [1, 2, 3, 1, 3], "agreement": 0.3}),),
}


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "FIGURES", tmp_path / "figures")
    return tmp_path


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_labelled_the_same_twice_and_leaves_its_tables_alone(name):
    tables, before = FIGURES[name], [t.copy() for t in FIGURES[name]]
    figure = getattr(curves, name)(*tables)
    assert isinstance(figure, Figure) and plt.get_fignums() == []
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes if ax.get_label() != "<colorbar>")
    assert plots.png(figure) == plots.png(getattr(curves, name)(*tables))
    for table, old in zip(tables, before, strict=True):
        pd.testing.assert_frame_equal(table, old)


@pytest.mark.parametrize("name", FIGURES)
def test_a_missing_column_is_named(name):
    first, *rest = FIGURES[name]
    column = "share_0" if "share_0" in first else "agreement"
    with pytest.raises(HatError, match=f"missing: .'{column}'"):
        getattr(curves, name)(first.drop(columns=column), *rest)


def test_layers_are_in_order_and_sites_are_no_layers():
    table = pd.DataFrame(columns=["share_ffn", "share", "share_0", "share_1", "share_10", "share_qkv"])
    assert curves.layer_columns(table) == ["share_0", "share_1", "share_10"]


def test_live_draws_while_the_log_grows_and_keeps_the_last_drawing(scratch, monkeypatch):
    """One picture that is updated in place; none before there is a row; none from a second process."""
    shown, updated = [], []

    class Handle:
        def update(self, bundle, **how):
            updated.append(bundle)

    monkeypatch.setattr(curves, "display", lambda bundle, **how: shown.append((bundle, how)) or Handle())
    log, whole = scratch / "log.csv", gate_log("token")
    live = curves.Live(log, curves.gates, "gates", "what it shows", every=0)
    state, other = TrainerState(), TrainerState(is_world_process_zero=False)

    def at(event, rows, state=state):
        whole.head(rows).to_csv(log, index=False)
        getattr(live, f"on_{event}")(None, state, TrainerControl())

    at("step_begin", 0)
    at("step_begin", 5, other)
    assert not shown and not updated
    at("step_begin", 5)
    at("step_begin", 8)
    at("train_end", 12)
    (bundle, how), *more = shown
    assert not more and len(updated) == 2 and how["metadata"] == {"image/png": {"alt": "what it shows"}}
    assert set(bundle) == {"image/png"} and updated[0] != updated[1]
    assert (scratch / "figures" / "gates.png").read_bytes() == plots.png(curves.gates(whole))


def test_live_waits_between_two_drawings(scratch, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves.Live, "_show", lambda self: drawn.append(1))
    live = curves.Live(scratch / "log.csv", curves.gates, "gates", "", every=3600)
    for _ in range(3):
        live.on_step_begin(None, TrainerState(), TrainerControl())
    assert len(drawn) == 1
