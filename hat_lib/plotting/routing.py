"""Figures of routing patterns, drawn from the tables of `hat_lib.evaluation.routing`; all files of an analysis.

Whiskers are 95 % intervals. A point is hollow unless the interval of its difference from the mean of all tokens
excludes 0. Where tokens leave early, a second panel shows how many do.
"""

import csv
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hat_lib.evaluation.report import colours
from hat_lib.evaluation.tokens import TokenTable
from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, GREY, ORANGE, PERCENT, WIDE, WIDTH, draws, entry
from hat_lib.plotting.token_heatmap import in_font
from hat_lib.text.coloured import PALETTE, html, passages, visible
from hat_lib.text.plain import cell

ENDS = ["mean", "low", "high"]
BOUNDS = (*ENDS, "difference", "difference_low", "difference_high")
LABEL = 12  # most characters of a token to show under the map
AFTER = "#dddddd"  # layers a token did not enter
PAGE = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'


@draws("token", "text", "exit_layer", "protected", "layer", "share", "difference")
def layer_map(table: pd.DataFrame, values: Sequence[str] = ("share", "difference")) -> Figure:
    """Layer × token: the executed share, and its difference from the layer's mean, or one of these ``values``; a cross
    where a token leaves."""
    tokens, n_layers = table.drop_duplicates("token"), table["layer"].nunique()
    left = np.flatnonzero(tokens["exit_layer"] < n_layers)
    most = max(0.01, table["difference"].abs().quantile(0.95))  # or protected tokens would dominate
    height, width = (7.0 if len(values) > 1 else 3.8), max(5.0, 1.8 + 0.165 * len(tokens))
    fig, axes = style.panels(1, len(values), height, width, sharex=True)
    looks = {
        "share": ("executed share", {"cmap": PALETTE, "vmin": 0, "vmax": 1}, {"format": PERCENT}),
        "difference": (
            "points above the layer's mean (purple) or below it",
            {"cmap": "PuOr", "vmin": -most, "vmax": most},
            {"format": _points, "extend": "both"},
        ),
    }
    for ax, shown in zip(axes, values, strict=True):
        title, scale, bar = looks[shown]
        cells = table.pivot(index="layer", columns="token", values=shown)
        fig.colorbar(ax.pcolormesh(cells.to_numpy(), **scale), ax=ax, pad=0.01, **bar)
        places = range(0, n_layers, max(1, n_layers // 6))
        ax.set_yticks([y + 0.5 for y in places], places)
        ax.set(title=title, ylabel="layer", facecolor=AFTER)
        ax.grid(visible=False)
        ax.plot(left + 0.5, tokens["exit_layer"].iloc[left] + 0.5, "x", color="black", markersize=4.5)
    names = []
    if table["protected"].any():
        names.append(Patch(color=colormaps[PALETTE](1.0), label="at the start: protected, runs in full"))
    if len(left):
        gone = entry("left before this layer", "black", "x", markersize=4.5)
        names = [Patch(color=AFTER, label="had left"), *names, gone]
    if names:
        style.legend_below(fig, names)
    labels = [visible(text).replace("\n", "").strip(" ") or "␣" for text in tokens["text"]]
    labels = [in_font(text if len(text) <= LABEL else text[: LABEL - 1] + "…") for text in labels]
    axes[-1].set_xticks(np.arange(len(tokens)) + 0.5, labels, rotation=90, fontsize=7.5, parse_math=False)
    axes[-1].set_xlabel("token (␣: a space, or part of a character)")
    return fig


def _points(share: float, _=None) -> str:
    """A difference of shares in percentage points, shortened without losing accuracy: +2.5, 0."""
    return f"{round(100 * share, 6):+g}" if abs(share) > 1e-9 else "0"


@draws("class", "measure", "tokens", *BOUNDS)
def by_class(table: pd.DataFrame) -> Figure:
    """Executed share by token class, lowest first, with the number of tokens."""
    measures = _by_measure(table)
    order = measures["executed share"].sort_values("mean")
    fig, axes = style.panels(len(measures), 1, 1.5 + 0.32 * len(order), WIDE if len(measures) > 1 else WIDTH)
    for ax, (label, rows) in zip(axes, measures.items(), strict=True):
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
    for ax, (label, rows) in zip(axes, measures.items(), strict=True):
        _intervals(ax, rows, np.arange(len(rows)), line="-")
        names = [f"{a}–{b}" if a < b else f"{a}" for a, b in zip(rows["first"], rows["last"], strict=True)]
        ax.set_xticks(range(len(rows)), names)
        ax.set(xlabel="position in the block, counted from 0", ylabel=label)
    _legend(fig)
    return fig


@draws("quantity", "median", "measure", *BOUNDS)
def by_quantile(table: pd.DataFrame) -> Figure:
    """Executed share against the base's surprisal and entropy (nats) of the token and of the next, in equal bins."""
    lines = [entry("of the token itself", BLUE, "o", "-"), entry("of the next token", ORANGE, "s", "-")]
    measures = _by_measure(table)
    fig, axes = style.panels(2, len(measures), 3.3 * len(measures) + 0.4, WIDE)
    for (label, rows), pair in zip(measures.items(), np.reshape(axes, (-1, 2)), strict=True):
        pair[0].set_ylabel(label)
        for ax, quantity in zip(pair, ("surprisal", "entropy"), strict=True):
            ax.set_xlabel(f"the base's {quantity}, nats (median of the bin)")
            for which, line in zip(("token", "next"), lines, strict=True):
                part = rows[rows["quantity"] == f"{quantity}_of_{which}"]
                _intervals(ax, part, part["median"].to_numpy(), line.get_color(), line.get_marker(), line="-")
    _legend(fig, lines)
    return fig


FIGURES = {"layer_map": layer_map, "classes": by_class, "positions": by_position, "quantiles": by_quantile}
"""name of a table in `hat_lib.evaluation.routing.TABLES` -> its figure"""


def files(found: TokenTable, tables: Mapping[str, pd.DataFrame]) -> dict[str, bytes]:
    """An analysis as files: tables (CSV), figures (PNG) and coloured text (HTML), by file name; ``tables`` are those of
    `TABLES`. Numbers have six digits, and no text is one that a terminal or spreadsheet interprets."""
    made = {}
    for name, table in {"tokens": found.tokens, **tables}.items():
        safe = table.map(lambda value: cell(value) if isinstance(value, str) else value)
        how = {"quoting": csv.QUOTE_NONNUMERIC, "lineterminator": "\n"}
        made[f"{name}.csv"] = safe.to_csv(index=False, float_format="%.6g", **how).encode()
    made |= {f"{name}.png": style.png(draw(tables[name])) for name, draw in FIGURES.items()}
    page = PAGE + html(*passages(found.tokens, "model_share"), **colours(found))
    return made | {"text.html": page.encode()}


def _by_measure(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By label, the rows of the executed share and, if any tokens leave early, of how many do."""
    found = {"executed share": table[table["measure"] == "share"]}
    left = table[table["measure"] == "left"]
    return found | {"tokens that leave early": left} if left["mean"].max() > 0 else found


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
