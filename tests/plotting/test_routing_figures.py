"""Figures of routing patterns: from plain tables, the same bytes each time, points and marks where the tables say."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from hat_lib.config import HatError
from hat_lib.evaluation.routing import TABLES
from hat_lib.plotting import routing as pattern_plots
from hat_lib.plotting import style as plots
from hat_lib.plotting.style import BLUE

WHITE = (1.0, 1.0, 1.0, 1.0)


def intervals(means, differences, half=0.02):
    """Means with intervals of ``half``; a difference that is nan has none."""
    means, differences = np.array(means), np.array(differences, dtype=float)
    table = pd.DataFrame({"mean": means, "low": means - half, "high": means + half})
    bounds = {"difference_low": differences - half, "difference_high": differences + half}
    return table.assign(difference=np.nan_to_num(differences), **bounds)


def measured(keys, left=0.0):
    """Share and exits of the groups ``keys``: the first is clearly below the mean, the second not, the third above."""
    share = intervals([0.5, 0.59, 0.7], [-0.1, -0.01, 0.1])
    early = intervals([left, 1.2 * left, left], [0.0, 0.02, np.nan])
    return pd.concat([keys.assign(measure="share").join(share), keys.assign(measure="left").join(early)])


def classes(left=0.0):
    return measured(pd.DataFrame({"class": ["space", "digits", "name"], "tokens": [10, 2000, 3]}), left)


def positions(left=0.0):
    keys = {"first": [0, 2, 4], "last": [1, 3, 7], "protected": [True, False, False]}
    return measured(pd.DataFrame(keys), left)


def quantiles(left=0.0):
    names = [f"{name}_of_{which}" for name in ("surprisal", "entropy") for which in ("token", "next")]
    parts = [measured(pd.DataFrame({"quantity": name, "median": [0.1, 2.0, 6.0]}), left) for name in names]
    return pd.concat(parts, ignore_index=True)


def layer_map(exits=(4, 2, 4), texts=(" the", "🦙", "\n")):
    layer, token = (grid.ravel() for grid in np.meshgrid(range(4), range(3), indexing="xy"))
    table = pd.DataFrame({"token": token, "text": np.array(texts)[token], "exit_layer": np.array(exits)[token]})
    share = np.where(layer < table["exit_layer"], 0.2 * layer + 0.1 * token, np.nan)
    return table.assign(layer=layer, share=share, difference=share - 0.4)


MADE = {"layer_map": layer_map, "classes": classes, "positions": positions, "quantiles": quantiles}


def whiskers(ax, axis):
    """Both ends of each interval of an axes, as drawn."""
    (drawn,) = ax.containers
    return np.array([segment[:, axis] for segment in drawn[2][0].get_segments()], dtype=float)


def test_there_is_a_figure_for_each_table_that_has_one():
    assert set(MADE) == set(pattern_plots.FIGURES) <= set(TABLES)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_each_figure_is_drawn_the_same_twice_and_warns_of_nothing(name, left):
    table = MADE[name]() if not left or name == "layer_map" else MADE[name](left=0.1)
    before, draw = table.copy(), pattern_plots.FIGURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(table)
        assert isinstance(figure, Figure) and plt.get_fignums() == []
        assert plots.png(figure) == plots.png(draw(table))
    pd.testing.assert_frame_equal(table, before)
    shown = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert any(ax.get_xlabel() for ax in shown) and shown[0].get_ylabel()


@pytest.mark.parametrize("name", MADE)
def test_a_missing_column_or_an_empty_table_is_named(name):
    table, draw = MADE[name](), pattern_plots.FIGURES[name]
    column = table.columns[-1]
    with pytest.raises(HatError, match=column):
        draw(table.drop(columns=column))
    with pytest.raises(HatError, match="any row"):
        draw(table.iloc[:0])


def test_classes_are_in_order_with_their_counts_and_intervals():
    (ax,) = pattern_plots.by_class(classes().iloc[[2, 0, 1, 5, 3, 4]]).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["space (10)", "digits (2,000)", "name (3)"]
    np.testing.assert_allclose(whiskers(ax, 0), [[0.48, 0.52], [0.57, 0.61], [0.68, 0.72]])
    (points,) = ax.collections[-1:]
    np.testing.assert_allclose(points.get_offsets()[:, 0], [0.5, 0.59, 0.7])
    mean = next(line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1])
    assert mean.get_xdata()[0] == pytest.approx(0.6)


def test_only_points_clear_of_the_mean_are_filled():
    share, left = pattern_plots.by_class(classes(left=0.1)).axes
    faces = [tuple(face) for face in share.collections[-1].get_facecolors()]
    assert faces == [to_rgba(BLUE), WHITE, to_rgba(BLUE)]
    assert [tuple(face) for face in left.collections[-1].get_facecolors()] == [
        WHITE
    ] * 3  # 0.02 ± 0.02, and no interval
    assert share.get_xlabel() == "executed share" and left.get_xlabel() == "tokens that leave early"


def test_exits_have_a_panel_only_where_somebody_leaves():
    draws = pattern_plots.by_class, pattern_plots.by_position, pattern_plots.by_quantile
    nobody = classes(), positions(), quantiles()
    assert [len(draw(table).axes) for draw, table in zip(draws, nobody, strict=True)] == [1, 1, 2]
    somebody = classes(0.1), positions(0.1), quantiles(0.1)
    assert [len(draw(table).axes) for draw, table in zip(draws, somebody, strict=True)] == [2, 2, 4]


def test_protected_positions_are_not_drawn():
    ax = pattern_plots.by_position(positions()).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2–3", "4–7"]
    np.testing.assert_allclose(whiskers(ax, 1), [[0.57, 0.61], [0.68, 0.72]])


def test_quantiles_stand_at_their_medians_of_this_token_and_of_the_next():
    surprisal, entropy = pattern_plots.by_quantile(quantiles()).axes[:2]
    for ax, name in ((surprisal, "surprisal"), (entropy, "entropy")):
        assert name in ax.get_xlabel() and "nats" in ax.get_xlabel()
        assert [c[0].get_xdata().tolist() for c in ax.containers] == [[0.1, 2.0, 6.0]] * 2
    legend = [t.get_text() for t in surprisal.figure.legends[0].get_texts()]
    assert legend[:2] == ["of the token itself", "of the next token"]


def test_the_map_is_blank_from_a_cross_on():
    share, difference = (ax for ax in pattern_plots.layer_map(layer_map()).axes if ax.get_label() != "<colorbar>")
    for ax, values in ((share, "share"), (difference, "difference")):
        (heat,), (crosses,) = ax.collections, ax.lines
        cells = layer_map().pivot(index="layer", columns="token", values=values).to_numpy()
        np.testing.assert_allclose(np.ma.filled(heat.get_array(), np.nan).reshape(4, 3), cells)
        assert np.isnan(cells[2:, 1]).all() and np.isfinite(cells[:2, 1]).all()
        assert (crosses.get_xdata().tolist(), crosses.get_ydata().tolist()) == ([1.5], [2.5])
    stayed = pattern_plots.layer_map(layer_map(exits=(4, 4, 4)))
    assert all(len(ax.lines) == 0 and ax.get_legend() is None for ax in stayed.axes if ax.get_label() != "<colorbar>")


def test_labels_are_short_and_in_the_font():
    texts = (" $x$" + "=" * 60, "🦙\x1b", "")
    axes = pattern_plots.layer_map(layer_map(texts=texts)).axes
    labels = [t.get_text() for t in axes[1].get_xticklabels()]
    assert labels == ["$x$========…", "□□", "␣"]


def test_forecasts_stand_against_what_came_beside_the_diagonal():
    table = pd.DataFrame({"first": [0, 0, 2, 2], "last": [1, 1, 3, 3], "forecast": [0.5, 2.0, 0.4, 3.0]})
    table = table.assign(mean=[0.6, 1.8, 0.5, 2.0], low=[0.5, 1.6, 0.4, 1.5], high=[0.7, 2.1, 0.6, 2.5])
    (ax,) = pattern_plots.by_sensitivity(table).axes
    assert [c[0].get_xydata().tolist() for c in ax.containers] == [[[0.5, 0.6], [2.0, 1.8]], [[0.4, 0.5], [3.0, 2.0]]]
    diagonal = next(line for line in ax.lines if line.get_label() == "as forecast").get_xydata()
    assert (diagonal[:, 0] == diagonal[:, 1]).all() and diagonal[0, 0] <= 0.4 and diagonal[1, 0] >= 3
    assert [c.get_label() for c in ax.containers] == ["layers 0–1", "layers 2–3"]
    with pytest.raises(HatError, match="forecast"):
        pattern_plots.by_sensitivity(table.drop(columns="forecast"))
