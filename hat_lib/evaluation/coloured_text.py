"""Coloured text: each token's background shows its number, for a notebook (`html`) and a terminal (`ansi`). A picture
of it, for pages that drop the colours of HTML, such as GitHub's view of a notebook: `hat_lib.plotting.token_heatmap`.

The colours are cividis: perceptually uniform, and the same to eyes with and without colour deficiency (Nuñez, Anderton
and Renslow 2018, arXiv:1712.01662). Each background has black or white text, whichever contrasts more (WCAG 2: at least
4.5 : 1). Passages share one scale and one legend. Where no colours can be shown the number is a subscript: tenths of
the way from the low end of the scale to the high end.
"""

from __future__ import annotations

import math
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd
from matplotlib import colormaps

from hat_lib.config import HatError

PALETTE = "cividis"
STEPS = 5  # of the legend
FRAME = "#d55e00"  # of a marked token


@dataclass(frozen=True)
class Passage:
    """A text to colour."""

    title: str
    tokens: Sequence[str]
    """as from `hat_lib.text.token_classes.pieces`: a token without text is part of the next one's character"""
    values: Sequence[float]
    """each token's number; nan leaves it uncoloured"""
    mark: int | None = None
    """a token to frame, on a page and in a picture"""


def passages(tokens: pd.DataFrame, column: str) -> list[Passage]:
    """A passage for each ``doc`` of `hat_lib.evaluation.tokens.TokenTable.tokens`, with the numbers in ``column``."""
    docs = tokens.groupby("doc", sort=False)
    return [Passage(str(doc), part["text"].tolist(), part[column].tolist()) for doc, part in docs]


def html(*passages: Passage, meaning: str, low: float | None = None, high: float | None = None) -> str:
    """Passages as one HTML fragment; hovering over a token shows its number.

    ``meaning`` is what the numbers are, for the legend (if empty, there is none); ``low`` and ``high`` are the ends of
    the scale, beyond which colours do not change, by default the lowest and the highest number. Raises `HatError` if a
    passage does not have one number per token, if no token has a number and the ends are not given, and for a scale
    that does not go up from one finite number to another.
    """
    scale, parts = Scale(passages, low, high), []
    if meaning:
        swatches = "".join(f'<span style="{_css(at)};padding:0 .6em">{text}</span>' for at, text in scale.legend())
        parts.append(f"<p>{escape(visible(meaning))} {swatches}</p>")
    for passage in passages:
        spans = ""
        for text, numbers, marked in characters(passage):
            at = scale.at(numbers)
            css, title = f"outline:2px solid {FRAME};outline-offset:-1px;font-weight:bold;" * marked, ""
            if not np.isnan(at):
                css, title = css + _css(at), f' title="{", ".join(f"{v:.3f}" for v in numbers)}"'
            spans += f'<span style="{css}"{title}>{escape(text)}</span>' if css else escape(text)
        parts.append(f"<p><strong>{escape(visible(passage.title))}</strong><br>{spans}</p>")
    style = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5"
    return f'<div style="{style}">{"".join(parts)}</div>'


def ansi(*passages: Passage, meaning: str, low=None, high=None, colours: bool | None = None) -> str:
    """Passages as lines for a terminal with 24-bit colour; arguments and errors as for `html`.

    ``colours``: whether to write escape codes; by default, on a terminal that is not dumb, unless NO_COLOR is set.
    """
    scale = Scale(passages, low, high)
    if colours is None:  # no-color.org
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    paint = _painted if colours else _subscript
    legend = " ".join(paint(text, at) for at, text in scale.legend())
    lines = [f"{visible(meaning)}: {legend}"]
    for passage in passages:
        spans = [paint(text, scale.at(numbers)) for text, numbers, _ in characters(passage)]
        lines += ["", visible(passage.title), "".join(spans)]
    return "\n".join(lines)


