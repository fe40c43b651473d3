"""Coloured text as a picture, for pages that drop the colours of HTML, such as GitHub's view of a notebook."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from hat_lib.evaluation.coloured_text import FRAME, Passage, Scale, characters, colours_at, visible
from hat_lib.plotting.style import STYLE, WIDTH

# Characters per line; font size in points; width of a character and height of a line, in font sizes.
COLUMNS, SIZE, ADVANCE, LEADING = 100, 8.0, 0.602, 1.7
FONT = {"family": "DejaVu Sans Mono", "size": SIZE, "va": "center", "parse_math": False}


def figure(*passages: Passage, meaning: str, low=None, high=None) -> Figure:
    """Passages as a picture, with the colours, arguments and errors of `hat_lib.evaluation.coloured_text.html`."""
    scale = Scale(passages, low, high)
    legend = ((f" {text} ", at, False) for at, text in scale.legend())
    lines = _wrapped([(visible(meaning) + " ", np.nan, False), *legend])
    if scale.most < scale.least:  # no numbers, so no legend
        lines = [[]]
    for p in passages:
        lines += [[], *_wrapped([(visible(p.title), None, False)])]
        lines += _wrapped((text, scale.at(numbers), marked) for text, numbers, marked in characters(p))
    advance, step = SIZE * ADVANCE / 72, SIZE * LEADING / 72
    size = max(WIDTH, (COLUMNS + 2) * advance), step * (len(lines) + 1)
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=size)
        # A unit is one character wide and one line high.
        ax = fig.add_axes((0, 0, 1, 1), xlim=(-1, size[0] / advance - 1), ylim=(len(lines) + 0.5, -0.5))
        ax.set_axis_off()
        for row, line in enumerate(lines):
            for column, part, at, marked in line:
                ink, weight = "black", "bold" if at is None else "normal"
                if at is not None and not np.isnan(at):
                    rgb, ink = colours_at(at)
                    ground = [v / 255 for v in rgb]
                    ax.add_patch(Rectangle((column, row), len(part), 1, facecolor=ground, linewidth=0))
                if marked:
                    frame = {"fill": False, "edgecolor": FRAME, "linewidth": 2, "zorder": 2}
                    ax.add_patch(Rectangle((column, row), len(part), 1, **frame))
                ax.text(column, row + 0.5, in_font(part, FONT["family"]), **FONT, color=ink, weight=weight)
    return fig


def in_font(text: str, family: str | None = None) -> str:
    """The text, with a box for each character that the font, by default that of figures, does not have."""
    font = get_font(findfont(FontProperties(family=family)))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def _wrapped(parts: Iterable[tuple[str, float | None, bool]]) -> list[list[tuple[int, str, float | None, bool]]]:
    """Lines of (column, characters, position on the scale, whether it is marked); a part is only broken if it is longer
    than a line."""
    lines, column = [[]], 0
    for text, *look in parts:
        for i, part in enumerate(text.split("\n")):
            over = column + len(part) > COLUMNS
            for j in range(0, max(1, len(part)), COLUMNS):
                if i or j or over:
                    lines.append([])
                    column = 0
                if head := part[j : j + COLUMNS]:
                    lines[-1].append((column, head, *look))
                column += len(head)
    return lines
