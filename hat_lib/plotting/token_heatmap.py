"""Coloured text as a picture, for pages that drop the colours of HTML, such as GitHub's view of a notebook."""

from collections.abc import Iterable

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from rich.style import Style

from hat_lib.plotting.style import STYLE, WIDTH
from hat_lib.text.coloured import Passage, Piece, paragraphs

# Characters per line; font size in points; width of a character and height of a line, in font sizes.
COLUMNS, SIZE, ADVANCE, LEADING = 100, 8.0, 0.602, 1.7
FONT = {"family": "DejaVu Sans Mono", "size": SIZE, "va": "center", "parse_math": False}
FRAME = {"fill": False, "edgecolor": "#d55e00", "linewidth": 2, "zorder": 2}  # of a marked token


@mpl.rc_context(STYLE)
def figure(*passages: Passage, meaning: str, low: float | None = None, high: float | None = None) -> Figure:
    """Passages as a picture, with the colours, arguments and errors of `hat_lib.text.coloured.html`."""
    lines = [line for paragraph in paragraphs(passages, meaning, low, high) for line in [[], *_wrapped(paragraph)]][1:]
    advance, step = SIZE * ADVANCE / 72, SIZE * LEADING / 72
    size = max(WIDTH, (COLUMNS + 2) * advance), step * (len(lines) + 1)
    fig = Figure(figsize=size)
    # A unit is one character wide and one line high.
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-1, size[0] / advance - 1), ylim=(len(lines) + 0.5, -0.5))
    ax.set_axis_off()
    for row, line in enumerate(lines):
        for column, part, style in line:
            if style.bgcolor:
                ax.add_patch(Rectangle((column, row), len(part), 1, facecolor=style.bgcolor.name, linewidth=0))
            if style.underline:
                ax.add_patch(Rectangle((column, row), len(part), 1, **FRAME))
            colour = style.color.name if style.color else "black"
            weight = "bold" if style.bold and not style.underline else "normal"
            ax.text(column, row + 0.5, in_font(part, FONT["family"]), color=colour, weight=weight, **FONT)
    return fig


def in_font(text: str, family: str | None = None) -> str:
    """The text, with a box for each character that the font, by default that of figures, does not have."""
    font = get_font(findfont(FontProperties(family=family)))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def _wrapped(pieces: Iterable[Piece]) -> list[list[tuple[int, str, Style]]]:
    """Lines of (column, characters, style); a piece is only broken if it is longer than a line."""
    lines, column = [[]], 0
    for text, style, *_ in pieces:
        for number, rest in enumerate(text.split("\n")):
            if number or column + len(rest) > COLUMNS:
                lines.append([])
                column = 0
            for start in range(0, len(rest), COLUMNS):
                if start:
                    lines.append([])
                part = rest[start : start + COLUMNS]
                lines[-1].append((0 if start else column, part, style))
                column = lines[-1][-1][0] + len(part)
    return lines
