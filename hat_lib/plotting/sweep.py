"""The figure of a sweep over capacities: what is lost, and how often the base's next token stays."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hat_lib.plotting.style import BLUE, GREEN, GREY, HEIGHT, STYLE, WIDTH, need


def sweep(table: pd.DataFrame) -> Figure:
    """Perplexity increase with its 95 % interval, and top-1 agreement, each against the realised capacity.

    Args:
        table: `hat_lib.explore.sweep.Sweep.frame`; where the interval is nan a point has no whiskers.
    """
    need(table, "capacity", "realised", "increase", "increase_low", "increase_high", "top1")
    table = table.sort_values("realised")
    ends = [table["increase"] - table["increase_low"], table["increase_high"] - table["increase"]]
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(1.2 * WIDTH, HEIGHT), layout="constrained")
        increase, top1 = fig.subplots(1, 2)
        increase.axhline(0, color=GREY, linewidth=1)
        whiskers = [end.fillna(0).clip(lower=0) for end in ends]
        increase.errorbar(table["realised"], table["increase"], whiskers, color=BLUE, marker="o", capsize=2)
        for row in table.itertuples():
            increase.annotate(
                f"{row.capacity:g}", (row.realised, row.increase), (5, 5), textcoords="offset points", fontsize=8
            )
        increase.set(ylabel="perplexity increase, 95 % interval")
        top1.plot(table["realised"], table["top1"], color=GREEN, marker="s")
        top1.set(ylabel="top-1 agreement with the base")
        for ax in (increase, top1):
            ax.set_xlabel("realised capacity (beside the points: requested)" if ax is increase else "realised capacity")
            ax.xaxis.set_major_formatter(PercentFormatter(1))
            ax.yaxis.set_major_formatter(PercentFormatter(1))
    return fig
