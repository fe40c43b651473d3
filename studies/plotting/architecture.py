"""A picture of the method: one layer of a Llama, what a token runs in it, what it skips, and where it may leave."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from hat_lib.plotting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE

KEPT = {"qkv": "x.xxx.x.", "o": ".x..x.x.", "gate_up": "xx.x.xx.", "down": "..x...x."}  # eight channels for all
FAINT = "#dddddd"


def layer() -> Figure:
    """One decoder layer at the channel grain: four routed inputs, one sensitivity per token, and an exit after it."""
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(9.4, 4.5), layout="constrained")
        ax = fig.subplots()
        ax.set(xlim=(0, 100), ylim=(0, 48), aspect="equal")
        ax.axis("off")
        _layer(ax)
        _exit(ax)
        return fig


def _layer(ax: Axes) -> None:
    y = 22
    ax.text(0.5, y + 4.6, "state of\na token", ha="left", va="bottom", fontsize=8.5)
    _arrow(ax, (0.5, y), (8, y))
    places = {"qkv": (8, "q | k | v", 12), "o": (31, "o", 6), "gate_up": (49, "gate | up", 11), "down": (69, "down", 7)}
    for site, (x, name, width) in places.items():
        _channels(ax, x, y, KEPT[site])
        _box(ax, x + 4.2, y, width, 6, name, BLUE)
        _arrow(ax, (x + 1.6, y), (x + 4.2, y))
        _arrow(ax, (x + 0.8, 36.5), (x + 0.8, y + 6.8), ORANGE)
    _box(ax, 25.4, y, 4.2, 6, "attend", GREY, 6.5)
    for start, end in ((24.2, 25.2), (29.6, 31), (41.2, 49), (64.2, 69), (80.2, 81)):
        _arrow(ax, (start, y), (end, y))
    for x in (44.5, 82.5):
        ax.text(x, y, "+", ha="center", va="center", fontsize=12, bbox={"boxstyle": "circle,pad=0.15", "fc": "white"})
    ax.text(66.5, y + 1, "silu ·", ha="center", va="bottom", fontsize=7.5)
    _bent(ax, 3, 44.5, y)
    _bent(ax, 46.5, 82.5, y)

    ax.add_patch(FancyBboxPatch((7.2, 36.5), 66, 5, "round,pad=0.4", fc="white", ec=ORANGE, linewidth=1.4))
    score = r"keep channel $i$ where   $|x_i| \cdot \Vert W_{:,i} \Vert \cdot e^{a_i} \cdot e^{u} > \tau$"
    ax.text(40.5, 39, f"router:  {score}", ha="center", va="center", fontsize=10.5)
    ax.text(0.5, 46.6, r"$\tau$: one threshold for each layer, site and capacity     $a_i$: learned     "
            r"$u$: the token's sensitivity, measured, once a layer", fontsize=8.5, va="center")  # fmt: skip
    _box(ax, 10.6, 31, 8, 4, "$u = w \\cdot h + b$", ORANGE, 8)
    ax.text(19.2, 31, "one for all four", fontsize=7.5, va="center", color="#555555")

    _box(ax, 15, 10.5, 17, 4.2, "cache: keys and values", GREY, 7.5)
    _arrow(ax, (18.5, y - 3), (20.5, 12.8), GREY)
    _arrow(ax, (25.5, 12.8), (27.2, y - 3), GREY)


def _exit(ax: Axes) -> None:
    y = 22
    _arrow(ax, (84.2, y), (87, y))
    _box(ax, 87, y, 8, 6, "exit gate", PURPLE, 8)
    _arrow(ax, (95, y), (99.5, y))
    ax.text(95.6, y + 1, "stays", fontsize=7.5, ha="left")
    ax.text(91, 17.6, "finished", fontsize=7.5, ha="left", color=PURPLE)
    _arrow(ax, (90, y - 3), (90, 12.8), PURPLE)
    _box(ax, 82, 10.5, 17, 4.2, "translator, norm, head", PURPLE, 7.5)
    # What remains of a token that has left: keys and values in later layers, from its frozen state.
    _box(ax, 41, 10.5, 36, 4.2, "later layers: keys and values alone, of its frozen state", "#bbbbbb", 7.5, "#444444")
    _arrow(ax, (82, 10.5), (77, 10.5), "#bbbbbb")
    keys = (
        (0.5, BLUE, "base, frozen"),
        (17, ORANGE, "routers"),
        (30, PURPLE, "exits, after five of the layers"),
        (55, GREY, "attention"),
        (69, GREEN, "channels that are read"),
        (91, FAINT, "not read"),
    )
    for x, colour, name in keys:
        ax.add_patch(Rectangle((x, 2.6), 1.6, 1.6, fc=colour, ec="none"))
        ax.text(x + 2.4, 3.3, name, fontsize=8.5, va="center")


def _channels(ax: Axes, x: float, y: float, kept: str) -> None:
    """A vector of channels, from bottom to top; ``kept`` marks kept channels with x."""
    for channel, low in zip(kept, y + 1.5 * (np.arange(8) - 4), strict=True):
        ax.add_patch(Rectangle((x, low), 1.6, 1.3, fc=GREEN if channel == "x" else FAINT, ec="none"))


def _box(ax, x, y, width, height, text, colour, fontsize=9.0, ink="black") -> None:
    """A box whose left edge is at ``x``, centred on ``y``."""
    patch = FancyBboxPatch((x, y - height / 2), width, height, "round,pad=0,rounding_size=0.7", fc="white", ec=colour)
    patch.set_linewidth(1.6)
    ax.add_patch(patch)
    ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=fontsize, color=ink)


def _arrow(ax, start, end, colour="black") -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1.2,
                                 shrinkA=0, shrinkB=0))  # fmt: skip


def _bent(ax, start, end, y) -> None:
    """The residual connection, below the boxes."""
    low = y - 7.2
    ax.plot([start, start, end, end], [y, low, low, y - 1.6], color=GREY, linewidth=1, zorder=0)
