"""A picture of the method: how a router chooses among the channels of one token, and where in a layer it does so."""

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from hat_lib.plotting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE

INPUT = np.array([0.9, -0.1, 0.4, -1.2, 0.2, 0.1, -0.8, 0.3])
LENGTH = np.array([1.0, 2.0, 0.5, 0.8, 3.0, 1.0, 0.5, 2.2])
THRESHOLD = 0.5
FAINT, DARK = "#d9d9d9", "#555555"
LEFT, STEP = 25, 6.6  # the first channel, and from one to the next


def layer() -> Figure:
    """One token with eight channels: what is multiplied, which scores pass the threshold; below, one decoder layer."""
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(8.6, 5.6), layout="constrained")
        ax = fig.subplots()
        ax.set(xlim=(0, 100), ylim=(1, 65), aspect="equal")
        ax.axis("off")
        _channels(ax)
        _sites(ax)
        return fig


def _channels(ax: Axes) -> None:
    score, base, tall = np.abs(INPUT) * LENGTH, 34, 13
    ax.text(0, 63, "One token, eight channels", fontsize=11, weight="bold", va="center")
    for y, name in ((58, "what arrives, x"), (53.5, "length of its column of W"), (base, "score: size times length")):
        ax.text(0, y + (tall / 2 if y == base else 0), name, va="center")
    for i, (x, length, value) in enumerate(zip(INPUT, LENGTH, score, strict=True)):
        at, kept = LEFT + STEP * i, value > THRESHOLD
        colour = GREEN if kept else FAINT
        ax.text(at, 58, f"{x:.1f}".replace("-", "−"), ha="center", va="center")
        ax.text(at, 53.5, f"× {length:.1f}", ha="center", va="center")
        ax.add_patch(Rectangle((at - 2.2, base), 4.4, tall * value, fc=colour, ec="none"))
        ax.text(at, base + tall * value + 1.6, f"{value:.2f}", ha="center", va="center", fontsize=9, zorder=3,
                bbox={"fc": "white", "ec": "none", "pad": 0.6})  # fmt: skip
        ink, word = (GREEN, "read") if kept else (DARK, "skip")
        ax.text(at, base - 2.2, word, ha="center", va="center", color=ink, weight="bold" if kept else "normal")
    right = LEFT + STEP * 7 + 4
    ax.plot([LEFT - 4, right], [base + tall * THRESHOLD] * 2, "--", color=ORANGE, linewidth=1.6)
    ax.text(right + 1, base + tall * THRESHOLD, f"threshold τ = {THRESHOLD}", color="#a86800", va="center")
    notes = (
        (57.5, "0.2 is read: its column is long.\n−0.8 is skipped: its column is short."),
        (base - 2.2, "4 of 8: capacity 0.5"),
    )
    for y, note in notes:
        ax.text(right + 1, y, note, va="center", fontsize=8.5, color=DARK)


def _sites(ax: Axes) -> None:
    """A layer from left to right; a green bar is a choice of channels."""
    y = 17.5
    ax.text(0, 25.5, "Four such choices in each layer", fontsize=11, weight="bold", va="center")
    parts = ((2, 14, "q | k | v", BLUE), (21, 10, "attend", GREY), (36, 8, "o", BLUE), (49, 14, "gate | up", BLUE),
             (68, 10, "down", BLUE), (84, 13, "exit gate", PURPLE))  # fmt: skip
    for x, width, name, colour in parts:
        box = FancyBboxPatch(
            (x, y - 3), width, 6, "round,pad=0,rounding_size=0.7", fc="white", ec=colour, linewidth=1.6
        )
        ax.add_patch(box)
        ax.text(x + width / 2, y, name, ha="center", va="center")
        if colour == BLUE:
            ax.add_patch(Rectangle((x - 1.7, y - 3), 1.1, 6, fc=GREEN, ec="none"))
    for (x, width, *_), (end, *_) in zip(parts, parts[1:], strict=False):
        arrow = FancyArrowPatch(
            (x + width, y), (end - 1.8, y), arrowstyle="-|>", mutation_scale=8, shrinkA=0, shrinkB=0
        )
        ax.add_patch(arrow)
    ax.text(97, 11.5, "after five of the layers a token may leave;\nlater layers add its keys and values alone",
            fontsize=8.5, color=DARK, ha="right", va="center")  # fmt: skip
    rule = r"keep channel $i$ where   $|x_i| \cdot \Vert W_{:,i}\Vert \cdot e^{a_i} \cdot e^{u} > \tau$"
    ax.text(0, 4, rule, va="center", fontsize=11.5)
    ax.text(56, 4, "$a_i$: learned for the channel, 0 in the example\n$u$: the token's sensitivity, 0 in the example",
            va="center", fontsize=8.5, color=DARK)  # fmt: skip
