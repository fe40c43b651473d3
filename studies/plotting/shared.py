"""What the figures of results share: panels by text or base, costs with a triangle beyond the edge, legends."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, NullLocator

from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, GREEN, ORANGE, PURPLE

SERIES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (PURPLE, "v")]
PUBLISHED = {"color": "black", "marker": "D", "markersize": 8, "markerfacecolor": "none", "zorder": 5}
BASES = {"bundled": "bundled base, 135M", "random:tinyllama": "TinyLlama's shape",
         "random:llama-3.2-1b": "Llama-3.2-1B's shape", "random:qwen3-0.6b": "Qwen3-0.6B's shape"}  # fmt: skip
MOST = 1000.0  # per cent; a larger increase is drawn as a triangle at the upper edge


def panels_by(table: pd.DataFrame, column: str, height: float, width: float, **more):
    """A figure with a panel for each value of a column, titled with it; and ``[(rows, axes), ...]``."""
    groups = list(table.groupby(column))
    fig, axes = style.panels(len(groups), height=height, width=width, **{"sharey": True, "sharex": True} | more)
    for ax, (value, _) in zip(axes, groups, strict=True):
        ax.set_title(BASES.get(value, value))
    return fig, [(rows, ax) for (_, rows), ax in zip(groups, axes, strict=True)]


def costs(ax: Axes, x, ends: pd.DataFrame, colour: str, marker: str, line: str = "none") -> None:
    """Increases in perplexity with their intervals, up to `MOST` per cent; larger ones are triangles there."""
    shown = (100 * ends).clip(upper=MOST)
    inside = 100 * ends.iloc[:, 0] <= MOST
    ax.plot(x, shown.iloc[:, 0], linestyle=line, color=colour)
    style.whiskers(ax, x[inside], shown[inside], colour, marker)
    ax.plot(x[~inside], [MOST] * int((~inside).sum()), "^", color=colour, markersize=6)


def increases(ax: Axes, ticks, xlabel: str, largest: float, top: float = 0, bottom: float = -0.6) -> None:
    """Axes for `costs` from ``bottom`` to ``top``, by default a little above the ``largest`` increase."""
    style.increases(ax, ticks, xlabel, linscale=0.5)
    beyond = bool(100 * largest > MOST)
    ax.set(ylabel="perplexity increase" + (" (▲: beyond)" if beyond else ""))
    ax.set_ylim(bottom, 1.4 * MOST if beyond else top or 140 * max(largest, 0.1))


def label(ax: Axes, at: tuple[float, float], text: str, colour: str, offset: tuple[float, float], **more) -> None:
    """The name of a line beside one of its points, ``offset`` in points."""
    look = {"textcoords": "offset points", "fontsize": 9, "zorder": 6, "va": "center", "color": colour}
    ax.annotate(text, at, offset, **look | more)


def worst_text(table: pd.DataFrame, texts: Sequence[str]) -> pd.DataFrame:
    """Of each row, the increase on the text where it is largest, and the ends of its interval."""
    worst = table[list(texts)].idxmax(axis=1)
    rows = zip(table.to_dict("records"), worst, strict=True)
    return pd.DataFrame([[row[text + end] for end in ("", "_low", "_high")] for row, text in rows])


def named_rows(ax: Axes, names: list[str]) -> None:
    """A row for each name, from the top down."""
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def log_axis(ax: Axes, ticks: list[float]) -> None:
    ax.set_xscale("log")
    set_ticks(ax.xaxis, ticks)


def set_ticks(axis: Axis, ticks: list[float], label: str = "{x:g}") -> None:
    """These ticks only."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(label)


def legend_above(ax: Axes, columns: int) -> None:
    """The legend of one panel, above it."""
    ax.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), handlelength=1.5, columnspacing=1.0)
