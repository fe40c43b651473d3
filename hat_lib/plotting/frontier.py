"""Frontiers: what each variant costs at each amount of work, drawn from ``data/results/quality.csv``.

As in `hat_lib.plotting.style`: a table in, a `Figure` out. `quality` has a panel for each grain and text; in it the
trained model and every control at equal work. `twin` has the trained model alone, setting by setting, and stands beside
the sliders of `hat_lib.workbook.widgets.frontier`. The horizontal axis is `model_share`, the one measure by which
grains can be compared.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from hat_lib.config import HatError
from hat_lib.plotting.style import BLUE, BROWN, GREEN, GREY, ORANGE, PINK, PURPLE, STYLE, need, percent
from hat_lib.plotting.token_heatmap import PALETTE

VARIANTS = {
    "trained": (BLUE, "o", "-"),
    "untrained": (ORANGE, "s", "--"),
    "static": (GREEN, "D", "-."),
    "cosine": (PURPLE, "v", ":"),
    "removal": (BROWN, "P", ":"),
    "random": (PINK, "^", ":"),
}


LOOKS = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (PURPLE, "v")]
HEIGHT = 3.4  # inches


def quality(table: pd.DataFrame) -> Figure:
    """Perplexity increase against the work of the whole model, with 95 % intervals; linear below 1 %, log above.

    Args:
        table: ``granularity``, ``text``, ``variant``, ``exit_rate`` (rows above 0 are left out), ``tokens``,
            ``model_share``, ``increase``, ``increase_low``, ``increase_high``. Of two rows for one point, the one
            on more tokens counts.
    """
    columns = ["granularity", "text", "variant", "exit_rate", "tokens", "model_share"]
    need(table, *columns, "capacity", "increase", "increase_low", "increase_high")
    table = table[table["exit_rate"] == 0].sort_values("tokens")
    table = table.drop_duplicates(["granularity", "text", "variant", "capacity"], keep="last")
    grains, texts = (sorted(set(table[name])) for name in ("granularity", "text"))
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(4.7 * len(texts), 3.4 * len(grains) + 0.4), layout="constrained")
        axes = fig.subplots(len(grains), len(texts), squeeze=False, sharey="row")
        for i, grain in enumerate(grains):
            for j, text in enumerate(texts):
                ax = axes[i][j]
                here = table[(table["granularity"] == grain) & (table["text"] == text)]
                ax.axhline(0, color=GREY, linewidth=1)
                for variant, (colour, marker, line) in VARIANTS.items():
                    _line(ax, here[here["variant"] == variant], colour, marker, line)
                ax.set_yscale("symlog", linthresh=1)
                ax.yaxis.set_major_locator(FixedLocator([0, *(10.0**n for n in (*range(4), *range(4, 20, 2)))]))
                ax.yaxis.set_major_formatter(FuncFormatter(_increase))
                ax.xaxis.set_major_formatter(percent())
                ax.set_title(f"{grain} grain, {text}")
                ax.set(xlabel="executed share of the model's work", ylabel="" if j else "perplexity increase")
        names = [
            Line2D([], [], color=c, marker=m, linestyle=line, label=v)
            for v, (c, m, line) in VARIANTS.items()
            if v in set(table["variant"])
        ]
        fig.legend(handles=names, ncols=len(names), loc="outside lower center")
    return fig


def _increase(percent: float, _=None) -> str:
    """+10 %, +100 %, x11, x101, x10^4: percents up to a hundred of them, then times the base's perplexity."""
    if percent <= 100:
        return f"{percent:+.0f} %" if percent else "0"
    return f"x{1 + percent / 100:.0f}" if percent < 1e5 else f"x$10^{{{np.log10(percent) - 2:.0f}}}$"


def _line(ax, rows: pd.DataFrame, colour: str, marker: str, line: str) -> None:
    if rows.empty:
        return
    rows = rows.sort_values("model_share")
    middle, low, high = (100 * rows[c] for c in ("increase", "increase_low", "increase_high"))
    whiskers = [(middle - low).clip(lower=0), (high - middle).clip(lower=0)]
    look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "capsize": 2, "elinewidth": 1}
    ax.errorbar(rows["model_share"], middle, yerr=whiskers, **look)


