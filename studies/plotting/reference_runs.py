"""Figures of the runs that trained the reference checkpoints, from their committed logs.

The column ``granularity`` tells runs apart; the rest is as in `hat_lib.plotting.training`.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hat_lib.plotting import style, training
from hat_lib.plotting.style import BLUE, GREEN, GREY, ORANGE, PERCENT, PURPLE, WIDE, check_table, draws
from studies.plotting.shared import GRAINS

SITES = {"qkv": ("q | k | v", BLUE, "-"), "o": ("o", ORANGE, "--"), "gate_up": ("gate | up", GREEN, "-."),
         "down": ("down", PURPLE, ":")}  # fmt: skip


@draws("granularity", "step", "steps", "kl", "capacity", "share", "share_0", *(f"share_{s}" for s in SITES))
def routers(log: pd.DataFrame) -> Figure:
    """Runs that trained routers, one per grain: KL over the run and by realised capacity, and what was kept."""
    log = log.assign(run=log["step"] / log["steps"])
    channel, token = (log[log["granularity"] == grain] for grain in GRAINS)
    fig, axes = style.panels(2, 2, 6.4, WIDE, sharey=False)
    over_run, by_share, sites, layers = axes
    _dots(fig, over_run, log, "run", "capacity", "sampled capacity")
    _dots(fig, by_share, log, "share", "run", "part of the run")
    for site, (name, colour, line) in SITES.items():
        more = 100 * (channel[f"share_{site}"] - channel["share"])
        sites.plot(channel["run"], more.rolling(training.RECENT, min_periods=1).mean(), line, color=colour, label=name)
    sites.axhline(0, color=GREY, linewidth=1)
    sites.set(title="channel grain: inputs kept at each site", ylabel="share − mean share, points")
    sites.margins(y=0.4)
    sites.legend(ncols=2, loc="lower left")
    _heat(fig, layers, token)
    layers.set(title="token grain: tokens kept by each layer")
    for ax in axes:
        ax.set(xlabel="realised capacity" if ax is by_share else "part of the run")
        ax.xaxis.set_major_formatter(PERCENT)
    return fig


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


def _dots(fig: Figure, ax: Axes, log: pd.DataFrame, x: str, hue: str, meaning: str) -> None:
    """KL against ``x``, coloured by ``hue``, with a marker for each grain."""
    colours = {"cmap": "viridis", "vmin": log[hue].min(), "vmax": log[hue].max()}
    for grain, rows in log[log["kl"] > 0].groupby("granularity"):
        _, marker = GRAINS[grain]
        dots = ax.scatter(rows[x], rows["kl"], c=rows[hue], marker=marker, s=16, **colours)
        ax.plot([], [], marker, color="black", markersize=4, label=f"{grain} grain")
    fig.colorbar(dots, ax=ax, format=PERCENT, label=meaning)
    ax.set(yscale="log", ylabel="KL to the base, nats per token")
    style.legend_above(ax, 2)


def _heat(fig: Figure, ax: Axes, log: pd.DataFrame) -> None:
    """How far each layer's share is from the mean, over the run; without layer 0, which always runs."""
    more = 100 * log.filter(regex=training.LAYERS).iloc[:, 1:].sub(log["share"], axis=0).to_numpy().T
    most = np.abs(more).max() or 1.0
    edges = np.concatenate([[0.0], log["run"]])
    heat = ax.pcolormesh(edges, np.arange(len(more) + 1) + 0.5, more, cmap="PuOr", vmin=-most, vmax=most)
    fig.colorbar(heat, ax=ax, label="share − mean share, points")
    ax.set(ylabel="layer")
    ax.grid(visible=False)
