"""Figures: a table in, a matplotlib `Figure` out; one palette and one place for sizes.

Every function takes the table that stands in ``data/results``, so a figure is redrawn from its file without a
model. Nothing here touches pyplot: a `Figure` that nobody registers cannot leak from one notebook cell, test or
thread into the next. Colours are seaborn's "colorblind" set, and each series also has a marker or line style of its
own. Pages may be dark, so a figure carries its own white ground.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter
from PIL import Image

from hat_lib import config
from hat_lib.config import HatError

BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = sns.color_palette("colorblind").as_hex()
PARTS = {"ffn": (BLUE, "white"), "attention": (ORANGE, "black"), "head": (GREEN, "black")}  # bar, words on it
GRAINS = {"channel": (BLUE, "o"), "token": (ORANGE, "s")}
WIDTH, HEIGHT, DPI = 7.0, 3.8, 130  # inches, inches, dots per inch
MOST = 1000.0  # per cent; an increase beyond it stands at the upper edge, as a triangle
HOLLOW = {"markerfacecolor": "none", "color": "black", "marker": "D", "zorder": 5}

STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def save_figure(fig: Figure, name: str, folder: Path | None = None) -> Path:
    """Write ``fig`` as ``name``.png into ``folder``, by default `config.FIGURES`; the same figure, the same bytes."""
    folder = folder or config.FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    path.write_bytes(png(fig))
    return path


def png(fig: Figure) -> bytes:
    """``fig`` as a PNG file; the same figure gives the same bytes."""
    drawn, file = BytesIO(), BytesIO()
    with mpl.rc_context(STYLE):
        fig.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)
    image = Image.open(drawn).convert("RGB")
    # A palette of 256 makes a third of the size, and bands in a scale of colours.
    shaded = any(isinstance(part, QuadMesh | AxesImage) for ax in fig.axes for part in ax.get_children())
    (image if shaded else image.quantize(256)).save(file, format="png", optimize=True)
    return file.getvalue()


def show(fig: Figure, name: str, alt: str) -> None:
    """`save_figure`, then show the file in a notebook: the picture alone, with ``alt`` for those who cannot see it."""
    bundle, how = picture(save_figure(fig, name).read_bytes(), alt)
    display(bundle, **how)


def picture(data: bytes, alt: str) -> tuple[dict, dict]:
    """A PNG file as the argument and the keywords of IPython's `display` that show it and nothing else."""
    bundle = {"image/png": b64encode(data).decode()}
    return bundle, {"metadata": {"image/png": {"alt": alt}}, "raw": True}


def styled(draw: Callable) -> Callable:
    """A function that draws, in the house style."""

    @wraps(draw)
    def inside(*args, **settings):
        with mpl.rc_context(STYLE):
            return draw(*args, **settings)

    return inside


@styled
def weight_shares(table: pd.DataFrame) -> Figure:
    """Stacked bars: which part of the weights that a token reads is FFN, attention, LM head.

    Args:
        table: a row per base; ``base``, ``ffn``, ``attention``, ``head`` (shares, sum 1).
    """
    need(table, "base", *PARTS)
    fig, (ax,) = panels(1, height=1.1 + 0.6 * len(table))
    left = pd.Series(0.0, index=table.index)
    for part, (colour, ink) in PARTS.items():
        ax.barh(table["base"], table[part], left=left, color=colour, label=part.replace("ffn", "FFN"))
        for y, (share, start) in enumerate(zip(table[part], left, strict=True)):
            ax.text(start + share / 2, y, f"{share:.0%}", ha="center", va="center", color=ink, weight="bold")
        left = left + table[part]
    ax.set(xlim=(0, 1), xlabel="share of the weights read per token")
    ax.xaxis.set_major_formatter(percent())
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return fig


