"""No text is interpreted by a terminal or a spreadsheet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_lib.text.plain import cell, from_cell, printable


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
    assert printable(text) == shown and from_cell(cell(text)) == text
    assert cell(text) == shown.replace(r"\r\n\t", r"\x0d\x0a\x09")
    assert shown.isprintable() and shown.encode()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "'=1", "＝1"])
def test_no_cell_is_a_formula(text):
    assert cell(text) == "'" + text and from_cell(cell(text)) == text
    assert cell(f"a{text}") == f"a{text}"


@given(st.text(st.sampled_from("\\xuU019afn \n\t'=-é\u202e\U000e0001") | st.characters()))
def test_a_cell_is_read_as_it_was(text):
    assert cell(text).isprintable() and from_cell(cell(text)) == text
