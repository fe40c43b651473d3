"""Curves: figures of training, drawn from ``log.csv``, even while it grows.

The table is what `hat_lib.training.log` writes. A row is the mean over the steps since the previous row. How hard a
step is depends on its sampled capacity, so the KL of two steps can only be compared at equal capacity.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.interpolate import make_interp_spline

from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, GREEN, GREY, ORANGE, PERCENT, PURPLE, SKY, WIDE, draws

RECENT = 5  # rows in a running mean
LAYERS = r"^share_\d+$"  # the columns of a log that are a layer's share


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
        self.next = time.monotonic() + self.every
        if rows.empty:
            return
        self.handle = style.show_png(style.png(self.draw(rows)), self.alt, self.handle)
        if ended:
            style.save_figure(self.draw(rows), self.name)  # drawn again: a second rendering differs from the first


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
    newest = log.filter(regex=LAYERS).tail(RECENT).mean()
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

    The logarithms of KL and of perplexity are interpolated linearly in the share between the capacities of a step, and
    extrapolated from the nearest two; with a single capacity, rows stay as they are.
    """
    style.check_table(curve, "tokens", "capacity", "kl", "increase", "share")
    wanted = curve.drop_duplicates("capacity").set_index("capacity")["share"]
    steps = []
    for _, rows in curve.groupby("tokens", sort=False):
        if len(rows) > 1:
            at, asked = rows.sort_values("share"), rows["capacity"].map(wanted)
            logs = np.stack([np.log(at["kl"]), np.log1p(at["increase"])], 1)
            kl, ppl = make_interp_spline(at["share"], logs, k=1)(asked).T
            rows = rows.assign(share=asked, kl=np.exp(kl), increase=np.expm1(ppl))
        steps.append(rows)
    return pd.concat(steps)


def _curve(ax: Axes, rows: pd.DataFrame, y: str, colour: str, label: str | None = None) -> None:
    """Each row as a point, by step, with a running mean through them; the axis starts at 0."""
    ax.plot(rows["step"], rows[y], "o", color=colour, markersize=2.5, alpha=0.5)
    ax.plot(rows["step"], rows[y].rolling(RECENT, min_periods=1, center=True).mean(), color=colour, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("step")
    ax.set_ylim(bottom=0)
