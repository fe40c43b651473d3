"""Coloured text as a picture, for pages that drop the colours of HTML, such as GitHub's view of a notebook.

The twin of `hat_lib.plotting.token_heatmap.html`: the same colours on the same scale. Of several tokens that share a
character the last one colours it.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from seaborn.utils import relative_luminance

from hat_lib.config import HatError
from hat_lib.plotting.style import STYLE, WIDTH
from hat_lib.plotting.token_heatmap import PALETTE, Passage, visible

COLUMNS = 100  # characters of a line
SIZE = 8.0  # points
ADVANCE, LEADING = 0.602, 1.7  # of DejaVu Sans Mono: width of a character, and from line to line, in sizes
LEGEND, EDGE = 0.62, 0.08  # inches
FONT = {"family": "DejaVu Sans Mono", "size": SIZE, "va": "center", "parse_math": False}


def text(*passages: Passage, meaning: str, low: float, high: float) -> Figure:
    """Passages with each token on a ground that says its number; without a number the ground stays white.

    Args:
        meaning: what the numbers are, for the legend.
        low, high: ends of the scale, beyond which colours do not change.

    Raises `HatError` without a passage, for one whose tokens are not one for each number, and for a scale that does
    not go up.
    """
    if not passages or not low < high:
        raise HatError(f"expected passages and a scale that goes up, got {len(passages)} of them, {low} to {high}")
    for p in passages:
        if len(p.tokens) != len(p.values):
            raise HatError(f"{p.title!r}: expected a number for each token, got {len(p.values)} for {len(p.tokens)}")
    lines = [line for p in passages for line in _lines(p)]
    step, advance = SIZE * LEADING / 72, SIZE * ADVANCE / 72
    width, height = max(WIDTH, COLUMNS * advance + 2 * EDGE), LEGEND + step * len(lines) + EDGE
    colours = ScalarMappable(Normalize(low, high, clip=True), PALETTE)
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(width, height))
        ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        ax.set_axis_off()
        for row, line in enumerate(lines):
            y = LEGEND + step * (row + 0.5)
            for column, part, value in line:
                _token(ax, EDGE + column * advance, y, part, advance, step, colours, value)
        bar = fig.add_axes((EDGE / width, 1 - 0.45 / height, 3 / width, 0.14 / height))
        fig.colorbar(colours, cax=bar, orientation="horizontal", extend="both", ticks=MaxNLocator(5))
        bar.tick_params(labelsize=SIZE)
        bar.set_title(meaning, fontsize=SIZE + 1)
    return fig


def _token(ax, x: float, y: float, part: str, advance: float, step: float, colours: ScalarMappable, value) -> None:
    if value is None:  # a title
        ax.text(x, y, part, **FONT, weight="bold")
        return
    ink = "black"
    if not np.isnan(value):
        ground = colours.to_rgba(value)
        ink = "black" if relative_luminance(ground) > 0.179 else "white"  # whichever contrasts more, by WCAG 2
        ax.add_patch(Rectangle((x, y - step / 2), advance * len(part), step, facecolor=ground, linewidth=0))
    ax.text(x, y, part, **FONT, color=ink)


def _lines(passage: Passage) -> list[list[tuple[int, str, float | None]]]:
    """A blank line's room, the title, then the text: each line a list of column, characters and number."""
    lines, column = [[], [(0, _drawn(visible(passage.title)), None)], []], 0
    for token, value in zip(passage.tokens, passage.values, strict=True):
        for i, part in enumerate(visible(token).split("\n")):
            if i or column + len(part) > COLUMNS:
                lines.append([])
                column = 0
            while part:  # a token may be longer than a line
                head, part = part[:COLUMNS], part[COLUMNS:]
                lines[-1].append((column, _drawn(head), float(value)))
                column += len(head)
                if part:
                    lines.append([])
                    column = 0
    return lines


def _drawn(characters: str) -> str:
    """In characters that the font has."""
    font = get_font(findfont(FontProperties(family=FONT["family"])))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in characters)
