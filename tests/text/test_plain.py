"""No text acts on a terminal or in a spreadsheet."""

import pytest

from hat_lib.text.plain import plain, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("as it was: é 日本 🦙 \\", "as it was: é 日本 🦙 \\"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\r\n\tb\x7f\x9b", r"a\r\n\tb\x7f\x9b"),
        ("right\u202eleft\u2028\ud800", r"right\u202eleft\u2028\ud800"),
    ],
)
def test_what_acts_is_written_out(text, shown):
    assert printable(text) == plain(text) == plain(plain(text)) == shown
    assert shown.isprintable() and shown.encode()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r@x", "＝1"])
def test_no_cell_is_a_formula(text):
    assert plain(text) == "'" + printable(text) == plain(plain(text))
    assert plain(f"a{text}") == printable(f"a{text}")
