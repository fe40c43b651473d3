"""What holds for every figure, and where single points, marks and labels have to be."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from figure_tables import (
    FIGURES,
    claims,
    classes,
    drawn,
    gate_log,
    layer_map,
    lossless,
    positions,
    quality,
    quantiles,
    skipped_ffn,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from hat_lib import config
from hat_lib.config import HatError
from hat_lib.evaluation.routing import TABLES
from hat_lib.plotting import architecture, frontier, routing, style, training
from hat_lib.plotting.style import BLUE, GREY, MOST, ORANGE
from studies.plotting import divergence, findings, speed

WHITE = (1.0, 1.0, 1.0, 1.0)
every_figure = pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.__module__.rsplit('.')[-1]}-{f.__name__}")


def points(container):
    """What an errorbar draws: its points and the ends of its whiskers, ``[n, 2]`` each."""
    line, _, bars = container
    return np.asarray(line.get_xydata(), float), [np.array(s, float) for s in bars[0].get_segments()]


def whiskers(ax, axis):
    """Both ends of each interval on an axes, as drawn."""
    (only,) = ax.containers
    return np.array([segment[:, axis] for segment in only[2][0].get_segments()], dtype=float)


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def hollow(ax):
    """The points of claims."""
    (line,) = (line for line in ax.lines if line.get_markerfacecolor() == "none")
    return sorted(map(tuple, line.get_xydata().tolist()))


# --- every figure ---


@every_figure
def test_each_figure_is_labelled_and_the_same_twice_and_leaves_its_tables_and_pyplot_alone(figure):
    tables = [make() for make in FIGURES[figure]]
    before = [table.copy() for table in tables]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = figure(*tables)
        assert isinstance(made, Figure) and plt.get_fignums() == []
        assert style.png(made) == style.png(drawn(figure))
    for table, copy in zip(tables, before, strict=True):
        pd.testing.assert_frame_equal(table, copy)
    shown = [ax for ax in made.axes if ax.get_label() != "<colorbar>"]
    assert shown[-1].get_xlabel() and (shown[0].get_ylabel() or shown[0].get_yticklabels())


@every_figure
def test_a_missing_column_or_an_empty_table_is_named(figure):
    first, *others = (make() for make in FIGURES[figure])
    known = next(c for c in ("kl", "granularity", "capacity", *first) if c in first)
    for column in {known, "share_0"} & set(first):
        with pytest.raises(HatError, match=f"missing: .*'{column}'"):
            figure(first.drop(columns=column), *others)
    with pytest.raises(HatError, match="any row"):
        figure(first.iloc[:0], *others)


def test_claims_without_their_numbers_are_refused():
    with pytest.raises(HatError, match="promised_increase"):
        findings.kept(quality(), claims().assign(promised_increase=np.nan))
    for figure in (speed.work_and_time, speed.promise):
        with pytest.raises(HatError, match="docstrings"):
            figure(claims().assign(docstrings=np.nan))


def test_a_figure_is_saved_on_a_white_ground_and_shown_as_the_picture_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "FIGURES", tmp_path / "figures")
    seen = []
    monkeypatch.setattr(style, "display", lambda data, **how: seen.append((data, how)))
    style.show(style.skipped_ffn(skipped_ffn()), "one", "what to see")
    assert plt.imread(tmp_path / "figures" / "one.png")[0, 0, :3].tolist() == [1, 1, 1]  # on dark pages too
    ((data, how),) = seen
    assert set(data) == {"image/png"} and how == {"metadata": {"image/png": {"alt": "what to see"}}, "raw": True}


# --- style, frontier ---


def test_bars_intervals_and_points_stand_where_the_table_says():
    (ax,) = drawn(style.weight_shares).axes
    assert max(bar.get_x() + bar.get_width() for bar in ax.patches) == pytest.approx(1)
    assert [t.get_text() for t in ax.texts] == ["60%", "70%", "20%", "20%", "20%", "10%"]
    (ax,) = drawn(speed.exits).axes
    assert labels(ax.xaxis) == ["16", "22", "30"]
    few, many = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert (few, many) == ([0.0, 0.1, 0.9], [0.1, 0.2, 0.7])  # a depth without tokens is zero
    (ax,) = drawn(style.skipped_ffn).axes
    np.testing.assert_allclose(points(ax.containers[0])[0], skipped_ffn()[["layer", "ratio"]])
    np.testing.assert_allclose(whiskers(ax, 1), skipped_ffn()[["low", "high"]])


def test_the_frontier_shows_gains_and_disasters_on_one_axis():
    (ax,) = drawn(style.grain_frontier).axes
    low, high = ax.get_ylim()
    assert ax.get_yscale() == "symlog" and low < -0.4 and high > 4000  # in per cent
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["x", "y"]


def test_the_benchmark_has_a_panel_per_phase_and_a_row_per_base():
    axes = drawn(style.benchmark).axes
    titles = [ax.get_title(loc="left") for ax in axes]
    assert len(axes) == 6 and titles[0].endswith("decode, batch 1") and titles[5].endswith("decode, batch 8")
    assert len(axes[0].lines) == 2 * 3 + 1  # each grain: ideal, vs transformers, vs own dense; and 1x


def test_every_variant_has_its_line_without_exits_and_the_better_measured_row_counts():
    again = quality().query("capacity == 0.9 and variant == 'trained'").assign(tokens=20_000, increase=0.7)
    fig = frontier.quality(pd.concat([again, quality()]))
    assert [ax.get_title(loc="left") for ax in fig.axes] == [
        f"{grain} grain, {text}" for grain in ("channel", "token") for text in ("addresses", "docstrings")
    ]
    np.testing.assert_allclose(points(fig.axes[0].containers[0])[0], [[0.25, 200], [0.45, 50], [0.7, 5.5], [0.95, 70]])
    assert [len(ax.containers) for ax in fig.axes] == [3, 3, 3, 3]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["trained", "untrained", "random"]


def test_a_divergence_has_a_panel_for_each_text_with_exits_beside_the_dial():
    fig = drawn(divergence.divergence)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["addresses", "docstrings"]
    lines = {line.get_color(): line for line in fig.axes[0].lines}
    np.testing.assert_allclose(lines[style.BROWN].get_xydata(), [[0.97, 0.15]])
    np.testing.assert_allclose(lines[style.BLUE].get_xydata()[0], [0.25, 1.0])
    assert len(lines) == 4, "trained, untrained, random, and leaving early"


def test_a_sweep_has_no_whiskers_where_there_is_no_interval():
    increase, top1 = drawn(frontier.sweep).axes
    np.testing.assert_allclose(whiskers(increase, 1), [[0.2, 0.4], [0.01, 0.01]])
    assert [t.get_text() for t in increase.texts] == ["0.4", "0.9"]
    assert top1.lines[0].get_xydata().tolist() == [[0.42, 0.8], [0.88, 0.9]]


# --- findings ---


def test_prices_stand_at_realised_capacities_and_the_claim_is_hollow():
    for ax in drawn(findings.promised).axes:
        np.testing.assert_allclose(hollow(ax), [[0.4, 12], [0.9, 1]])
        trained, untrained, published, ours = (points(c) for c in ax.containers)
        np.testing.assert_allclose(trained[0], [[0.39, 50], [0.64, 5.5], [0.89, 0.5]])
        np.testing.assert_allclose(trained[1][0][:, 1], [45, 55])
        np.testing.assert_allclose(untrained[0][:, 1], [400, 100, 11, 1])
        np.testing.assert_allclose(published[0], [[0.39, 80], [0.89, 80]])
        beyond = [line for line in ax.lines if line.get_marker() == "^" and len(line.get_xdata())]
        assert [line.get_xydata().tolist() for line in beyond] == [[[0.39, MOST]]]
        np.testing.assert_allclose(ours[0], [[0.64, 550], [0.89, 50]])
    fig = drawn(findings.promised)
    assert "beyond" in fig.axes[0].get_ylabel() and fig.legends[0].get_texts()[0].get_text() == "claimed"


def test_a_speedup_is_split_at_our_own_dense_path():
    bundled, shape = drawn(findings.speeds).axes
    assert [ax.get_title(loc="left") for ax in (bundled, shape)] == [
        "bundled base, 135M",
        "TinyLlama's shape, random weights",
    ]
    ran = [f"{c:.2f} (ran {c - 0.02:.2f})" for c in (0.9, 0.4)]
    assert labels(bundled.yaxis) == [f"{grain} {text}" for grain in ("channel", "token") for text in ran]
    dense = [0.9 / c for c in (0.9, 0.4)]
    thick = [(line.get_color(), *line.get_xdata()) for line in bundled.lines if line.get_linewidth() == 6]
    assert thick == [(colour, 1, x) for colour in (BLUE, ORANGE) for x in dense]
    grey = [list(line.get_xdata()) for line in bundled.lines if line.get_color() == GREY]
    assert grey[:-1] == [x for c, d in zip((0.9, 0.4), dense, strict=True) for x in ([d, 2 / c], [2 / c])] * 2
    ideal = [float(line.get_xdata()[0]) for line in bundled.lines if line.get_marker() == "|"]
    assert ideal == pytest.approx([1 / 0.9, 1 / 0.4] * 2)


def test_exits_stand_beside_the_line_of_capacities_with_their_rate():
    for ax in drawn(findings.exits).axes:
        dial, chosen, at_random = (points(c)[0] for c in ax.containers)
        np.testing.assert_allclose(dial, [[0.25, 200], [0.45, 50], [0.7, 5.5], [0.95, 0.5]])
        np.testing.assert_allclose(chosen, [[0.97, 30]])
        np.testing.assert_allclose(at_random, [[0.97, 60]])
        assert [t.get_text() for t in ax.texts] == ["0.1"]
        assert ax.get_ylim()[1] == pytest.approx(1.4 * 220)
    without = quality().query("exit_rate == 0")
    assert [len(ax.texts) for ax in findings.exits(without).axes] == [0, 0]


# --- speed ---


def test_targets_stand_at_what_was_measured_and_refused_ones_at_the_most_there_is():
    (ax,) = drawn(speed.targets).axes
    channel, token = ax.containers
    at, ends = points(token)
    np.testing.assert_allclose(at, [[1.12, 1.12]])  # a little to the right of the other grain's
    np.testing.assert_allclose(ends[0][:, 1], [1.05, 1.2])
    np.testing.assert_allclose(points(channel)[0], [[0.9, 0.91]])
    refused = [line.get_xydata().tolist() for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert [[1.1, 0.9]] in refused
    diagonal = next(line for line in ax.lines if line.get_linestyle() == ":")
    assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())


def test_a_part_of_a_token_has_its_spread_and_is_hollow_where_that_includes_nothing():
    plain, dense, ours = drawn(speed.token_time).axes
    filled = [[bar.get_facecolor() != WHITE for bar in ax.patches if np.isfinite(bar.get_width())]
              for ax in (plain, dense, ours)]  # fmt: skip
    assert not any(filled[0]) and all(filled[1]) and filled[2].count(False) == 1
    at, ends = points(dense.containers[-1])
    assert at[0].tolist() == [1.5, 0] and ends[0][:, 0].tolist() == [0.5, 2.0]


def test_a_learning_curve_is_read_at_the_work_before_the_first_step():
    share, less = np.array([0.8, 0.6, 0.4]), np.array([0.77, 0.57, 0.37])
    kl, increase = lambda share: np.exp(1 - 8 * share), lambda share: np.exp(2 - 3 * share) - 1
    before = {"tokens": 0, "capacity": [0.75, 0.55, 0.35], "share": share, "kl": 2 * kl(share)}
    before = pd.DataFrame(before | {"increase": 2 * increase(share)})
    after = before.assign(tokens=1000, share=less, kl=kl(less), increase=increase(less))  # half, at less work
    read = training.at_equal_work(pd.concat([before, after]))
    assert read["share"].tolist() == [*share, *share]
    for name, line in (("kl", kl), ("increase", increase)):
        np.testing.assert_allclose(read.query("tokens == 1000")[name], line(share), rtol=1e-12)
    alone = pd.concat([before, after]).query("capacity == 0.55")
    pd.testing.assert_frame_equal(training.at_equal_work(alone), alone)


def test_drafts_are_summed_by_kind_and_what_was_not_run_is_left_out():
    stood, times = drawn(speed.lossless).axes
    assert labels(stood.yaxis) == ["list", "code"]
    code = points(stood.containers[1])
    assert code[0][0, 0] == pytest.approx(6 * 8 / sum(10 + i for i in range(1, 12, 2)))
    assert code[1][0][0, 0] < code[0][0, 0] < code[1][0][1, 0]
    plain, early, ours = (points(c)[0][0, 0] for c in times.containers[:3])
    assert (plain, early) == (0.5, 15 / 40)
    assert ours == pytest.approx(np.median(15 / (20 + np.arange(12))))
    ideal = [line for line in times.lines if line.get_markerfacecolor() == "none"]
    assert [float(line.get_xdata()[0]) for line in ideal] == [1.1, 1.1]
    none = lossless().assign(ms_early_exit=np.nan)
    assert len(speed.lossless(none).axes[1].containers) == len(times.containers) - 2


def test_time_is_one_over_speedup_exits_are_apart_and_what_lies_beyond_is_a_triangle():
    work, decode, prefill = drawn(speed.work_and_time).axes
    expected = ([0.45, 0.95], [0.4 / 0.9, 1], [0.5, 0.9 / 0.8])
    for ax, shares in zip((work, decode, prefill), expected, strict=True):
        at, ends = points(ax.containers[0])
        np.testing.assert_allclose(at, np.column_stack([shares, [100 * 0.02 / c**4 for c in (0.4, 0.9)]]))
        np.testing.assert_allclose(ends[0][:, 1], [0.8 * at[0, 1], 1.3 * at[0, 1]])
    np.testing.assert_allclose(points(work.containers[1])[0], [[0.8, 100 * 0.02 / 0.75**4]])  # with exits
    beyond = [line for line in work.lines if line.get_marker() == "^" and len(line.get_xdata())]
    np.testing.assert_allclose([line.get_xydata()[0] for line in beyond], [[0.45, MOST]])
    assert "beyond" in work.get_ylabel()
    cheap = claims().query("granularity == 'channel'")
    assert "beyond" not in speed.work_and_time(cheap).axes[0].get_ylabel()


def test_the_claim_is_hollow_and_a_base_without_quality_is_left_out():
    (ax,) = drawn(speed.promise).axes
    assert ax.get_title(loc="left") == "bundled base, 135M"
    assert hollow(ax) == [(1.1, 1.0), (1.8, 12.0)]
    assert sorted(t.get_text() for t in ax.texts) == ["0.40", "0.90"]
    cost = [100 * 0.02 / c**4 for c in (0.4, 0.9)]
    over_hf, over_dense = (points(c)[0] for c in ax.containers[:2])
    np.testing.assert_allclose(over_hf, np.column_stack([[2 / 0.4, 2 / 0.9], cost]))
    np.testing.assert_allclose(over_dense, np.column_stack([[0.9 / 0.4, 1], cost]))
    styles = {line.get_linestyle() for line in ax.lines if line.get_color() == BLUE and len(line.get_xdata()) > 1}
    assert {"-", "--"} <= styles


def test_the_texts_in_the_picture_of_a_layer_stand_inside_it_and_apart():
    fig = architecture.layer()
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    (ax,) = fig.axes
    boxes = {text.get_text(): text.get_window_extent(canvas.get_renderer()) for text in ax.texts}
    assert {"q | k | v", "gate | up", "exit gate"} <= set(boxes)
    for text, box in boxes.items():
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1, text
        assert not any(box.overlaps(other) for name, other in boxes.items() if name != text), text
    assert style.png(architecture.layer()) == style.png(architecture.layer())


def test_ticks_of_shares_are_true():
    assert [style.PERCENT(v) for v in (0.0, 0.575, 0.6, 1.0)] == ["0%", "57.5%", "60%", "100%"]


# --- routing ---


def test_there_is_a_figure_for_each_table_that_has_one():
    assert set(routing.FIGURES) <= set(TABLES) and set(routing.FIGURES.values()) <= set(FIGURES)


def test_classes_are_in_order_with_counts_and_intervals_and_filled_where_clear_of_the_mean():
    (ax,) = routing.by_class(classes().iloc[[2, 0, 1, 5, 3, 4]]).axes
    assert labels(ax.yaxis) == ["space (10)", "digits (2,000)", "name (3)"]
    np.testing.assert_allclose(whiskers(ax, 0), [[0.48, 0.52], [0.57, 0.61], [0.68, 0.72]])
    np.testing.assert_allclose(ax.collections[-1].get_offsets()[:, 0], [0.5, 0.59, 0.7])
    mean = next(line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1])
    assert mean.get_xdata()[0] == pytest.approx(0.6)
    faces = [[tuple(face) for face in ax.collections[-1].get_facecolors()]
             for ax in routing.by_class(classes(left=0.1)).axes]  # fmt: skip
    assert faces == [[to_rgba(BLUE), WHITE, to_rgba(BLUE)], [WHITE] * 3]  # on the right 0.02 ± 0.02, and no interval


def test_exits_have_a_panel_only_where_somebody_leaves():
    draws = (routing.by_class, classes), (routing.by_position, positions), (routing.by_quantile, quantiles)
    assert [len(draw(make()).axes) for draw, make in draws] == [1, 1, 2]
    assert [len(draw(make(0.1)).axes) for draw, make in draws] == [2, 2, 4]
    (ax,) = drawn(routing.by_position).axes
    assert labels(ax.xaxis) == ["2–3", "4–7"]  # protected positions are not drawn
    np.testing.assert_allclose(whiskers(ax, 1), [[0.57, 0.61], [0.68, 0.72]])


def test_quantiles_stand_at_their_medians_of_this_token_and_of_the_next():
    surprisal, entropy = drawn(routing.by_quantile).axes
    for ax, name in ((surprisal, "surprisal"), (entropy, "entropy")):
        assert name in ax.get_xlabel() and "nats" in ax.get_xlabel()
        assert [c[0].get_xdata().tolist() for c in ax.containers] == [[0.1, 2.0, 6.0]] * 2
    legend = [t.get_text() for t in surprisal.figure.legends[0].get_texts()]
    assert legend[:2] == ["of the token itself", "of the next token"]


def test_the_map_is_blank_from_a_cross_on_and_its_labels_are_short_and_in_the_font():
    share, difference, *_ = drawn(routing.layer_map).axes
    for ax, values in ((share, "share"), (difference, "difference")):
        (heat,), (crosses,) = ax.collections, ax.lines
        cells = layer_map().pivot(index="layer", columns="token", values=values).to_numpy()
        np.testing.assert_allclose(np.ma.filled(heat.get_array(), np.nan).reshape(4, 3), cells)
        assert np.isnan(cells[2:, 1]).all() and np.isfinite(cells[:2, 1]).all()
        assert (crosses.get_xdata().tolist(), crosses.get_ydata().tolist()) == ([1.5], [2.5])
    stayed = routing.layer_map(layer_map(exits=(4, 4, 4), texts=(" $x$" + "=" * 60, "🦙\x1b", ""))).axes[:2]
    assert all(len(ax.lines) == 0 and ax.get_legend() is None for ax in stayed)
    assert labels(stayed[1].xaxis) == ["$x$========…", "□□", "␣"]


def test_forecasts_stand_against_what_came_beside_the_diagonal():
    (ax,) = drawn(routing.by_sensitivity).axes
    assert [points(c)[0].tolist() for c in ax.containers] == [[[0.5, 0.6], [2.0, 1.8]], [[0.4, 0.5], [3.0, 2.0]]]
    diagonal = next(line for line in ax.lines if line.get_label() == "as forecast").get_xydata()
    assert (diagonal[:, 0] == diagonal[:, 1]).all() and diagonal[0, 0] <= 0.4 and diagonal[1, 0] >= 3
    assert [c.get_label() for c in ax.containers] == ["layers 0–1", "layers 2–3"]


# --- training ---


def test_layers_are_in_order_and_sites_are_no_layers():
    table = pd.DataFrame(columns=["share_ffn", "share", "share_0", "share_1", "share_10", "share_qkv"])
    assert training.layer_columns(table) == ["share_0", "share_1", "share_10"]


def test_live_draws_while_the_log_grows_and_keeps_the_last_drawing(tmp_path, monkeypatch):
    """One picture, updated in place; none before there is a row, none too soon, none from a second process."""
    shown, updated = [], []

    class Handle:
        def update(self, bundle, **how):
            updated.append(bundle)

    monkeypatch.setattr(config, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(training, "display", lambda bundle, **how: shown.append((bundle, how)) or Handle())
    log, whole = tmp_path / "log.csv", gate_log()
    live = training.Live(log, training.gates, "gates", "what it shows", every=0)

    def at(rows, ended=False):
        whole.head(rows).to_csv(log, index=False)
        live(ended)

    at(0)
    assert not shown and not updated
    at(5)
    live.every = 3600
    at(8)
    at(9)
    at(12, ended=True)
    (bundle, how), *more = shown
    assert not more and len(updated) == 2 and how["metadata"] == {"image/png": {"alt": "what it shows"}}
    assert set(bundle) == {"image/png"} and updated[0] != updated[1]
    assert (tmp_path / "figures" / "gates.png").read_bytes() == style.png(training.gates(whole))


@pytest.mark.parametrize("largest", [0.02, 1.4, 50.0])
def test_an_axis_of_increases_reaches_the_largest_that_is_drawn(largest):
    ax = Figure().subplots()
    style.increases(ax, [0, 1, 10], "speedup", largest)
    low, high = ax.get_ylim()
    assert low < 0 and high > min(100 * largest, style.MOST)
