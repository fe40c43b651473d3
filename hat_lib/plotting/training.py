"""Curves: figures of training, drawn from ``log.csv``, even while it grows.

The table is what `hat_lib.training.log` writes. A row is the mean over the steps since the previous row. How hard a
step is depends on its sampled capacity, so the KL of two steps can only be compared at equal capacity.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, GREY, ORANGE, PERCENT, SKY, WIDE, draws

RECENT = 5  # rows in a running mean
LAYERS = r"^share_\d+$"  # the columns of a log that are a layer's share


class Live:
    """Draws a run's ``log.csv`` with ``draw`` in the notebook cell that trains, at most once every ``every`` seconds;
    the last drawing is saved as by `style.show`, with its ``name`` and ``alt``. For the argument ``watch`` of
    `hat_lib.training.trainer.train_phase`.
    """

    def __init__(self, log: Path, draw: Callable[[pd.DataFrame], Figure], name: str, alt: str, every: float = 3.0):
        self.log, self.draw, self.name, self.alt, self.every = log, draw, name, alt, every
        self.handle, self.next = None, 0.0

    def __call__(self, ended: bool) -> None:
        if not ended and time.monotonic() < self.next:
            return
        rows, self.next = pd.read_csv(self.log), time.monotonic() + self.every
        if rows.empty:
            return
        self.handle = style.show_png(style.png(self.draw(rows)), self.alt, self.handle)
        if ended:
            style.save_figure(self.draw(rows), self.name)  # drawn again: a second rendering differs from the first


@draws("step", "kl", "share", "capacity", "share_0")
def routers(log: pd.DataFrame) -> Figure:
    """A run that trains routers: KL, realised and requested capacity, and the latest shares of the layers."""
    fig, (kl, share, layers) = style.panels(3, height=3.0, width=WIDE, sharey=False)
    curve(kl, log, "kl", BLUE)
    kl.set(ylabel="KL to the base, nats per token")
    curve(share, log, "share", BLUE, "realised")
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


def curve(ax: Axes, rows: pd.DataFrame, y: str, colour: str, label: str | None = None) -> None:
    """Each row as a point, by step, with a running mean through them; the axis starts at 0."""
    ax.plot(rows["step"], rows[y], "o", color=colour, markersize=2.5, alpha=0.5)
    ax.plot(rows["step"], rows[y].rolling(RECENT, min_periods=1, center=True).mean(), color=colour, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("step")
    ax.set_ylim(bottom=0)
