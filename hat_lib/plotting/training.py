"""Curves: figures of training, drawn from ``log.csv``, even while it grows.

The table is what `hat_lib.training.log` writes; where several runs share a figure, the column ``granularity`` tells
them apart. A row is the mean over the steps since the previous row. How hard a step is depends on its sampled capacity,
so the KL of two steps can only be compared at equal capacity.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, GRAINS, GREEN, GREY, ORANGE, PERCENT, PURPLE, SKY, WIDE, draws

RECENT = 5  # rows in a running mean
SITES = {
    "qkv": ("q | k | v", BLUE, "-"),
    "o": ("o", ORANGE, "--"),
    "gate_up": ("gate | up", GREEN, "-."),
    "down": ("down", PURPLE, ":"),
}


class Live:
    """Draws a run's ``log.csv`` with one of this module's functions in the notebook cell that trains, at most once
    every ``every`` seconds; the last drawing is saved as by `style.show`, with its ``name`` and ``alt``. For the
    argument ``watch`` of `hat_lib.training.trainer.train_phase`.
    """

    def __init__(self, log: Path, draw: Callable[[pd.DataFrame], Figure], name: str, alt: str, every: float = 3.0):
        self.log, self.draw, self.name, self.alt, self.every = Path(log), draw, name, alt, every
        self.handle, self.next = None, 0.0

    def __call__(self, ended: bool) -> None:
        if not ended and time.monotonic() < self.next:
            return
        rows = pd.read_csv(self.log)
        self._show(rows)
        self.next = time.monotonic() + self.every
        if ended and not rows.empty:
            style.save_figure(self.draw(rows), self.name)  # drawn again: a second rendering differs from the first

    def _show(self, rows: pd.DataFrame) -> None:
        if rows.empty:
            return
        bundle, how = style.picture(style.png(self.draw(rows)), self.alt)
        if self.handle is None:
            self.handle = display(bundle, display_id=True, **how)
        else:
            self.handle.update(bundle, **how)


@draws("step", "kl", "share", "capacity", "share_0")
def routers(log: pd.DataFrame) -> Figure:
    """A run that trains routers: KL, realised and requested capacity, and the latest shares of the layers."""
    fig, (kl, share, layers) = style.panels(3, height=3.0, width=WIDE, sharey=False)
    _curve(kl, log, "kl", BLUE)
    kl.set(ylabel="KL to the base, nats per token")
    _curve(share, log, "share", BLUE, "realised")
    share.plot(log["step"], log["capacity"], "--", color=ORANGE, label="requested")
    share.set(ylabel="capacity", ylim=(0, 1))
    share.legend()
    newest = log[layer_columns(log)].tail(RECENT).mean()
    layers.bar(range(len(newest)), newest, color=SKY)
    layers.axhline(newest.mean(), color=GREY, linewidth=1)
    layers.set(xlabel="layer", ylabel=f"share kept, last {RECENT} rows", ylim=(0, 1))
    for ax in (share, layers):
        ax.yaxis.set_major_formatter(PERCENT)
    return fig


@draws("step", "kl", "agreement", "gate_loss", "exit_rate")
def gates(log: pd.DataFrame) -> Figure:
    """A run that trains exit gates: translators' KL, how often an exit reads the base's token, and the gates' loss."""
    fig, (kl, agreement, loss) = style.panels(3, height=3.0, width=WIDE, sharey=False)
    _curve(kl, log, "kl", BLUE)
    kl.set(ylabel="KL to the base, mean of the exits")
    _curve(agreement, log, "agreement", GREEN, "reads the base's token")
    _curve(agreement, log, "exit_rate", ORANGE, "drawn to leave")
    agreement.set(ylabel="share of tokens", ylim=(0, 1))
    agreement.yaxis.set_major_formatter(PERCENT)
    _curve(loss, log, "gate_loss", PURPLE)
    loss.axhline(np.log(2), color=GREY, linewidth=1, label="log 2: a coin")
    loss.set(ylabel="gates' cross-entropy, nats")
    for ax in (agreement, loss):
        style.legend_above(ax, 1)
    return fig


@draws("granularity", "step", "steps", "kl", "capacity", "share", "share_0", *(f"share_{s}" for s in SITES))
def reference_routers(log: pd.DataFrame) -> Figure:
    """Two runs that trained routers, one per grain: KL over the run and by realised capacity, and what was kept."""
    log = log.assign(run=log["step"] / log["steps"])
    channel, token = (log[log["granularity"] == grain] for grain in GRAINS)
    fig, axes = style.panels(2, 2, 6.4, WIDE, sharey=False)
    over_run, by_share, sites, layers = axes
    _dots(fig, over_run, log, "run", "capacity", "sampled capacity")
    _dots(fig, by_share, log, "share", "run", "part of the run")
    for site, (name, colour, line) in SITES.items():
        more = 100 * (channel[f"share_{site}"] - channel["share"])
        sites.plot(channel["run"], more.rolling(RECENT, min_periods=1).mean(), line, color=colour, label=name)
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
def reference_gates(log: pd.DataFrame, exits: pd.DataFrame) -> Figure:
    """Two runs that trained exit gates: KL and agreement over the run, and agreement by realised exit rate.

    ``exits``: ``granularity``, ``exit_rate`` (realised), ``agreement`` (of the tokens that left, with the base).
    """
    style.check_table(exits, "granularity", "exit_rate", "agreement")
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


