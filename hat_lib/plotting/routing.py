"""Figures of routing patterns, most of them drawn from the tables of `hat_lib.evaluation.routing`.

Whiskers are 95 % intervals. A point is hollow unless the interval of its difference from the mean of all tokens
excludes 0. Where tokens leave early, a second panel shows how many do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, GREY, ORANGE, PERCENT, WIDE, WIDTH, draws, entry
from hat_lib.plotting.token_heatmap import in_font
from hat_lib.text.coloured import PALETTE, visible

ENDS = ["mean", "low", "high"]
BOUNDS = (*ENDS, "difference", "difference_low", "difference_high")
LABEL = 12  # most characters of a token to show under the map
AFTER = "#dddddd"  # layers a token did not enter


@draws("token", "text", "exit_layer", "protected", "layer", "share", "difference")
def layer_map(table: pd.DataFrame) -> Figure:
    """Layer × token: the executed share, and its difference from the layer's mean; a cross where a token leaves."""
    tokens = table.drop_duplicates("token")
    share, difference = (table.pivot(index="layer", columns="token", values=v) for v in ("share", "difference"))
    n_layers = len(share)
    most = max(0.01, np.nanquantile(np.abs(difference.to_numpy()), 0.95))  # or protected tokens would dominate
    all_series = {"cmap": PALETTE, "vmin": 0, "vmax": 1}, {"cmap": "PuOr", "vmin": -most, "vmax": most}
    bars = {"format": PERCENT}, {"format": _points, "extend": "both"}
    titles = "executed share", "less the layer's mean over all tokens, percentage points"
    left = np.flatnonzero(tokens["exit_layer"] < n_layers)
    fig, axes = style.panels(1, 2, 7.0, max(5.0, 1.8 + 0.165 * len(tokens)), sharex=True)
    for ax, cells, series, bar, title in zip(axes, (share, difference), all_series, bars, titles, strict=True):
        fig.colorbar(ax.pcolormesh(cells.to_numpy(), **series), ax=ax, pad=0.01, **bar)
        places = range(0, n_layers, max(1, n_layers // 6))
        ax.set_yticks([y + 0.5 for y in places], places)
        ax.set(title=title, ylabel="layer", facecolor=AFTER)
        ax.grid(visible=False)
        if len(left):
            depth = tokens["exit_layer"].to_numpy()[left]
            ax.plot(left + 0.5, depth + 0.5, "x", color="black", markersize=4.5, label="left before this layer")
    names = [Patch(color=AFTER, label="had left")] * bool(len(left))
    if table["protected"].any():
        names.append(Patch(color=colormaps[PALETTE](1.0), label="at the start: protected, runs in full"))
    names += axes[0].get_legend_handles_labels()[0]
    if names:
        style.legend_below(fig, names)
    labels = [visible(text).replace("\n", "").strip(" ") or "␣" for text in tokens["text"]]
    labels = [in_font(text if len(text) <= LABEL else text[: LABEL - 1] + "…") for text in labels]
    axes[1].set_xticks(np.arange(len(tokens)) + 0.5, labels, rotation=90, fontsize=7.5, parse_math=False)
    axes[1].set_xlabel("token (␣: a space, or part of a character)")
    return fig


def _points(share: float, _=None) -> str:
    """A difference of shares in percentage points, shortened without losing accuracy: +2.5, 0."""
    return f"{round(100 * share, 6):+g}" if abs(share) > 1e-9 else "0"


@draws("class", "measure", "tokens", *BOUNDS)
def by_class(table: pd.DataFrame) -> Figure:
    """Executed share by token class, lowest first, with the number of tokens."""
    measures = _by_measure(table)
    order = measures[0][1].sort_values("mean")
    width = WIDE if len(measures) > 1 else WIDTH
    fig, axes = style.panels(len(measures), height=1.5 + 0.32 * len(order), width=width)
    for ax, (label, rows) in zip(axes, measures, strict=True):
        _intervals(ax, rows.set_index("class").loc[order["class"]], np.arange(len(order)), horizontal=True)
        ax.set_xlabel(label)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(order)), order["class"] + order["tokens"].map(" ({:,})".format))
    axes[0].set_ylabel("class (tokens)")
    _legend(fig)
    return fig


