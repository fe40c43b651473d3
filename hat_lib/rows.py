"""Rows of results in a CSV file, appended one at a time, so that a stopped run goes on where it was.

The columns are the fields of a dataclass: `str`, `bool`, `int` or `float`, or one of these `` | None``. A row is on
disk before `write` returns; a run killed in the middle of one leaves half a line, which the next `RowWriter` drops.
A file edited by hand may end in a whole row without its end. As that may be half a number ("0.12" of "0.123"), it is
dropped, too, but with a warning that has the line.
"""

import csv
import math
import os
import typing
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from types import NoneType

import pandas as pd

from hat_lib import config
from hat_lib.config import HatError, lock
from hat_lib.text.plain import cell, from_cell, printable


class RowWriter(AbstractContextManager):
    """Appends rows of one dataclass to a CSV file, made with its folders and a header if it does not exist.

    ``done`` has the rows in the file, by the fields that ``key`` names. Raises `HatError` for a file of something else,
    one that another run is writing, and one that cannot be written.
    """

    def __init__(self, path: str | Path, row_type: type, key: Sequence[str]):
        self.path, self.key = Path(path), tuple(key)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8", newline="")
        except OSError as error:
            raise HatError(f"cannot write {path}: {error.strerror or error}") from error
        lock(self._file, f"{path} is being written by another run")
        self._file.seek(0)
        self._hints, data = typing.get_type_hints(row_type), self._file.buffer.read()
        self._columns, rows, end = _parse(self.path, row_type, data)
        self.done = {self._key(row): row for row in rows}
        self._file.truncate(end)
        if not end:
            self._append(self._columns)

    def write(self, row) -> None:
        """Append one row."""
        self._append([_cell(getattr(row, name), self._hints[name]) for name in self._columns])
        self.done[self._key(row)] = row

    def __exit__(self, *_) -> None:
        self._file.close()

    def _append(self, cells) -> None:
        try:
            csv.writer(self._file, lineterminator="\n").writerow(cells)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise HatError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _key(self, row) -> tuple:
        return tuple(getattr(row, name) for name in self.key)


def read_rows(path: str | Path, row_type: type) -> list:
    """The rows of a file as ``row_type``, with types restored; also while it is being written, but on Windows. Raises
    `HatError` if there is no such file, or its columns or values are not the row's."""
    return _parse(Path(path), row_type)[1]


def _parse(path: Path, row_type: type, data: bytes | None = None) -> tuple[list[str], list, int]:
    """Columns in the order of the file, rows, and the length of the complete lines in bytes."""
    hints, names, rows = typing.get_type_hints(row_type), [field.name for field in fields(row_type)], []
    try:
        data = path.read_bytes() if data is None else data
        end = data.rfind(b"\n") + 1
        if not end and ",".join(names).encode().startswith(data):  # empty, or killed while writing its first line
            return names, [], 0
        columns, *lines = csv.reader(data[:end].decode().splitlines() or [""], strict=True)
        if sorted(columns) != sorted(names):
            raise ValueError(f"expected columns {', '.join(names)}, got {', '.join(columns)}")
        for cells in lines:
            values = {name: _value(text, hints[name]) for name, text in zip(columns, cells, strict=True)}
            rows.append(row_type(**values))
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise HatError(f"cannot read {path}, row {len(rows) + 1}: {error}") from error
    if end < len(data):
        _warn_if_whole(path, row_type, data, end, rows)
    return columns, rows, end


def _warn_if_whole(path: Path, row_type: type, data: bytes, end: int, rows: list) -> None:
    try:
        lost = _parse(path, row_type, data + b"\n")[1][-1]
    except HatError:  # half a row
        return
    if lost not in rows:
        line = printable(data[end:].decode())
        why = "it has no line end, and may be cut off; if it is whole, add it again, with one"
        warnings.warn(f"{path}: the last line is dropped, {line}: {why}", stacklevel=4)


def _cell(value, hint):
    """A value as it is written. An empty cell is None, so where that may be, an empty text is an apostrophe."""
    if not isinstance(value, str):
        return value
    text = cell(value)
    return "'" + text if NoneType in typing.get_args(hint) and not text.strip("'") else text


def _value(text: str, hint):
    kinds = typing.get_args(hint) or (hint,)
    if not text and NoneType in kinds:
        return None
    if bool in kinds:
        return {"True": True, "False": False}[text]
    if str in kinds:
        return text[1:] if NoneType in kinds and not text.strip("'") else from_cell(text)
    return kinds[0](text)


def rounded(row_type: type, exact: Sequence[str] = (), /, **values):
    """A row with its floats rounded to five significant digits, nan as None; values without a column are dropped. Those
    named in ``exact`` stay as they are: rounded, a key is not the one that is asked for again."""
    row = {field.name: values[field.name] for field in fields(row_type) if field.name in values}
    for name, value in row.items():
        if isinstance(value, float) and name not in exact:
            row[name] = None if math.isnan(value) else float(f"{value:.5g}")
    return row_type(**row)


def results_table(name: str, results: Path | None = None) -> pd.DataFrame:
    """The rows of a file of results; ``results`` is its folder, by default ``data/results``."""
    path = (results or config.DATA / "results") / f"{name}.csv"
    if not path.is_file():
        raise HatError(f"no {path}: make it with `python -m studies {name}`")
    return pd.read_csv(path)