def points(quality: pd.DataFrame, granularity: str = "channel", text: str = "docstrings") -> pd.DataFrame:
    """The trained model's rows for one grain and text, by exit rate and capacity, and the base at the end.

    Of two rows for one setting, the one on more tokens counts. The base is at capacity 1 and exit rate 0, where
    everything runs and nothing needs to be measured. Raises `HatError` where no row is left.
    """
    need(quality, "granularity", "text", "variant", "capacity", "exit_rate", "tokens", "base_ppl", "ppl", "model_share")
    rows = quality.query("granularity == @granularity and text == @text and variant == 'trained'")
    if rows.empty:
        raise HatError(f"no row of the trained model for {granularity} and {text}: run `hat reproduce quality` first")
    rows = rows.sort_values("tokens").drop_duplicates(["capacity", "exit_rate"], keep="last")
    if not ((rows["capacity"] == 1) & (rows["exit_rate"] == 0)).any():
        most = rows.iloc[-1]
        ones, zeros = ["capacity", "realised", "model_share", "top1"], ["exit_rate", "realised_exit", "kl"]
        zeros += ["increase", "increase_low", "increase_high"]
        same = most.to_dict() | dict.fromkeys(ones, 1.0) | dict.fromkeys(zeros, 0.0) | {"ppl": most["base_ppl"]}
        rows = pd.concat([rows, pd.DataFrame([same])])
    return rows.sort_values(["exit_rate", "capacity"], ignore_index=True)


def twin(quality: pd.DataFrame, layers: pd.DataFrame, granularity: str = "channel", text: str = "docstrings") -> Figure:
    """Every point of the frontier with its requested capacity, and what each layer executed at every setting.

    Args:
        quality, granularity, text: as for `points`.
        layers: as from `hat_lib.experiments.layer_shares.layer_shares`.
    """
    need(layers, "capacity", "exit_rate", "layer", "executed", "entered")
    rows = points(quality, granularity, text)
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(7.6, HEIGHT), layout="constrained")
        cost, work = fig.subplots(1, 2)
        draw(cost, rows)
        for row in rows.itertuples():
            at = (row.model_share, 100 * row.increase)
            cost.annotate(f"{row.capacity:.2f}", at, (4, 5), textcoords="offset points", fontsize=8)
        table = layers.pivot(index=["exit_rate", "capacity"], columns="layer", values="executed").sort_index()
        fig.colorbar(work.pcolormesh(table.to_numpy(), cmap=PALETTE), ax=work, format=percent(), pad=0.02)
        names = [f"{c:.2f}" + (f", exits {e:.1f}" if e else "") for e, c in table.index]
        work.set_yticks(np.arange(len(table)) + 0.5, names, fontsize=8)
        columns = range(0, table.shape[1], max(1, table.shape[1] // 6))
        work.set_xticks([c + 0.5 for c in columns], columns)
        work.set(xlabel="layer", ylabel="requested capacity", title="executed share of the layer")
        work.grid(visible=False)
    return fig


def draw(ax: Axes, points: pd.DataFrame) -> None:
    """Perplexity increase against the whole model's work, a line for each exit rate; linear below 1 %, log above."""
    ax.axhline(0, color=GREY, linewidth=1)
    for (rate, rows), (colour, marker) in zip(points.groupby("exit_rate"), LOOKS * len(points), strict=False):
        middle, low, high = (100 * rows[c] for c in ("increase", "increase_low", "increase_high"))
        whiskers = [(middle - low).clip(lower=0), (high - middle).clip(lower=0)]
        look = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2, "elinewidth": 1}
        ax.errorbar(rows["model_share"], middle, yerr=whiskers, label=f"exit rate {rate:g}", **look)
    ax.set_yscale("symlog", linthresh=1)
    ax.yaxis.set_major_locator(FixedLocator([-1, 0, *(10.0**n for n in range(9))]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+,.0f} %" if v else "0"))
    ax.xaxis.set_major_formatter(percent())
    ax.set(xlabel="executed share of the model's work", ylabel="perplexity increase")
    ax.legend(loc="lower left", fontsize=8)