@draws("reader", "depth", "agreement")
def exit_depths(table: pd.DataFrame) -> Figure:
    """How often the base's next token can be read after each layer, a line per ``reader``."""
    fig, (ax,) = style.panels(1)
    all_series = zip((GREY, BLUE, ORANGE, GREEN), "oDs^", ("-", "--", "-.", ":"), strict=True)
    for (reader, rows), (colour, marker, line) in zip(table.groupby("reader", sort=False), all_series, strict=False):
        ax.plot(rows["depth"], rows["agreement"], line, marker=marker, color=colour, markersize=5, label=reader)
    ax.set(xlabel="layers that have run", ylabel="share that read the base's token", ylim=(0, 1.02))
    ax.yaxis.set_major_formatter(PERCENT)
    ax.legend()
    return fig


@draws("tokens", "capacity", "kl", "increase", "share")
def learning_curve(table: pd.DataFrame) -> Figure:
    """KL on text that a run does not see, `at_equal_work`, by tokens trained on; a line for each capacity.

    ``table`` is what `hat_lib.training.validation` writes.
    """
    fig, (ax,) = style.panels(1)
    ax.axhline(1, color=GREY, linewidth=1)
    lines = at_equal_work(table).groupby("capacity", sort=False)
    for (capacity, rows), (colour, marker) in zip(lines, style.SERIES, strict=False):
        before = rows["kl"].iloc[0]
        label = f"capacity {capacity:g}, from {before:.2g} nats"
        ax.plot(rows["tokens"] / 1000, rows["kl"] / before, marker=marker, color=colour, markersize=4, label=label)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set(xlabel="thousand tokens trained on", ylabel="KL at equal work, share of that before", ylim=(0, None))
    ax.legend()
    return fig


def at_equal_work(curve: pd.DataFrame) -> pd.DataFrame:
    """A learning curve whose ``kl`` and ``increase`` are those at the share that its capacity executed before the
    first step.

    A run changes how much a capacity executes, and KL with it. The logarithms of KL and of perplexity are interpolated
    linearly in the share between the capacities of a step, and extrapolated from the nearest two; with a single
    capacity, rows stay as they are.
    """
    style.check_table(curve, "tokens", "capacity", "kl", "increase", "share")
    wanted = curve.drop_duplicates("capacity").set_index("capacity")["share"]
    steps = []
    for _, rows in curve.groupby("tokens", sort=False):
        at = rows.sort_values("share")
        share = at["share"].to_numpy()
        if len(at) > 1:
            asked = rows["capacity"].map(wanted).to_numpy()
            right = np.clip(np.searchsorted(share, asked), 1, len(at) - 1)
            part = (asked - share[right]) / (share[right] - share[right - 1])
            kl, ppl = np.log(at["kl"].to_numpy()), np.log1p(at["increase"].to_numpy())
            kl, ppl = (log[right] + part * (log[right] - log[right - 1]) for log in (kl, ppl))
            rows = rows.assign(share=asked, kl=np.exp(kl), increase=np.expm1(ppl))
        steps.append(rows)
    return pd.concat(steps)


def layer_columns(log: pd.DataFrame) -> list[str]:
    """``share_0``, ``share_1``, ..., one per layer."""
    return [c for c in log if c.startswith("share_") and c[len("share_") :].isdigit()]


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
    more = 100 * log[layer_columns(log)[1:]].sub(log["share"], axis=0).to_numpy().T
    most = np.abs(more).max() or 1.0
    edges = np.concatenate([[0.0], log["run"]])
    heat = ax.pcolormesh(edges, np.arange(len(more) + 1) + 0.5, more, cmap="PuOr", vmin=-most, vmax=most)
    fig.colorbar(heat, ax=ax, label="share − mean share, points")
    ax.set(ylabel="layer")
    ax.grid(visible=False)


def _curve(ax: Axes, rows: pd.DataFrame, y: str, colour: str, label: str | None = None) -> None:
    """Each row as a point, by step, with a running mean through them; the axis starts at 0."""
    ax.plot(rows["step"], rows[y], "o", color=colour, markersize=2.5, alpha=0.5)
    ax.plot(rows["step"], rows[y].rolling(RECENT, min_periods=1, center=True).mean(), color=colour, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("step")
    ax.set_ylim(bottom=0)
