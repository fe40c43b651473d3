"""Coloured text: nothing in it acts on a page or terminal, and it can be read on its ground and without colours."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hat_lib.plotting.token_heatmap import COLUMNS, figure
from hat_lib.text.coloured import Passage, ansi, html

ESCAPE = re.compile(r"\x1b\[[\d;]*m")
HOSTILE = ["<script>alert(1)</script>", '" onload="x', "&amp;", "\x1b[2J", "\x9b31m", "\u202egnp.exe", "\r", "\ud800"]


class Page(HTMLParser):
    """What a browser sees: tags with their attributes, and the text between them."""

    def __init__(self, fragment):
        super().__init__()
        self.tags, self.data = [], ""
        self.feed(fragment)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.data += data


@pytest.fixture(params=(True, False))
def colours(request, monkeypatch):
    """Whether stdout is a terminal that shows colours."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: request.param, raising=False)
    return request.param


def test_nothing_in_the_text_acts(colours):
    passage = Passage("<b>\x1b]0;t\x07", HOSTILE, np.linspace(0, 1, len(HOSTILE)))
    fragment = html(passage, meaning="<i>")
    page = Page(fragment)
    assert {tag for tag, _ in page.tags} == {"div", "p", "span"} and "http" not in fragment
    assert all(set(attrs) <= {"style", "title"} for _, attrs in page.tags)
    assert HOSTILE[0] in page.data and "<b>" in page.data and "<i>" in page.data
    assert ("\x1b" in ansi(passage, meaning="m")) == colours
    for shown in (page.data, ESCAPE.sub("", ansi(passage, meaning="m"))):
        assert not [c for c in shown if ord(c) < 32 and c != "\n" or 0x7F <= ord(c) < 0xA0] and "\u202e" not in shown
        shown.encode()  # the lone surrogate is spelled out, not kept


@pytest.mark.parametrize("colours", [True], indirect=True)
def test_ink_is_readable_on_every_ground(colours):
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb, float) / 255]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    text = ansi(Passage("t", ["x"] * 64, np.linspace(0, 1, 64)), meaning="m")
    found = re.findall(r"\x1b\[38;2;(\d+);\d+;\d+;48;2;(\d+);(\d+);(\d+)m", text)
    assert len(found) == 64 + 5
    for grey, *ground in found:
        low, high = sorted((luminance(ground), luminance([grey] * 3)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("colours", [False], indirect=True)
def test_without_colours_subscripts_say_tenths(colours):
    passage = Passage("t", ["a", " b", "x", "c\n"], [0.0, 0.55, np.nan, 1.0])
    shown = ansi(passage, meaning="m")
    assert shown.endswith("\na₀ b₅xc↵₉\n") and "\x1b" not in shown
    assert "</span>x<span" in html(passage, meaning="m")  # a token without a number has no colour
    assert shown.startswith("m: 0.00₀ 0.25₂ 0.50₅ 0.75₇ 1.00₉\n")


def test_colours_only_where_they_are_wanted(monkeypatch):
    cases = [(True, "xterm", "", True), (False, "xterm", "", False), (True, "xterm", "1", False)]
    for terminal, term, no_color, expected in [*cases, (True, "dumb", "", False)]:
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal, raising=False)
        assert ("\x1b" in ansi(Passage("t", ["a"], [0.5]), meaning="m")) is expected


def test_figure():
    def texts(*passages):
        return [text.get_text() for text in figure(*passages, meaning="share", low=0, high=1).axes[0].texts]

    assert texts(Passage("one", ["ab", " c\n", "d"], [0.0, 1.0, np.nan]))[-4:] == ["one", "ab", " c↵", "d"]
    assert texts(Passage("$b_1$", ["\t", "\x1b", "🦙", ""], [0.5] * 4))[-4:] == ["$b_1$", "⇥", "\\x1b", "□"]
    assert [len(text) for text in texts(Passage("t", ["x" * (COLUMNS + 5)], [0.1]))[-2:]] == [COLUMNS, 5]
