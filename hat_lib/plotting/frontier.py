"""Frontiers: what each variant costs at each amount of work, drawn from ``data/results/quality.csv``.

As in `hat_lib.plotting.style`: a table in, a `Figure` out. A panel for each grain and text; in it the trained model and
every control at equal work. The horizontal axis is `model_share`, the one measure by which grains can be compared.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from hat_lib.plotting.style import BLUE, BROWN, GREEN, GREY, ORANGE, PINK, PURPLE, STYLE, need, percent

VARIANTS = {
    "trained": (BLUE, "o", "-"),
    "untrained": (ORANGE, "s", "--"),
    "static": (GREEN, "D", "-."),
    "cosine": (PURPLE, "v", ":"),
    "removal": (BROWN, "P", ":"),
    "random": (PINK, "^", ":"),
}


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
