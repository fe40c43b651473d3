"""Coloured text: the text survives, nothing in it is interpreted, it is readable on its background, numbers are there
even without colours; in a picture every character is in its place."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from hat_lib.config import HatError
from hat_lib.evaluation import coloured_text as coloured
from hat_lib.evaluation.coloured_text import Passage, ansi, html
from hat_lib.plotting.token_heatmap import COLUMNS, figure

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


def spans(fragment):
    return [(a.get("title"), a["style"]) for tag, a in Page(fragment).tags if tag == "span" and "title" in a]


def grounds(text):
    """8-bit background and text colour of each coloured run."""
    found = re.findall(r"\x1b\[48;2;(\d+);(\d+);(\d+);38;2;(\d+);\d+;\d+m", text)
    return [(tuple(map(int, f[:3])), int(f[3])) for f in found]


def drawn(*passages, low=0.0, high=1.0):
    """(row below the legend, column, characters) of each piece of text, and likewise its background and text colour."""
    ax = figure(*passages, meaning="share", low=low, high=high).axes[0]
    words = [(int(y) - 1, int(x), t.get_text()) for t in ax.texts for x, y in [t.get_position()] if y > 1]
    inks = {(int(y) - 1, int(x)): t.get_color() for t in ax.texts for x, y in [t.get_position()]}
    grounds = {(int(p.get_y()) - 1, int(p.get_x())): (p.get_width(), p.get_facecolor()) for p in ax.patches}
    return words, {place: (*ground, inks[place]) for place, ground in grounds.items()}


def test_nothing_in_the_text_acts_on_a_page_and_nothing_is_fetched():
    fragment = html(Passage("<b>", HOSTILE, np.linspace(0, 1, len(HOSTILE))), meaning="<i>")
    page = Page(fragment)
    assert {tag for tag, _ in page.tags} == {"div", "p", "strong", "br", "span"} and "http" not in fragment
    assert all(set(attrs) <= {"style", "title"} for _, attrs in page.tags)
    assert HOSTILE[0] in page.data and "<b>" in page.data and "<i>" in page.data
    assert "\u202e" not in page.data and r"\u202egnp.exe" in page.data
    page.data.encode()  # the lone surrogate is spelled out, not kept


@pytest.mark.parametrize("colours", [True, False])
def test_nothing_in_the_text_acts_on_a_terminal(colours):
    shown = ansi(Passage("\x1b]0;t\x07", HOSTILE, [0.5] * len(HOSTILE)), meaning="m", colours=colours)
    left = ESCAPE.sub("", shown)
    assert [c for c in left if ord(c) < 32 and c != "\n" or 0x7F <= ord(c) < 0xA0] == [] and "\u202e" not in left
    assert "␛[2J" in left and "\\u009b31m" in left and "␍" in left
    left.encode()


def test_line_ends_and_tabs_show_and_the_ground_ends_with_the_line():
    shown = ansi(Passage("t", ["a\n\n", "\tb"], [0.0, 1.0]), meaning="m", colours=True)
    text = shown.split("\nt\n")[1]
    assert ESCAPE.sub("", text) == "a↵\n↵\n⇥b"
    assert all(line.count("\x1b[48") == line.count("\x1b[0m") for line in shown.split("\n"))
    assert "a↵\n↵\n" in Page(html(Passage("t", ["a\n\n"], [0.0]), meaning="m")).data


def test_pieces_of_a_character_share_it():
    for tokens, values in ((["a", "", "", "🦙"], [0.0, 0.2, 0.4, 0.9]), (["a", "🦙", "", ""], [0.0, 0.2, 0.4, 0.9])):
        titles = [title for title, _ in spans(html(Passage("t", tokens, values), meaning="m"))]
        assert titles == ["0.000", "0.200, 0.400, 0.900"]
    (_, of_mean), (_, of_same) = (
        spans(html(Passage("t", tokens, values), meaning="m", low=0, high=1))[0]
        for tokens, values in ((["", "é"], [0.2, 0.6]), (["é"], [0.4]))
    )
    assert of_mean == of_same
    assert spans(html(Passage("t", ["", ""], [0.1, 0.2]), meaning="m")) == []


def test_ink_is_readable_on_every_ground_and_all_three_have_the_same():
    passage = Passage("t", ["x"] * 256, np.linspace(0, 1, 256))

    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    found = grounds(ansi(passage, meaning="m", colours=True))[coloured.STEPS :]
    page = [style for _, style in spans(html(passage, meaning="m"))]
    picture = [v for place, v in sorted(drawn(passage)[1].items()) if place[0] > 0]
    assert len(found) == len(page) == len(picture) == 256
    lights = [luminance(ground) for ground, _ in found]
    assert lights == sorted(lights)  # lightness alone shows the order
    for (ground, grey), style, (_, face, ink) in zip(found, page, picture, strict=True):
        name = "white" if grey else "black"
        assert style == f"background:#{''.join(f'{c:02x}' for c in ground)};color:{name}"
        assert to_rgba(style[11:18]) == pytest.approx(face) and ink == name
        low, high = sorted((luminance(ground), luminance([grey] * 3)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_passages_share_scale_and_legend_which_says_where_colours_stop():
    a, b = Passage("a", ["x"], [0.2]), Passage("b", ["y"], [0.6])
    together = html(a, b, meaning="m")
    assert [float(v) for v in re.findall(r">([\d.]+)</span>", together)[:5]] == [0.2, 0.3, 0.4, 0.5, 0.6]
    assert spans(together)[0][1] == spans(html(a, meaning="m", low=0.2, high=0.6))[0][1] != spans(html(a, meaning="m"))
    assert together.count("padding") == 5 and "≤" not in together and "≥" not in together
    shown = html(Passage("t", ["a", "b", "c"], [0.0, 0.5, 9.0]), meaning="m", low=0.2, high=0.6)
    assert "≤ 0.20" in shown and "≥ 0.60" in shown
    styles = [style for _, style in spans(shown)]
    assert [styles[0], styles[2]] == [style for _, style in spans(together)]
    one = html(Passage("t", ["a", "b"], [0.5, 0.5]), meaning="m")  # a single number is a scale, too
    assert one.count(">0.50<") == 1 and len(spans(one)) == 2


def test_without_colours_subscripts_say_tenths():
    passage = Passage("t", ["a", " b", "x", "c\n"], [0.0, 0.55, np.nan, 1.0])
    shown = ansi(passage, meaning="m", colours=False)
    assert shown.endswith("\na₀ b₅xc↵₉\n") and "\x1b" not in shown
    assert "</span>x<span" in html(passage, meaning="m")  # a token without a number has no colour
    assert shown.startswith("m: 0.00₀ 0.25₂ 0.50₅ 0.75₇ 1.00₉\n")


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [
        (True, {"NO_COLOR": ""}, True),  # as the convention says
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_only_where_they_are_wanted(monkeypatch, terminal, environment, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert ("\x1b" in ansi(Passage("t", ["a"], [0.5]), meaning="m")) is expected


@pytest.mark.parametrize(
    ("passage", "scale", "words"),
    [
        (Passage("t", ["a", "b"], [0.5]), {}, "'t': got 1 numbers for 2 tokens"),
        (Passage("t", ["a"], [np.nan]), {}, "no token has a number"),
        (Passage("t", [], []), {}, "no token has a number"),
        (Passage("t", ["a"], [0.5]), {"low": 0.6}, "0.6 to 0.5"),
        (Passage("t", ["a"], [0.5]), {"high": np.inf}, "0.5 to inf"),
    ],
)
def test_what_cannot_be_coloured_is_named(passage, scale, words):
    for render in (html, ansi, figure):
        with pytest.raises(HatError, match=re.escape(words)):
            render(passage, meaning="m", **scale)


def test_a_picture_has_every_token_where_the_text_has_it():
    words, ground = drawn(Passage("one", ["ab", " c\n", "d"], [0.0, 1.0, np.nan]))
    assert words == [(1, 0, "one"), (2, 0, "ab"), (2, 2, " c↵"), (3, 0, "d")]
    assert [width for place, (width, *_) in ground.items() if place[0] > 0] == [2, 3]
    long = "x" * (COLUMNS + 5)
    words, _ = drawn(Passage("t", ["a" * (COLUMNS - 2), "bcd", long], [0.1, 0.2, 0.3]))
    assert [(row, column, len(part)) for row, column, part in words[1:]] == [
        (2, 0, COLUMNS - 2), (3, 0, 3), (4, 0, COLUMNS), (5, 0, 5),
    ]  # fmt: skip
    words, _ = drawn(Passage("a", ["x"], [0.5]), Passage("$b_1$", ["\t", "\x1b", "🦙", ""], [0.5] * 4))
    assert words == [(1, 0, "a"), (2, 0, "x"), (4, 0, "$b_1$"), (5, 0, "⇥"), (5, 1, "□"), (5, 2, "□")]


def test_a_marked_token_is_framed_with_what_it_shares_a_character_with():
    passage = Passage("p", ["one", "", " two", "three"], [0.1, 0.2, 0.3, 0.4], mark=1)
    framed = [attrs for _, attrs in Page(html(passage, meaning="")).tags if "outline" in attrs.get("style", "")]
    assert [attrs["title"] for attrs in framed] == ["0.200, 0.300"]
    frames = [patch for patch in figure(passage, meaning="m").axes[0].patches if not patch.get_fill()]
    assert [(patch.get_x(), patch.get_width()) for patch in frames] == [(3, 4)]
    assert "outline" in html(Passage("p", ["one"], [np.nan], mark=0), meaning="", low=0, high=1)
    assert "outline" not in html(Passage("p", ["one"], [0.1], mark=1), meaning="")


def test_without_a_meaning_there_is_no_legend():
    passage = Passage("p", ["one"], [0.1])
    assert [tag for tag, _ in Page(html(passage, meaning="")).tags][1:] == ["p", "strong", "br", "span"]
    assert len(Page(html(passage, meaning="m")).tags) == 7
