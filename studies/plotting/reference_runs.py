"""Figures of the runs that trained the reference checkpoints, from their committed logs.

The column ``granularity`` tells runs apart; the rest is as in `hat_lib.plotting.training`.
"""

import pandas as pd
from matplotlib.figure import Figure

from hat_lib.plotting import style
from hat_lib.plotting.style import PERCENT, WIDE, check_table, draws
from studies.plotting.shared import GRAINS


@draws("granularity", "step", "steps", "kl", "agreement")
def gates(log: pd.DataFrame, exits: pd.DataFrame) -> Figure:
    """Runs that trained exit gates: KL and agreement over the run, and agreement by realised exit rate.

    ``exits``: ``granularity``, ``exit_rate`` (realised), ``agreement`` (of the tokens that left, with the base).
    """
    check_table(exits, "granularity", "exit_rate", "agreement")
    log = log.assign(run=log["step"] / log["steps"])
    fig, axes = style.panels(3, height=3.0, width=WIDE, sharey=False)
    drawn = (
        (log, "run", "kl", "part of the run", "KL to the base, mean of the exits"),
        (log, "run", "agreement", "part of the run", "agreement, any token"),
        (exits, "exit_rate", "agreement", "realised exit rate", "agreement, tokens that leave"),
    )
    for ax, (table, x, y, xlabel, ylabel) in zip(axes, drawn, strict=True):
        for grain, rows in table.groupby("granularity", sort=False):
            colour, marker = GRAINS[grain]
            ax.plot(rows[x], rows[y], marker=marker, markersize=3.5, color=colour, label=f"{grain} grain")
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.xaxis.set_major_formatter(PERCENT)
        if y == "agreement":
            ax.set_ylim(0, 1)
            ax.yaxis.set_major_formatter(PERCENT)
    axes[0].legend()
    return fig