@draws("first", "last", "protected", "measure", *BOUNDS)
def by_position(table: pd.DataFrame) -> Figure:
    """Executed share by position in the block. Protected tokens, which run in full, are not shown."""
    measures = _by_measure(table[~table["protected"].astype(bool)])
    fig, axes = style.panels(1, len(measures), 3.3 * len(measures) + 0.4)
    for ax, (label, rows) in zip(axes, measures, strict=True):
        _intervals(ax, rows, np.arange(len(rows)), line="-")
        names = [f"{a}–{b}" if a < b else f"{a}" for a, b in zip(rows["first"], rows["last"], strict=True)]
        ax.set_xticks(range(len(rows)), names)
        ax.set(xlabel="position in the block, counted from 0", ylabel=label)
    _legend(fig)
    return fig


@draws("quantity", "median", "measure", *BOUNDS)
def by_quantile(table: pd.DataFrame) -> Figure:
    """Executed share against the base's surprisal and entropy (nats) of the token and of the next, in equal bins."""
    all_series = {"token": (BLUE, "o", "of the token itself"), "next": (ORANGE, "s", "of the next token")}
    measures = _by_measure(table)
    fig, axes = style.panels(2, len(measures), 3.3 * len(measures) + 0.4, WIDE)
    for (label, rows), pair in zip(measures, np.reshape(axes, (-1, 2)), strict=True):
        pair[0].set_ylabel(label)
        for ax, quantity in zip(pair, ("surprisal", "entropy"), strict=True):
            ax.set_xlabel(f"the base's {quantity}, nats (median of the bin)")
            for which, (colour, marker, _) in all_series.items():
                part = rows[rows["quantity"] == f"{quantity}_of_{which}"]
                _intervals(ax, part, part["median"].to_numpy(), colour, marker, line="-")
    _legend(fig, [entry(label, colour, marker, "-") for colour, marker, label in all_series.values()])
    return fig


FIGURES = {"layer_map": layer_map, "classes": by_class, "positions": by_position, "quantiles": by_quantile}
"""name of a table in `hat_lib.evaluation.routing.TABLES` -> its figure"""


def _by_measure(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Label and rows of the executed share and, if any tokens leave early, of how many do."""
    share, left = (table[table["measure"] == measure] for measure in ("share", "left"))
    found = [("executed share", share), ("tokens that leave early", left)]
    return found if left["mean"].max() > 0 else found[:1]


def _intervals(ax: Axes, rows: pd.DataFrame, at: np.ndarray, colour=BLUE, marker="o", horizontal=False, line="none"):
    """Means with whiskers at positions ``at`` of the other axis, and a line at the mean of all tokens."""
    x, y = (rows["mean"], at) if horizontal else (at, rows["mean"])
    (ax.axvline if horizontal else ax.axhline)((rows["mean"] - rows["difference"]).mean(), color=GREY, linewidth=1)
    style.whiskers(ax, at, rows[ENDS], colour, "none", line, horizontal, linewidth=1)
    clear = (rows["difference_low"] > 0) | (rows["difference_high"] < 0)
    ax.scatter(x, y, s=28, marker=marker, c=np.where(clear, colour, "white"), edgecolors=colour, zorder=3)
    (ax.xaxis if horizontal else ax.yaxis).set_major_formatter(PERCENT)


def _legend(fig: Figure, lines: Sequence[Line2D] = ()) -> None:
    mean = entry("mean of all tokens", GREY, line="-")
    hollow = entry("no difference shown", marker="o", markerfacecolor="white")
    entries = [*lines, mean, entry("differs from it (95 %)", marker="o"), hollow]
    style.legend_below(fig, entries, loc="outside upper left", fontsize=8)
