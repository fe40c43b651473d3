"""Figures of speed: from plain tables, the same bytes each time, points where the tables say."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hat_lib.config import HatError
from hat_lib.plotting import speed as inference_plots
from hat_lib.plotting import style as plots
from hat_lib.plotting.style import BLUE, MOST, ORANGE


def targets():
    names = ["granularity", "versus", "requested", "reachable", "largest", "measured", "lowest", "highest", "prompts"]
    rows = [
        ("channel", "dense", 0.9, True, 0.9, 0.91, 0.85, 0.95, 10),
        ("channel", "dense", 1.1, False, 0.9, np.nan, np.nan, np.nan, 0),
        ("token", "dense", 1.1, True, 1.6, 1.12, 1.05, 1.2, 10),
    ]
    return pd.DataFrame(rows, columns=names)


def lossless():
    rows = []
    for dtype in ("bfloat16", "float32"):
        for i in range(12):
            early = 40.0 if i < 4 else np.nan
            rows.append(
                ("channel", 0.5, dtype, "code" if i % 2 else "list", 10 + i, 8, 1.1, 30.0, 15.0, 20.0 + i, early)
            )
    names = ["granularity", "capacity", "dtype", "kind", "drafted", "accepted", "ideal"]
    return pd.DataFrame(rows, columns=[*names, "ms_hf", "ms_dense", "ms_lossless", "ms_early_exit"])


def promise():
    rows = []
    for base in ("bundled", "random:tinyllama"):
        for grain, cost in (("channel", 0.02), ("token", 3.0)):
            for capacity, rate, promised in (
                (0.9, 0.0, (1.1, 0.01)),
                (0.5, 0.0, (1.6, 0.08)),
                (0.75, 0.1, (None, None)),
            ):
                speed = {"decode_dense": 1 / capacity, "decode_hf": 2 / capacity, "prefill_dense": 0.8 / capacity}
                known = np.nan if base != "bundled" else cost / capacity**4
                quality = {"docstrings": known, "docstrings_low": 0.8 * known, "docstrings_high": 1.3 * known}
                row = {"base": base, "granularity": grain, "capacity": capacity, "exit_rate": rate}
                row |= dict(zip(("promised_speedup", "promised_increase"), promised, strict=True))
                rows.append(row | {"realised": capacity, "model_share": capacity + 0.05} | speed | quality)
    return pd.DataFrame(rows).astype({"promised_speedup": float, "promised_increase": float})


def exits():
    rows = [(0.1, 22, 0.1), (0.1, 30, 0.9), (0.3, 16, 0.1), (0.3, 22, 0.2), (0.3, 30, 0.7)]
    return pd.DataFrame(rows, columns=["exit_rate", "layers", "share"])


def ideals():
    grid = [(b, g, c) for b in ("bundled", "random:tinyllama") for g in ("channel", "token") for c in (0.1, 0.5, 1.0)]
    table = pd.DataFrame(grid, columns=["base", "granularity", "capacity"])
    return table.assign(ideal=1 / table["capacity"])


MADE = {
    "targets": (targets,),
    "lossless": (lossless,),
    "work_and_time": (promise,),
    "promise": (promise,),
    "exits": (exits,),
    "ceilings": (ideals, promise),
}


def drawn(name):
    return getattr(inference_plots, name)(*(make() for make in MADE[name]))


def points(container):
    """What an errorbar marks: its points, and the ends of its whiskers, ``[n, 2]`` each."""
    line, _, bars = container
    return line.get_xydata(), [np.array(s) for s in bars[0].get_segments()]


@pytest.mark.parametrize("name", MADE)
def test_each_figure_is_drawn_the_same_twice_and_warns_of_nothing(name):
    tables = [make() for make in MADE[name]]
    before = [table.copy() for table in tables]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = getattr(inference_plots, name)(*tables)
        assert isinstance(figure, Figure) and plt.get_fignums() == []
        assert plots.png(figure) == plots.png(drawn(name))
    for table, copy in zip(tables, before, strict=True):
        pd.testing.assert_frame_equal(table, copy)
    assert all(ax.get_xlabel() for ax in figure.axes)


@pytest.mark.parametrize("name", MADE)
def test_a_missing_column_or_an_empty_table_is_named(name):
    draw, first, *others = getattr(inference_plots, name), *(make() for make in MADE[name])
    with pytest.raises(HatError, match="granularity|exit_rate"):
        draw(first.drop(columns="granularity" if "granularity" in first else "exit_rate"), *others)
    with pytest.raises(HatError, match="any row"):
        draw(first.iloc[:0], *others)


@pytest.mark.parametrize("draw", [inference_plots.work_and_time, inference_plots.promise])
def test_speed_without_any_quality_is_refused(draw):
    with pytest.raises(HatError, match="docstrings"):
        draw(promise().assign(docstrings=np.nan))


def test_targets_stand_at_what_was_measured_and_refused_ones_at_the_most_there_is():
    (ax,) = drawn("targets").axes
    channel, token = ax.containers
    at, whiskers = points(token)
    np.testing.assert_allclose(at, [[1.103, 1.12]])  # a little to the right of the other grain's
    np.testing.assert_allclose(whiskers[0][:, 1], [1.05, 1.2])
    np.testing.assert_allclose(points(channel)[0], [[0.9, 0.91]])
    refused = [line.get_xydata().tolist() for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert [[1.1, 0.9]] in refused
    diagonal = next(line for line in ax.lines if line.get_linestyle() == ":")
    assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())


def test_drafts_are_summed_by_kind_and_what_was_not_run_is_left_out():
    stood, speed = drawn("lossless").axes
    assert [t.get_text() for t in stood.get_yticklabels()] == ["list", "code"]
    code = points(stood.containers[1])
    assert code[0][0, 0] == pytest.approx(6 * 8 / sum(10 + i for i in range(1, 12, 2)))
    assert code[1][0][0, 0] < code[0][0, 0] < code[1][0][1, 0]
    plain, early, ours = (points(c)[0][0, 0] for c in speed.containers[:3])
    assert (plain, early) == (0.5, 15 / 40)
    assert ours == pytest.approx(np.median(15 / (20 + np.arange(12))))
    hollow = [line for line in speed.lines if line.get_markerfacecolor() == "none"]
    assert [float(line.get_xdata()[0]) for line in hollow] == [1.1, 1.1]
    none = lossless().assign(ms_early_exit=np.nan)
    assert len(inference_plots.lossless(none).axes[1].containers) == len(speed.containers) - 2


def test_time_is_one_over_speedup_and_what_lies_beyond_is_a_triangle():
    work, decode, prefill = drawn("work_and_time").axes
    expected = ([0.55, 0.95], [0.5, 0.9], [0.5 / 0.8, 0.9 / 0.8])
    for ax, shares in zip((work, decode, prefill), expected, strict=True):
        at, whiskers = points(ax.containers[0])
        np.testing.assert_allclose(at, np.column_stack([shares, [100 * 0.02 / c**4 for c in (0.5, 0.9)]]))
        np.testing.assert_allclose(whiskers[0][:, 1], [0.8 * at[0, 1], 1.3 * at[0, 1]])
    beyond = [line for line in work.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in beyond] == [[MOST]]
    np.testing.assert_allclose(beyond[0].get_xdata(), [0.55])
    assert "beyond" in work.get_ylabel()
    cheap = promise().query("granularity == 'channel'")
    assert "beyond" not in inference_plots.work_and_time(cheap).axes[0].get_ylabel()


def test_exits_are_marked_and_not_joined():
    ax = drawn("work_and_time").axes[0]
    leaving = points(ax.containers[1])[0]
    np.testing.assert_allclose(leaving, [[0.8, 100 * 0.02 / 0.75**4]])
    joined = [line.get_linestyle() for line in ax.lines if len(line.get_xdata()) == 1 and line.get_marker() == "None"]
    assert set(joined) <= {"None"}


def test_the_promise_is_hollow_and_a_base_without_quality_borrows_it():
    bundled, shape = drawn("promise").axes
    assert [ax.get_title(loc="left") for ax in (bundled, shape)] == ["bundled", "random:tinyllama"]
    for ax in (bundled, shape):
        hollow = next(line for line in ax.lines if line.get_markerfacecolor() == "none")
        assert sorted(map(tuple, hollow.get_xydata().tolist())) == [(1.1, 1.0), (1.6, 8.0)]
        assert sorted(t.get_text() for t in ax.texts) == ["0.50", "0.90"]
        cost = [100 * 0.02 / c**4 for c in (0.5, 0.9)]
        over_hf, over_dense = (points(c)[0] for c in ax.containers[:2])
        np.testing.assert_allclose(over_hf, np.column_stack([[2 / 0.5, 2 / 0.9], cost]))
        np.testing.assert_allclose(over_dense, np.column_stack([[1 / 0.5, 1 / 0.9], cost]))
        styles = {line.get_linestyle() for line in ax.lines if line.get_color() == BLUE and len(line.get_xdata()) > 1}
        assert {"-", "--"} <= styles


def test_bars_are_the_shares_and_a_depth_without_tokens_is_zero():
    (ax,) = drawn("exits").axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["16", "22", "30"]
    few, many = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert (few, many) == ([0.0, 0.1, 0.9], [0.1, 0.2, 0.7])


def test_ceilings_are_dotted_and_do_not_hide_what_was_measured():
    ax = drawn("ceilings").axes[0]
    lines = {(line.get_color(), line.get_linestyle()): line.get_xydata() for line in ax.lines}
    np.testing.assert_allclose(lines[BLUE, ":"], [[0.1, 10], [0.5, 2], [1, 1]])
    np.testing.assert_allclose(lines[ORANGE, "--"], [[0.5, 2], [0.9, 1 / 0.9]])
    assert ax.get_ylim()[1] == pytest.approx(1.25 * 2)
    assert sorted(map(tuple, lines["black", "None"].tolist())) == [(0.5, 1.6), (0.9, 1.1)]
