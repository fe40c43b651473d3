"""Figures of routing patterns, drawn from the tables of `hat_lib.evaluation.routing_tables`.

As in `hat_lib.plotting.style`: a table in, a `Figure` out. Whiskers are 95 % intervals. A hollow point is one whose
difference to the mean of all tokens is within that difference's own interval. Where tokens leave early, a second panel
says how many do.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from hat_lib.plotting.style import BLUE, GREEN, GREY, ORANGE, STYLE, WIDTH, need, percent
from hat_lib.plotting.token_heatmap import PALETTE, visible
from hat_lib.plotting.training import WIDE

BOUNDS = ("mean", "low", "high", "difference", "difference_low", "difference_high")
PANELS = {"share": "executed share", "left": "tokens that leave early"}
LABEL = 12  # characters of a token under the map
WHICH = {"token": (BLUE, "o"), "next": (ORANGE, "s")}


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
            ax.axvline((rows["mean"] - rows["difference"]).mean(), color=GREY, linewidth=1)
            _intervals(ax, rows, np.arange(len(rows)), BLUE, "o", horizontal=True)
            ax.xaxis.set_major_formatter(percent())
            names = [f"{name} ({n:,})" for name, n in order.itertuples(index=False)]
            ax.set_yticks(range(len(rows)), names)
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
        fig, axes, measures = _panels(shown)
        for (ax,), measure in zip(axes, measures, strict=True):
            rows = shown[shown["measure"] == measure]
            ax.axhline((rows["mean"] - rows["difference"]).mean(), color=GREY, linewidth=1)
            _intervals(ax, rows, np.arange(len(rows)), BLUE, "o", line="-")
            names = [f"{a}–{b}" if a < b else f"{a}" for a, b in zip(rows["first"], rows["last"], strict=True)]
            ax.set_xticks(range(len(rows)), names)
            ax.set(xlabel="position in the block, counted from 0", ylabel=PANELS[measure])
            ax.yaxis.set_major_formatter(percent())
        _legend(fig)
    return fig


def by_quantile(table: pd.DataFrame) -> Figure:
    """Executed share against the base's surprisal and entropy, of the token and of the next, in bins of equal size.

    Args:
        table: ``quantity`` (such as "surprisal_of_token"), ``median`` (nats), ``measure``, and `BOUNDS`.
    """
    need(table, "quantity", "median", "measure", *BOUNDS)
    with mpl.rc_context(STYLE):
        fig, axes, measures = _panels(table, columns=2)
        for row, measure in zip(axes, measures, strict=True):
            for ax, quantity in zip(row, ("surprisal", "entropy"), strict=True):
                for which, (colour, marker) in WHICH.items():
                    rows = table[(table["measure"] == measure) & (table["quantity"] == f"{quantity}_of_{which}")]
                    ax.axhline((rows["mean"] - rows["difference"]).mean(), color=GREY, linewidth=1)
                    _intervals(ax, rows, rows["median"].to_numpy(), colour, marker, line="-")
                ax.set(
                    xlabel=f"the base's {quantity}, nats (median of the bin)",
                    ylabel=PANELS[measure] if quantity == "surprisal" else "",
                )
                ax.yaxis.set_major_formatter(percent())
        lines = [Line2D([], [], color=c, marker=m, label=f"of the {w} token".replace("token token", "token itself"))
                 for w, (c, m) in WHICH.items()]  # fmt: skip
        _legend(fig, lines)
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
    font = get_font(findfont(FontProperties()))
    shown = visible(text).replace("\n", "").strip(" ") or "␣"
    shown = shown if len(shown) <= LABEL else shown[: LABEL - 1] + "…"
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in shown)


def _measures(table: pd.DataFrame) -> list[str]:
    """The share, and who leaves early where anybody does."""
    return [m for m in PANELS if m == "share" or table.loc[table["measure"] == m, "mean"].max() > 0]


def _panels(table: pd.DataFrame, columns: int = 1) -> tuple[Figure, np.ndarray, list[str]]:
    """A row of axes for each measure."""
    measures = _measures(table)
    fig = Figure(figsize=(WIDTH if columns == 1 else WIDE, 3.3 * len(measures) + 0.4), layout="constrained")
    return fig, fig.subplots(len(measures), columns, squeeze=False, sharey="row"), measures


def _intervals(ax: Axes, rows: pd.DataFrame, at: np.ndarray, colour: str, marker: str, horizontal=False, line="none"):
    """Means with their whiskers, at the places ``at`` of the other axis."""
    whiskers = [
        (rows["mean"] - rows["low"]).fillna(0).clip(lower=0),
        (rows["high"] - rows["mean"]).fillna(0).clip(lower=0),
    ]
    x, y = (rows["mean"], at) if horizontal else (at, rows["mean"])
    ax.errorbar(
        x, y, **{"xerr" if horizontal else "yerr": whiskers},
        color=colour, linestyle=line, linewidth=1, capsize=2, elinewidth=1,
    )  # fmt: skip
    clear = (rows["difference_low"] > 0) | (rows["difference_high"] < 0)
    faces = [colour if c else "white" for c in clear]
    ax.scatter(x, y, s=28, marker=marker, c=faces, edgecolors=colour, zorder=3)


def _legend(fig: Figure, lines: list[Line2D] | None = None) -> None:
    point = {"marker": "o", "linestyle": "none", "color": "black"}
    handles = [
        *(lines or []),
        Line2D([], [], color=GREY, label="mean of all tokens"),
        Line2D([], [], **point, label="differs from it (95 %)"),
        Line2D([], [], **point, markerfacecolor="white", label="no difference shown"),
    ]
    fig.legend(handles=handles, ncols=len(handles), loc="outside upper left", fontsize=8)