@styled
def skipped_ffn(table: pd.DataFrame) -> Figure:
    """What it costs to skip one layer's FFN for every token: perplexity ratio, log axis.

    Args:
        table: a row per layer; ``layer``, ``ratio`` (perplexity / base perplexity), ``low``, ``high`` (95 %).
    """
    need(table, "layer", "ratio", "low", "high")
    fig, (ax,) = panels(1)
    ax.axhline(1, color=GREY, linewidth=1)
    ax.vlines(table["layer"], 1, table["ratio"], color=BLUE, alpha=0.35, linewidth=3)
    whiskers(ax, table["layer"], table["ratio"], table["low"], table["high"], BLUE, "o",
             label="one FFN skipped, 95 % interval")  # fmt: skip
    ax.set_yscale("log")
    ticks, largest = [1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000], table[["ratio", "high"]].max().max()
    last = next((v for v in ticks if v >= largest), ticks[-1])  # few decades would leave one label
    ax.yaxis.set_major_locator(FixedLocator([v for v in ticks if v <= last]))
    ax.yaxis.set_minor_locator(FixedLocator([]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    ax.set(xlabel="layer whose FFN is skipped", ylabel="perplexity / base perplexity")
    ax.legend(loc="upper center")
    return fig


@styled
def grain_frontier(table: pd.DataFrame) -> Figure:
    """Perplexity increase against executed work, a line per ``method``; linear below 1 %, logarithmic above.

    Args:
        table: ``method``, ``work`` (share of the linear layers' work, 0-1), ``increase``, ``low``, ``high``
            (perplexity / base perplexity - 1, and its 95 % interval).
    """
    need(table, "method", "work", "increase", "low", "high")
    fig, (ax,) = panels(1, height=4.2)
    increases(ax, [-1, 0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6], "executed share of the linear layers' work")
    looks = zip((BLUE, ORANGE, GREEN, PINK, PURPLE, BROWN), "osD^vP", strict=True)
    for (method, rows), (colour, marker) in zip(table.groupby("method", sort=False), looks, strict=False):
        rows = rows.sort_values("work")
        ends = (100 * rows[c] for c in ("increase", "low", "high"))
        whiskers(ax, rows["work"], *ends, colour, marker, "-", label=method)
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return fig


@styled
def benchmark(table: pd.DataFrame) -> Figure:
    """Measured speedups beside the ideal: a row of panels per base and machine, a panel per phase and batch.

    Args:
        table: the fields of `hat_lib.experiments.benchmark.Row`.
    """
    machine = ["base", "device", "dtype", "threads"]
    need(table, *machine, "granularity", "phase", "batch", "realised", "ideal", "speedup_hf", "speedup_dense")
    settings = list(table.groupby(machine, sort=False))
    phases = sorted({(p, b) for p, b in zip(table["phase"], table["batch"], strict=True)}, key=lambda k: (k[1], k[0]))
    kinds = {"speedup_hf": ("-", "vs plain transformers"), "speedup_dense": ("--", "vs own dense path")}
    fig, axes = panels(len(phases), len(settings), height=2.9 * len(settings) + 0.7)
    for i, ((base, device, dtype, threads), rows) in enumerate(settings):
        for j, (phase, batch) in enumerate(phases):
            ax = axes[i * len(phases) + j]
            here = rows[(rows["phase"] == phase) & (rows["batch"] == batch)]
            for grain, part in here.sort_values("realised").groupby("granularity", sort=False):
                colour, marker = GRAINS[grain]
                ax.plot(part["realised"], part["ideal"], ":", color=colour, linewidth=1.5)
                for column, (line, _) in kinds.items():
                    ax.plot(part["realised"], part[column], line, marker=marker, color=colour, markersize=4)
            ax.axhline(1, color=GREY, linewidth=1)
            where = f"{dtype}, {device}" + (f", {threads} threads" if device == "cpu" else "")
            ax.set_title(f"{base}\n{where}\n{phase}, batch {batch}", fontsize=9)
            ax.set(xlabel="realised capacity", ylabel="speedup (times)" if j == 0 else "")
    names = [key(f"{g} grain", c, m, "-") for g, (c, m) in GRAINS.items()]
    names += [key(name, line=line) for line, name in kinds.values()]
    below(fig, [*names, key("ideal", line=":")], fontsize=8)
    return fig


# -- parts ---------------------------------------------------------------------------------------------


def panels(
    columns: int, rows: int = 1, height: float = HEIGHT, width: float = 0, **shared
) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, row by row; sizes of the whole in inches."""
    width = width or (WIDTH if columns == 1 else max(WIDTH, 3.0 * columns))
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, list(fig.subplots(rows, columns, squeeze=False, **{"sharey": "row"} | shared).flat)


def whiskers(
    ax: Axes, x, middle, low, high, colour: str, marker: str, line: str = "none", across: bool = False, **look
) -> None:
    """Points with the interval ``low``..``high``, joined by a line; ``across``: the values lie on the x axis."""
    ends = [(middle - low).clip(lower=0), (high - middle).clip(lower=0)]
    look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "capsize": 2, "elinewidth": 1} | look
    ax.errorbar(*((middle, x) if across else (x, middle)), **{"xerr" if across else "yerr": ends}, **look)


def costs(ax: Axes, x, middle, low, high, colour: str, marker: str, line: str = "none") -> None:
    """Increases in perplexity with their intervals, up to `MOST` per cent; what lies beyond is a triangle there."""
    middle, low, high = (100 * part for part in (middle, low, high))
    inside = middle <= MOST
    ax.plot(x, middle.clip(upper=MOST), linestyle=line, color=colour)
    whiskers(ax, x[inside], middle[inside], low[inside], high[inside].clip(upper=MOST), colour, marker)
    ax.plot(x[~inside], [MOST] * int((~inside).sum()), "^", color=colour, markersize=6)


def increases(
    ax: Axes, ticks: list[float], xlabel: str, largest: float | None = None, top: float | None = None
) -> None:
    """Axes of an increase in perplexity, in per cent, over a share: linear below 1 %, logarithmic above.

    Args:
        largest: increase that is drawn by `costs`; beyond `MOST` the label says what a triangle is.
        top: of the axis, in per cent.
    """
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set_yscale("symlog", linthresh=1, linscale=1 if largest is None else 0.5)
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+,.0f} %" if v else "0"))
    ax.xaxis.set_major_formatter(percent())
    beyond = largest is not None and bool(100 * largest > MOST)
    ax.set(xlabel=xlabel, ylabel="perplexity increase" + " (▲: beyond)" * beyond)
    if largest is not None:
        ax.set_ylim(-0.6, 1.4 * MOST if beyond else top)


def key(label: str, colour: str = "black", marker: str | None = None, line: str = "none", **look) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=label, **look)


def below(fig: Figure, entries: list[Line2D], **look) -> None:
    """The legend of a whole figure, in one row below it."""
    fig.legend(handles=entries, **{"ncols": len(entries), "loc": "outside lower center"} | look)


def grain_keys(table: pd.DataFrame, line: str = "none") -> list[Line2D]:
    shown = {grain: look for grain, look in GRAINS.items() if grain in set(table["granularity"])}
    return [key(f"{grain} grain", colour, marker, line) for grain, (colour, marker) in shown.items()]


def log_axis(ax: Axes, ticks: list[float], label: str = "{x:g}") -> None:
    """A horizontal log axis with these ticks and no other."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(FixedLocator([]))
    ax.xaxis.set_major_formatter(label)


def percent() -> FuncFormatter:
    """Ticks of an axis of shares."""
    return FuncFormatter(lambda v, _: f"{v:.0%}")


def need(table: pd.DataFrame, *columns: str) -> None:
    """Raise `HatError` unless the table has the columns, and a row."""
    missing = [c for c in columns if c not in table]
    if missing or table.empty:
        raise HatError(f"a figure needs rows with the columns {', '.join(columns)}; missing: {missing or 'any row'}")
