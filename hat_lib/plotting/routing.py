"""Figures of routing patterns, drawn from the tables of `hat_lib.evaluation.routing`.

As in `hat_lib.plotting.style`: a table in, a `Figure` out. Whiskers are 95 % intervals. A hollow point is one whose
difference to the mean of all tokens is within that difference's own interval. Where tokens leave early, a second panel
says how many do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from hat_lib.plotting.style import BLUE, GREEN, GREY, ORANGE, STYLE, WIDTH, need, percent
from hat_lib.plotting.token_heatmap import PALETTE, in_font, visible
from hat_lib.plotting.training import WIDE

BOUNDS = ("mean", "low", "high", "difference", "difference_low", "difference_high")
PANELS = {"share": "executed share", "left": "tokens that leave early"}
LABEL = 12  # characters of a token under the map


def layer_map(table: pd.DataFrame) -> Figure:
    """Layer × token: the executed share, and how far it is from the layer's mean; a cross where a token leaves.

    Args:
        table: a row per cell; ``token``, ``text``, ``exit_layer``, ``layer``, ``share`` (nan after an exit),
            ``difference``.
    """
    need(table, "token", "text", "exit_layer", "layer", "share", "difference")
    tokens = table.drop_duplicates("token")
    share, difference = (table.pivot(index="layer", columns="token", values=v) for v in ("share", "difference"))
    n_layers = len(share)
    most = max(0.01, np.nanquantile(np.abs(difference.to_numpy()), 0.95))  # else the protected tokens leave no colour
    looks = {"cmap": PALETTE, "vmin": 0, "vmax": 1}, {"cmap": "PuOr", "vmin": -most, "vmax": most}
    bars = {"format": percent()}, {"format": lambda v, _: f"{100 * v:+.0f}" if abs(v) > 1e-9 else "0", "extend": "both"}
    titles = "executed share", "executed share − mean of the layer over all tokens, percentage points"
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(max(5.0, 1.8 + 0.165 * len(tokens)), 7.0), layout="constrained")
        axes = fig.subplots(2, 1, sharex=True)
        for ax, cells, look, bar, title in zip(axes, (share, difference), looks, bars, titles, strict=True):
            fig.colorbar(ax.pcolormesh(cells.to_numpy(), **look), ax=ax, pad=0.01, **bar)
            places = range(0, n_layers, max(1, n_layers // 6))
            ax.set_yticks([y + 0.5 for y in places], places)
            ax.set(title=title, ylabel="layer", facecolor="#dddddd")
            ax.grid(visible=False)
            left = np.flatnonzero(tokens["exit_layer"] < n_layers)
            if len(left):
                depth = tokens["exit_layer"].to_numpy()[left]
                ax.plot(left + 0.5, depth + 0.5, "x", color="black", markersize=4.5, label="left before this layer")
        if len(left):
            axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
        labels = [_label(text) for text in tokens["text"]]
        axes[1].set_xticks(np.arange(len(tokens)) + 0.5, labels, rotation=90, fontsize=7.5, parse_math=False)
        axes[1].set_xlabel("token (␣: a space, or part of a character)")
    return fig


def by_class(table: pd.DataFrame) -> Figure:
    """Executed share by token class, least first, with the number of tokens.

    Args:
        table: ``class``, ``measure``, ``tokens``, and `BOUNDS`.
    """
    need(table, "class", "measure", "tokens", *BOUNDS)
    order = table[table["measure"] == "share"].sort_values("mean")[["class", "tokens"]]
    with mpl.rc_context(STYLE):
        measures = _measures(table)
        fig = Figure(figsize=(WIDE if len(measures) > 1 else WIDTH, 1.5 + 0.32 * len(order)), layout="constrained")
        axes = fig.subplots(1, len(measures), squeeze=False, sharey=True)[0]
        for ax, measure in zip(axes, measures, strict=True):
            rows = table[table["measure"] == measure].set_index("class").loc[order["class"]]
            _intervals(ax, rows, np.arange(len(rows)), horizontal=True)
            ax.set_yticks(range(len(rows)), [f"{name} ({n:,})" for name, n in order.itertuples(index=False)])
            ax.set(xlabel=PANELS[measure], ylabel="" if ax is not axes[0] else "class (tokens)")
            ax.grid(axis="y", visible=False)
        _legend(fig)
    return fig


def by_position(table: pd.DataFrame) -> Figure:
    """Executed share by position in the block. The protected tokens, which run in full, are not shown.

    Args:
        table: ``first``, ``last``, ``protected``, ``measure``, and `BOUNDS`.
    """
    need(table, "first", "last", "protected", "measure", *BOUNDS)
    shown = table[~table["protected"].astype(bool)]
    with mpl.rc_context(STYLE):
        fig, panels = _panels(shown)
        for measure, (ax,) in panels.items():
            rows = shown[shown["measure"] == measure]
            _intervals(ax, rows, np.arange(len(rows)), line="-")
            names = [f"{a}–{b}" if a < b else f"{a}" for a, b in zip(rows["first"], rows["last"], strict=True)]
            ax.set_xticks(range(len(rows)), names)
            ax.set(xlabel="position in the block, counted from 0", ylabel=PANELS[measure])
        _legend(fig)
    return fig


def by_quantile(table: pd.DataFrame) -> Figure:
    """Executed share against the base's surprisal and entropy, of the token and of the next, in bins of equal size.

    Args:
        table: ``quantity`` (such as "surprisal_of_token"), ``median`` (nats), ``measure``, and `BOUNDS`.
    """
    need(table, "quantity", "median", "measure", *BOUNDS)
    looks = {"token": (BLUE, "o", "of the token itself"), "next": (ORANGE, "s", "of the next token")}
    with mpl.rc_context(STYLE):
        fig, panels = _panels(table, columns=2)
        for (measure, axes), column in product(panels.items(), range(2)):
            ax, quantity = axes[column], ("surprisal", "entropy")[column]
            for which, (colour, marker, _) in looks.items():
                rows = table[(table["measure"] == measure) & (table["quantity"] == f"{quantity}_of_{which}")]
                _intervals(ax, rows, rows["median"].to_numpy(), colour, marker, line="-")
            ax.set(xlabel=f"the base's {quantity}, nats (median of the bin)", ylabel="" if column else PANELS[measure])
        _legend(fig, [Line2D([], [], color=c, marker=m, label=label) for c, m, label in looks.values()])
    return fig


def by_sensitivity(table: pd.DataFrame) -> Figure:
    """What tokens cost against what was forecast, both relative to the mean of their layer, by depth.

    Args:
        table: ``first``, ``last`` (layers), ``forecast``, ``mean``, ``low``, ``high``.
    """
    need(table, "first", "last", "forecast", "mean", "low", "high")
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        ax = fig.subplots()
        looks = zip(("-", "--", "-."), (BLUE, ORANGE, GREEN), ("o", "s", "^"), strict=True)
        for (line, colour, marker), ((first, last), rows) in zip(looks, table.groupby(["first", "last"]), strict=False):
            ends = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
            ax.errorbar(
                rows["forecast"], rows["mean"], ends, color=colour, linestyle=line, marker=marker, capsize=2,
                elinewidth=1, label=f"layers {first}–{last}",
            )  # fmt: skip
        ends = table[["forecast", "low"]].min().min(), table[["forecast", "high"]].max().max()
        ax.plot(ends, ends, color=GREY, linewidth=1, label="as forecast")
        ax.set(xscale="log", yscale="log", xlabel="forecast, × the layer's mean", ylabel="measured, × the layer's mean")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        ax.legend()
    return fig


FIGURES = {"layer_map": layer_map, "classes": by_class, "positions": by_position, "quantiles": by_quantile}
"""name of a table in `analyze.TABLES` -> its figure"""


def _label(text: str) -> str:
    """A token under the map: short, and in characters that the font has."""
    shown = visible(text).replace("\n", "").strip(" ") or "␣"
    return in_font(shown if len(shown) <= LABEL else shown[: LABEL - 1] + "…")


def _measures(table: pd.DataFrame) -> list[str]:
    """The share, and who leaves early where anybody does."""
    return [m for m in PANELS if m == "share" or table.loc[table["measure"] == m, "mean"].max() > 0]


def _panels(table: pd.DataFrame, columns: int = 1) -> tuple[Figure, dict[str, np.ndarray]]:
    """A figure, and a row of axes for each measure."""
    measures = _measures(table)
    fig = Figure(figsize=(WIDTH if columns == 1 else WIDE, 3.3 * len(measures) + 0.4), layout="constrained")
    return fig, dict(zip(measures, fig.subplots(len(measures), columns, squeeze=False, sharey="row"), strict=True))


def _intervals(ax: Axes, rows: pd.DataFrame, at: np.ndarray, colour=BLUE, marker="o", horizontal=False, line="none"):
    """Means with their whiskers at the places ``at`` of the other axis, and a line at the mean of all tokens."""
    whiskers = [(d).fillna(0).clip(lower=0) for d in (rows["mean"] - rows["low"], rows["high"] - rows["mean"])]
    x, y = (rows["mean"], at) if horizontal else (at, rows["mean"])
    looks = {"color": colour, "linestyle": line, "linewidth": 1, "capsize": 2, "elinewidth": 1}
    (ax.axvline if horizontal else ax.axhline)((rows["mean"] - rows["difference"]).mean(), color=GREY, linewidth=1)
    ax.errorbar(x, y, **{"xerr" if horizontal else "yerr": whiskers}, **looks)
    clear = (rows["difference_low"] > 0) | (rows["difference_high"] < 0)
    ax.scatter(x, y, s=28, marker=marker, c=np.where(clear, colour, "white"), edgecolors=colour, zorder=3)
    (ax.xaxis if horizontal else ax.yaxis).set_major_formatter(percent())


def _legend(fig: Figure, lines: Sequence[Line2D] = ()) -> None:
    point = {"marker": "o", "linestyle": "none", "color": "black"}
    handles = [
        *lines,
        Line2D([], [], color=GREY, label="mean of all tokens"),
        Line2D([], [], **point, label="differs from it (95 %)"),
        Line2D([], [], **point, markerfacecolor="white", label="no difference shown"),
    ]
    fig.legend(handles=handles, ncols=len(handles), loc="outside upper left", fontsize=8)
