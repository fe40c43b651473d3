"""Figures: drawn from plain tables, without pyplot's state, the same bytes each time."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from hat_lib import config
from hat_lib.config import HatError
from hat_lib.plotting import style as plots


def benchmark_table():
    rows = [
        {"base": base, "device": "cpu", "dtype": "bfloat16", "threads": 2, "granularity": grain, "phase": phase}
        | {"batch": batch, "realised": c, "ideal": 1 / c, "speedup_hf": 1.1 / c, "speedup_dense": 0.9 / c}
        for base in ("random:tinyllama", "bundled")
        for grain in ("channel", "token")
        for phase, batch in (("decode", 1), ("prefill", 1), ("decode", 8))
        for c in (1.0, 0.75, 0.5)
    ]
    return pd.DataFrame(rows)


TABLES = {
    "weight_shares": pd.DataFrame({"base": ["a", "b"], "ffn": [0.6, 0.7], "attention": [0.2, 0.2], "head": [0.2, 0.1]}),
    "skipped_ffn": pd.DataFrame(
        {"layer": [1, 2, 3], "ratio": [1.1, 2.5, 0.99], "low": [1.0, 2.0, 0.9], "high": [1.2, 3.0, 1.1]}
    ),
    "grain_frontier": pd.DataFrame(
        {"method": ["x", "x", "y"], "work": [0.9, 0.6, 0.7], "increase": [-0.004, 0.06, 40.0]}
        | {"low": [-0.01, 0.03, 30.0], "high": [0.002, 0.1, 60.0]}
    ),
    "benchmark": benchmark_table(),
}


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "FIGURES", tmp_path / "figures")
    return tmp_path


@pytest.mark.parametrize("name", TABLES)
def test_each_figure_is_drawn_saved_and_the_same_twice(name, scratch):
    figure = getattr(plots, name)(TABLES[name])
    assert isinstance(figure, Figure) and plt.get_fignums() == []
    path = plots.save_figure(figure, name)
    assert path == scratch / "figures" / f"{name}.png"
    again = plots.save_figure(getattr(plots, name)(TABLES[name]), "again")
    assert path.read_bytes() == again.read_bytes()
    assert plt.imread(path)[0, 0, :3].tolist() == [1, 1, 1]  # a white ground, on dark pages too


@pytest.mark.parametrize("name", TABLES)
def test_each_axis_has_a_label_and_a_table_is_not_changed(name):
    before = TABLES[name].copy()
    figure = getattr(plots, name)(TABLES[name])
    pd.testing.assert_frame_equal(TABLES[name], before)
    assert all(ax.get_xlabel() for ax in figure.axes)
    if name != "weight_shares":  # its bars are named
        assert figure.axes[0].get_ylabel()


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_column_or_an_empty_table_is_named(name):
    column = TABLES[name].columns[-1]
    with pytest.raises(HatError, match=column):
        getattr(plots, name)(TABLES[name].drop(columns=column))
    with pytest.raises(HatError, match="any row"):
        getattr(plots, name)(TABLES[name].iloc[:0])


def test_a_bar_of_shares_ends_at_one():
    (ax,) = plots.weight_shares(TABLES["weight_shares"]).axes
    assert max(bar.get_x() + bar.get_width() for bar in ax.patches) == pytest.approx(1)
    assert [t.get_text() for t in ax.texts] == ["60%", "70%", "20%", "20%", "20%", "10%"]


def test_intervals_and_points_stand_where_the_table_says():
    (ax,) = plots.skipped_ffn(TABLES["skipped_ffn"]).axes
    (drawn,) = ax.containers
    np.testing.assert_allclose(np.asarray(drawn[0].get_ydata(), dtype=float), TABLES["skipped_ffn"]["ratio"])
    ends = np.array([segment[:, 1] for segment in drawn[2][0].get_segments()], dtype=float)
    np.testing.assert_allclose(ends, TABLES["skipped_ffn"][["low", "high"]])


def test_the_frontier_shows_gains_and_disasters_on_one_axis():
    (ax,) = plots.grain_frontier(TABLES["grain_frontier"]).axes
    assert ax.get_yscale() == "symlog"
    low, high = ax.get_ylim()
    assert low < -0.4 and high > 4000  # in percent
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["x", "y"]


def test_the_benchmark_has_a_panel_per_phase_and_a_row_per_base():
    figure = plots.benchmark(TABLES["benchmark"])
    assert len(figure.axes) == 6
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[0].endswith("decode, batch 1") and titles[5].endswith("decode, batch 8")
    assert len(figure.axes[0].lines) == 2 * 3 + 1  # each grain: ideal, vs transformers, vs own dense; and 1x


def test_series_differ_without_colour_and_colours_in_lightness():
    lightness = [np.dot(to_rgb(c), (0.299, 0.587, 0.114)) for c, _ in plots.PARTS.values()]
    assert min(abs(np.diff(sorted(lightness)))) > 0.02
    assert len({marker for _, marker in plots.GRAINS.values()}) == len(plots.GRAINS)


def test_show_puts_out_the_picture_alone_with_its_words(monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "display", lambda data, **how: seen.append((data, how)))
    assert plots.show(plots.skipped_ffn(TABLES["skipped_ffn"]), "one", "what to see") is None
    ((data, how),) = seen
    assert set(data) == {"image/png"} and how == {"metadata": {"image/png": {"alt": "what to see"}}, "raw": True}