def visible(text: str) -> str:
    """The text with control and format characters replaced by visible signs; a newline still breaks the line."""
    return "".join(map(_sign, text))


class Scale:
    """From ``low`` to ``high``; the numbers themselves, ``least`` to ``most``, may lie outside."""

    def __init__(self, passages: Sequence[Passage], low: float | None, high: float | None):
        for p in passages:
            if len(p.tokens) != len(p.values):
                raise HatError(f"{p.title!r}: got {len(p.values)} numbers for {len(p.tokens)} tokens")
        values = np.concatenate([np.zeros(0), *(np.asarray(p.values, dtype=float) for p in passages)])
        known = values[np.isfinite(values)]
        if not len(known) and None in (low, high):
            raise HatError("nothing to colour: no token has a number")
        self.low, self.high = float(known.min() if low is None else low), float(known.max() if high is None else high)
        if not -np.inf < self.low <= self.high < np.inf:
            raise HatError(f"the scale must go from a finite number up to another, got {self.low} to {self.high}")
        values = values[~np.isnan(values)]
        self.least, self.most = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))

    def at(self, numbers: np.ndarray) -> float:
        """The position of the numbers' mean on the scale, 0-1; nan if there are none."""
        known = numbers[~np.isnan(numbers)]
        if not len(known):
            return np.nan
        return float(np.clip((known.mean() - self.low) / (self.high - self.low), 0, 1)) if self.high > self.low else 0.5

    def legend(self) -> list[tuple[float, str]]:
        """Positions on the scale and their numbers, with a sign if an end also stands for what lies beyond it."""
        values = np.linspace(self.low, self.high, STEPS if self.high > self.low else 1)
        step = (self.high - self.low) / (STEPS - 1)
        decimals = max(2, 1 + math.ceil(-math.log10(step) - 1e-9)) if step > 0 else 2  # so that equal steps look equal
        texts = [f"{value:.{decimals}f}" for value in values]
        texts[0] = "≤ " * (self.least < self.low) + texts[0]
        texts[-1] = "≥ " * (self.most > self.high) + texts[-1]
        return [(self.at(value[None]), text) for value, text in zip(values, texts, strict=True)]


def characters(passage: Passage) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Visible text, the numbers of the tokens it came from, and whether one of them is marked; whole characters."""
    texts, values = list(passage.tokens), np.asarray(passage.values, dtype=float)
    ends = [i for i, text in enumerate(texts) if text]
    start = 0
    for end in ends:
        stop = len(values) if end == ends[-1] else end + 1  # tokens after the last text join it
        yield visible(texts[end]), values[start:stop], passage.mark is not None and start <= passage.mark < stop
        start = stop


def _sign(c: str) -> str:
    if c == "\n":
        return "↵\n"
    if c == "\t":
        return "⇥"
    if c < " ":
        return chr(0x2400 + ord(c))
    # Controls, formats (including those that change text direction), lone surrogates, Unicode line separators.
    return f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c


def colours_at(at: float) -> tuple[tuple[int, ...], str]:
    """Background as 8-bit RGB, and the text colour that contrasts most with it."""
    rgb = np.array(colormaps[PALETTE](at, bytes=True)[:3])
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return tuple(rgb.tolist()), "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"


def _css(at: float) -> str:
    rgb, ink = colours_at(at)
    return f"background:#{bytes(rgb).hex()};color:{ink}"


def _painted(text: str, at: float) -> str:
    if np.isnan(at):
        return text
    (r, g, b), ink = colours_at(at)
    on = f"\x1b[48;2;{r};{g};{b};38;2" + (";0" if ink == "black" else ";255") * 3 + "m"
    # Off before a newline, or the terminal colours the rest of the line.
    return "\n".join(f"{on}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def _subscript(text: str, at: float) -> str:
    digit = "" if np.isnan(at) else chr(ord("₀") + min(9, int(10 * at)))
    body = text.rstrip("\n")
    return body + digit + text[len(body) :]
