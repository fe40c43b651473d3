"""Coloured text: each token's background shows its number, for a notebook (`html`) and a terminal (`ansi`). A picture
of it, for pages that drop the colours of HTML, such as GitHub's view of a notebook: `hat_lib.plotting.token_heatmap`.

The colours are cividis: perceptually uniform, and the same to eyes with and without colour deficiency (Nuñez, Anderton
and Renslow 2018, arXiv:1712.01662). The text on them is black or white, whichever contrasts more (WCAG 2: at least
4.5 : 1). Passages share one scale and one legend. Where no colours can be shown the number is a subscript: tenths of
the way from the low end of the scale to the high end.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex
from rich.console import Console
from rich.style import Style
from rich.text import Text

from hat_lib.config import HatError
from hat_lib.text.plain import printable

PALETTE = "cividis"
LIGHT = 0.47  # colours grow lighter along the scale; from here on black contrasts more than white
STEPS = 5  # of the legend


@dataclass(frozen=True)
class Passage:
    """A text to colour."""

    title: str
    tokens: Sequence[str]  #: as from `token_classes.pieces`: one without text is part of the next one's character
    values: Sequence[float]  #: each token's number; nan leaves it uncoloured
    mark: int | None = None  #: a token to mark: in bold and underlined, in a picture framed


class Piece(NamedTuple):
    """Whole characters, made visible."""

    text: str
    style: Style = Style.null()
    at: float = math.nan  #: position on the scale, 0-1; nan: not coloured
    numbers: str = ""


def passages(tokens: pd.DataFrame, column: str) -> list[Passage]:
    """A passage for each ``doc`` of `hat_lib.evaluation.tokens.TokenTable.tokens`, with the numbers in ``column``."""
    docs = tokens.groupby("doc", sort=False)
    return [Passage(str(doc), part["text"].tolist(), part[column].tolist()) for doc, part in docs]


def html(*passages: Passage, meaning: str, low: float | None = None, high: float | None = None) -> str:
    """Passages as one HTML fragment; hovering over a token shows its number.

    ``meaning`` is what the numbers are, for the legend; ``low`` and ``high`` are the ends of the scale, beyond which
    colours do not change, by default the lowest and the highest number. Raises `HatError` unless a passage has one
    number per token and the scale goes up from one finite number to another.
    """

    def span(piece: Piece) -> str:
        text, css = escape(piece.text), piece.style.get_html_style()
        return f'<span style="{css}" title="{piece.numbers}">{text}</span>' if css else text

    body = "".join(f"<p>{''.join(map(span, pieces))}</p>" for pieces in paragraphs(passages, meaning, low, high))
    style = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5"
    return f'<div style="{style}">{body}</div>'


def ansi(*passages: Passage, meaning: str, low: float | None = None, high: float | None = None) -> str:
    """Passages as lines for the terminal that stdout is, in 24-bit colour unless that is no terminal or a dumb one, or
    NO_COLOR is set (no-color.org); arguments and errors as for `html`."""
    lines = paragraphs(passages, meaning, low, high)
    console = Console(color_system="truecolor", force_jupyter=False)
    if not console.is_terminal or console.is_dumb_terminal or console.no_color:
        return "\n\n".join("".join(map(_subscript, pieces)) for pieces in lines)
    texts = [Text.assemble(*(piece[:2] for piece in pieces)) for pieces in lines]
    with console.capture() as captured:
        console.print(*texts, sep="\n\n", end="", soft_wrap=True)
    return captured.get()


def paragraphs(
    passages: Sequence[Passage], meaning: str, low: float | None = None, high: float | None = None
) -> list[list[Piece]]:
    """The legend, and each passage after its title; arguments and errors as for `html`."""
    values = [np.asarray(passage.values, dtype=float) for passage in passages]
    for passage, numbers in zip(passages, values, strict=True):
        if len(passage.tokens) != len(numbers):
            raise HatError(f"{passage.title!r}: got {len(numbers)} numbers for {len(passage.tokens)} tokens")
    values = np.concatenate([np.zeros(0), *values])
    known = values[np.isfinite(values)]
    if not len(known) and None in (low, high):
        raise HatError("nothing to colour: no token has a number")
    low, high = float(known.min() if low is None else low), float(known.max() if high is None else high)
    if not -np.inf < low <= high < np.inf:
        raise HatError(f"the scale must go from a finite number up to another, got {low} to {high}")

    def at(number: float) -> float:
        return float(np.clip((number - low) / (high - low), 0, 1)) if high > low else 0.5 + 0 * number

    # A sign if an end also stands for what lies beyond it.
    step = (high - low) / (STEPS - 1)
    decimals = max(2, 1 + math.ceil(-math.log10(step) - 1e-9)) if step > 0 else 2  # so that equal steps look equal
    marks = np.linspace(low, high, STEPS if step > 0 else 1)
    texts = [f"{mark:.{decimals}f}" for mark in marks]
    texts[0] = "≤ " * bool((values < low).any()) + texts[0]
    texts[-1] = "≥ " * bool((values > high).any()) + texts[-1]
    legend = [Piece(f"{visible(meaning)}:")]
    for mark, text in zip(marks, texts, strict=True):
        legend += [Piece(" "), Piece(text, _style(at(mark)), at(mark))]
    bold = Style(bold=True)
    return [legend, *([Piece(visible(p.title), bold), Piece("\n"), *_pieces(p, at)] for p in passages)]


def _pieces(passage: Passage, at) -> Iterator[Piece]:
    """Each with the mean of the numbers of the tokens that it came from."""
    texts, values = list(passage.tokens), np.asarray(passage.values, dtype=float)
    ends = [i for i, text in enumerate(texts) if text]
    start = 0
    for end in ends:
        stop = len(values) if end == ends[-1] else end + 1  # tokens after the last text join it
        known = values[start:stop][~np.isnan(values[start:stop])]
        place = at(known.mean()) if len(known) else math.nan
        marked = passage.mark is not None and start <= passage.mark < stop
        numbers = ", ".join(f"{value:.3f}" for value in known)
        yield Piece(visible(texts[end]), _style(place, bold=marked, underline=marked), place, numbers)
        start = stop


def visible(text: str) -> str:
    """The text with control and format characters replaced by visible signs; a newline still breaks the line."""
    lines = text.replace("\n", "↵\n").replace("\t", "⇥").split("\n")
    return "\n".join(map(printable, lines))


def colours(at: float) -> tuple[str, str]:
    """The background at a position on the scale, and the text colour that contrasts most with it: ``#rrggbb``."""
    return to_hex(colormaps[PALETTE](at)), "#000000" if at > LIGHT else "#ffffff"


def _style(at: float, **look: bool) -> Style:
    ground, ink = (None, None) if math.isnan(at) else colours(at)
    return Style(color=ink, bgcolor=ground, **look)


def _subscript(piece: Piece) -> str:
    digit = "" if math.isnan(piece.at) else chr(ord("₀") + min(9, int(10 * piece.at)))
    body = piece.text.rstrip("\n")
    return body + digit + piece.text[len(body) :]
