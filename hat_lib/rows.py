"""Rows of results in a CSV file, appended one at a time, so that a stopped run goes on where it was.

The columns are the fields of a dataclass: `str`, `bool`, `int` or `float`, or one of these `` | None``. A row is on
disk before `write` returns; a run killed in the middle of one leaves half a line, which the next `RowWriter` drops.
"""

import csv
import math
import os
import typing
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from types import NoneType

import pandas as pd

from hat_lib import config
from hat_lib.config import HatError, lock
from hat_lib.text.plain import cell, from_cell


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
        self._columns, rows, end = _parse(self.path, row_type, self._file.buffer.read())
        self.done = {self._key(row): row for row in rows}
        self._file.truncate(end)
        if not end:
            self._append(self._columns)

    def write(self, row) -> None:
        """Append one row."""
        values = [getattr(row, name) for name in self._columns]
        self._append([cell(value) if isinstance(value, str) else value for value in values])
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
    return columns, rows, end


def _value(text: str, hint):
    kinds = typing.get_args(hint) or (hint,)
    if not text and NoneType in kinds:
        return None
    if bool in kinds:
        return {"True": True, "False": False}[text]
    return from_cell(text) if str in kinds else kinds[0](text)


def rounded(row_type: type, **values):
    """A row with its floats rounded to five significant digits, nan as None; values without a column are dropped."""
    row = {field.name: values[field.name] for field in fields(row_type) if field.name in values}
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = None if math.isnan(value) else float(f"{value:.5g}")
    return row_type(**row)


def results_table(name: str, results: Path | None = None) -> pd.DataFrame:
    """The rows of a file of results; ``results`` is its folder, by default ``data/results``."""
    path = (results or config.DATA / "results") / f"{name}.csv"
    if not path.is_file():
        raise HatError(f"no {path}: make it with `python -m studies {name}`")
    return pd.read_csv(path)
