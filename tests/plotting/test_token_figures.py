"""Coloured text as a picture: every character stands where the text has it, on the colour of its token's number."""

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgba

from hat_lib.config import HatError
from hat_lib.plotting import token_figures as text_plots
from hat_lib.plotting.style import png
from hat_lib.plotting.token_figures import ADVANCE, COLUMNS, EDGE, LEADING, SIZE, text
from hat_lib.plotting.token_heatmap import PALETTE, Passage


def drawn(fig):
    """(row, column, characters) of each piece of text, from the top, and the grounds in the same terms."""
    ax, step, advance = fig.axes[0], SIZE * LEADING / 72, SIZE * ADVANCE / 72
    place = lambda x, y: (int((y - text_plots.LEGEND) / step), round((x - EDGE) / advance))  # noqa: E731
    words = [(*place(*t.get_position()), t.get_text()) for t in ax.texts]
    grounds = {
        place(p.get_x(), p.get_y() + step / 2): (round(p.get_width() / advance), p.get_facecolor()) for p in ax.patches
    }
    return words, grounds


def figure(*passages, low=0.0, high=1.0):
    return text(*passages, meaning="share", low=low, high=high)


def test_tokens_stand_where_the_text_has_them_on_their_colours():
    words, grounds = drawn(figure(Passage("one", ["ab", " c\n", "d"], [0.0, 1.0, np.nan])))
    assert words == [(1, 0, "one"), (2, 0, "ab"), (2, 2, " c↵"), (3, 0, "d")]
    assert grounds == {(2, 0): (2, colormaps[PALETTE](0.0)), (2, 2): (3, colormaps[PALETTE](1.0))}


def test_a_line_breaks_between_tokens_and_a_token_only_if_it_is_longer_than_a_line():
    long = "x" * (COLUMNS + 5)
    words, _ = drawn(figure(Passage("t", ["a" * (COLUMNS - 2), "bcd", long], [0.1, 0.2, 0.3])))
    assert [(row, column, len(part)) for row, column, part in words[1:]] == [
        (2, 0, COLUMNS - 2), (3, 0, 3), (4, 0, COLUMNS), (5, 0, 5),
    ]  # fmt: skip


def luminance(colour):
    """Relative luminance of WCAG 2."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour[:3]]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


def test_ink_can_be_read_on_its_ground():
    fig = figure(Passage("t", ["a", "b", "c", "d", "e"], [0.0, 0.25, 0.5, 0.75, 1.0]))
    _, grounds = drawn(fig)
    for piece, (_, ground) in zip(fig.axes[0].texts[1:], grounds.values(), strict=True):
        bright, dark = sorted((luminance(ground), luminance(to_rgba(piece.get_color()))), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_several_passages_follow_each_other_and_what_acts_is_shown_as_a_sign():
    words, _ = drawn(figure(Passage("a", ["x"], [0.5]), Passage("$b_1$", ["\t", "\x1b", "🦙", ""], [0.5] * 4)))
    assert words == [(1, 0, "a"), (2, 0, "x"), (4, 0, "$b_1$"), (5, 0, "⇥"), (5, 1, "□"), (5, 2, "□")]


def test_the_same_text_gives_the_same_file():
    passage = Passage("t", ["some", " text\n"], [0.2, 0.9])
    assert png(figure(passage)) == png(figure(passage))


@pytest.mark.parametrize(
    ("passages", "low", "high"),
    [
        ([], 0.0, 1.0),
        ([Passage("t", ["a"], [0.1, 0.2])], 0.0, 1.0),
        ([Passage("t", ["a"], [0.1])], 1.0, 1.0),
        ([Passage("t", ["a"], [0.1])], float("nan"), 1.0),
    ],
)
def test_refuses_what_cannot_be_drawn(passages, low, high):
    with pytest.raises(HatError, match="expected"):
        figure(*passages, low=low, high=high)
