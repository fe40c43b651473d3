"""Rows survive a kill at any byte, read back as they were, and are never mixed with another table's."""

import warnings
from dataclasses import dataclass

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hat_lib.config import HatError
from hat_lib.rows import RowWriter, read_rows, rounded


@dataclass(frozen=True)
class Row:
    text: str
    seed: int
    capacity: float
    learned: bool
    note: str | None = None
    low: float | None = None


KEY = ("text", "seed")


def row(number, **changes):
    return Row(**{"text": "addresses", "seed": number, "capacity": 0.75, "learned": False, **changes})


def written(path, rows):
    with RowWriter(path, Row, KEY) as writer:
        for r in rows:
            writer.write(r)
    return path.read_bytes()


HEADER = b"text,seed,capacity,learned,note,low\n"


def test_the_file_is_plain_csv(tmp_path):
    data = written(tmp_path / "made" / "rows.csv", [row(1, low=0.1), row(-1, text="=1+1", capacity=-0.5)])
    assert data == HEADER + b"addresses,1,0.75,False,,0.1\n'=1+1,-1,-0.5,False,,\n"


optional = st.none() | st.text() | st.text("'")
any_rows = st.builds(Row, st.text(), st.integers(), st.floats(), st.booleans(), optional, st.none() | st.floats())


@settings(max_examples=25, deadline=None)
@given(st.lists(any_rows, max_size=4, unique_by=lambda r: (r.text, r.seed)))
def test_rows_come_back_as_they_were(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    written(path, rows)
    assert len(pd.read_csv(path)) == len(rows)
    assert repr(read_rows(path, Row)) == repr(rows)  # repr tells 1 from 1.0 and True, and lets nan equal itself
    with RowWriter(path, Row, KEY) as writer:
        assert repr(writer.done) == repr({(r.text, r.seed): r for r in rows})


@pytest.mark.parametrize("data", [b"some notes", b"\n", b"text\n", b"\xff\xfe\n", HEADER + b"a,x,0.5,True,,\n",
                                  HEADER + b"a,1,0.5,yes,,\n", HEADER + b"a,1,0.5\n"])  # fmt: skip
def test_a_file_of_something_else_stays_as_it_is(tmp_path, data):
    path = tmp_path / "notes.txt"
    path.write_bytes(data)
    with pytest.raises(HatError, match="notes.txt"):
        RowWriter(path, Row, KEY)
    with pytest.raises(HatError, match="notes.txt"):
        read_rows(path, Row)
    assert path.read_bytes() == data
    with pytest.raises(HatError):
        RowWriter(tmp_path, Row, KEY)
    with pytest.raises(HatError):
        read_rows(tmp_path / "none.csv", Row)


@pytest.mark.parametrize("left, whole", [(b"b,2,0.5,True,,", True), (b"b,2,0.5,Tr", False), (b"b,2,0.5,True,", False),
                                         (b"addresses,1,0.75,False,,", False)])  # fmt: skip
def test_a_last_line_that_may_be_whole_is_not_dropped_in_silence(tmp_path, left, whole):
    """By hand, or by a spreadsheet; half a line, as a kill leaves it, and another copy of a row say nothing."""
    path = tmp_path / "rows.csv"
    complete = written(path, [row(1)])
    path.write_bytes(complete + left)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_rows(path, Row) == [row(1)]
        written(path, [])
    assert [left.decode() in str(w.message) and str(path) in str(w.message) for w in caught] == [True] * 2 * whole
    assert path.read_bytes() == complete


def test_what_tells_rows_apart_is_not_rounded():
    made = rounded(Row, KEY, text="a", seed=1.23456789, capacity=1.23456789, learned=True, low=float("nan"))
    assert (made.seed, made.capacity, made.low) == (1.23456789, 1.2346, None)


def test_a_second_writer_is_refused_and_a_row_is_on_disk_before_write_returns(tmp_path):
    path = tmp_path / "rows.csv"
    with RowWriter(path, Row, KEY) as writer:
        writer.write(row(1))
        with pytest.raises(HatError):
            RowWriter(path, Row, KEY)
        assert read_rows(path, Row) == [row(1)]  # reading needs no lock
        writer.write(row(2))
    assert len(written(path, [row(3)]).splitlines()) == 4
