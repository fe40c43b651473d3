"""Rows of results, written one at a time, so that a stopped run resumes where it was.

A CSV file whose columns are the fields of a dataclass; some of them, the key, identify what was measured:

    with RowWriter(path, SweepRow, key=("text", "capacity", "seed")) as rows:
        for point in grid:
            if point not in rows.done:
                rows.write(measure(*point))

A row is completely on disk before `write` returns. A run killed during a write leaves a truncated line: the next
`RowWriter` drops it, and `read_rows` skips it. Nothing else in the file is ever changed. Text may come from anywhere,
and the file may be opened in spreadsheets and terminals, so text is written through `hat_lib.text.plain.cell`.

One writer per file: it holds a lock until it is closed, which the system releases if the process dies (`flock`, so not
on Windows), and a second one is refused. Workers of a pool hand their rows to the process that writes.
"""

from __future__ import annotations

import csv
import io
import os
import typing
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from reprlib import repr as short
from types import NoneType

import pandas as pd

from hat_lib import config
from hat_lib.config import HatError, lock
from hat_lib.text.plain import cell, from_cell


class RowWriter:
    """Appends rows of one dataclass to a CSV file; a context manager.

    Args:
        path: created, with its folders and a header line, if it does not exist.
        row_type: a dataclass whose fields are `str`, `bool`, `int` or `float`, or one of these `` | None``. Floats are
            written in full: round them first.
        key: the fields that tell rows apart.
        replace: write to ``path`` + ".new", where a stopped run resumes, and replace ``path`` with it when the
            ``with`` block ends without an error.

    Raises `HatError` for columns other than the row's, a line that does not read back, a duplicate key, a file that is
    being written by another run, and one that cannot be written; the file stays as it was.
    """

    def __init__(self, path: str | Path, row_type: type, key: Sequence[str], *, replace: bool = False):
        self._replaces = Path(path) if replace else None
        self.path, self.row_type, self.key = Path(f"{path}.new" if replace else path), row_type, tuple(key)
        self.done: dict[tuple, typing.Any] = {}
        """the rows in the file by key, a tuple in the order of ``key``"""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise HatError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        lock(self._file, f"{self.path} is being written by another run")
        self._file.seek(0)
        data = self._file.read()
        self._columns, rows, self._end = _read(self.path, data, self.row_type)
        for number, row in enumerate(rows, start=1):
            key = self._key(row)
            if key in self.done:
                raise HatError(f"{self.path}, row {number}: {self._named(key)} stands there twice")
            self.done[key] = row
        if cut := len(data) - self._end:
            warnings.warn(f"{self.path}: dropped {cut} bytes of a line that was not written to its end", stacklevel=3)
            self._file.truncate(self._end)
        if not self._end:
            self._append(_line(self._columns))

    def write(self, row) -> None:
        """Append one row. Raises `HatError` for a key that is already done, or a value that would not read back."""
        cells = [_cell(name, getattr(row, name), kind) for name, kind in self._columns.items()]
        key = self._key(row)
        if key in self.done:
            raise HatError(f"{self.path}: {self._named(key)} is done already")
        self._append(_line(cells))
        self.done[key] = row

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, failure, *_) -> None:
        self._file.close()
        if self._replaces and failure is None:
            self.path.replace(self._replaces)

    def _append(self, line: bytes) -> None:
        try:
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except BaseException as error:
            self._file.truncate(self._end)  # so that neither a full disk nor Ctrl-C leaves half a line
            if isinstance(error, OSError):
                raise HatError(f"cannot write {self.path}: {error.strerror or error}") from error
            raise
        self._end += len(line)

    def _key(self, row) -> tuple:
        return tuple(getattr(row, name) for name in self.key)

    def _named(self, key: tuple) -> str:
        return ", ".join(f"{name} {value!r}" for name, value in zip(self.key, key, strict=True))


def read_rows(path: str | Path, row_type: type) -> list:
    """The rows of a file as ``row_type``, in file order, with types restored; works while it is being written, too.

    Raises `HatError` if there is no such file, its columns are not the row's fields, or a cell has the wrong type.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise HatError(f"cannot read {path}: {error.strerror or error}") from error
    return _read(path, data, row_type)[1]


def _read(path, data: bytes, row_type: type) -> tuple[dict, list, int]:
    """Kinds of the columns in file order, the rows, and the length in bytes of the complete lines."""
    kinds, end = _kinds(row_type), data.rfind(b"\n") + 1
    if not end and _line(kinds).startswith(data):  # empty, or killed while writing its first line
        return kinds, [], 0
    try:
        columns, *lines = csv.reader(io.StringIO(data[:end].decode() or "\n", newline="\n"), strict=True)
    except (UnicodeDecodeError, csv.Error) as error:
        raise HatError(f"{path} is not CSV: {error}") from error
    if sorted(columns) != sorted(kinds):
        missing, unknown = ([n for n in a if n not in b] for a, b in ((kinds, columns), (columns, kinds)))
        raise HatError(
            f"{path} has other columns than {row_type.__name__}: missing {short(missing)}, unknown {short(unknown)}"
        )
    rows = []
    for number, cells in enumerate(lines, start=1):
        if len(cells) != len(columns):
            raise HatError(f"{path}, row {number}: expected {len(columns)} values, got {len(cells)}")
        values = {name: _value(f"{path}, row {number}: {name}", text, *kinds[name])
                  for name, text in zip(columns, cells, strict=True)}  # fmt: skip
        rows.append(row_type(**values))
    return {name: kinds[name] for name in columns}, rows, end


def _kinds(row_type: type) -> dict[str, tuple[type, bool]]:
    """Field -> (type, whether it may be None)."""
    hints = typing.get_type_hints(row_type)
    parts = {field.name: typing.get_args(hints[field.name]) or (hints[field.name],) for field in fields(row_type)}
    return {name: (next(t for t in found if t is not NoneType), NoneType in found) for name, found in parts.items()}


def _cell(name: str, value, kind: tuple[type, bool]) -> str:
    text = "" if value is None else cell(value) if isinstance(value, str) else str(value)
    if len(text) > csv.field_size_limit():
        raise HatError(f"{name} holds {len(text)} characters, at most {csv.field_size_limit()} read back")
    back = _value(name, text, *kind, got=repr(value))
    if back != value and value == value:  # nan differs from itself
        raise HatError(f"{name} would read back as {back!r}, got {value!r}")
    return text


def _value(name: str, text: str, wanted: type, optional: bool, got: str | None = None):
    if optional and not text:
        return None
    try:
        if wanted is bool:
            return {"True": True, "False": False}[text]
        return from_cell(text) if wanted is str else wanted(text)
    except (ValueError, KeyError):
        kind = wanted.__name__ + " or None (an empty cell)" * optional
        raise HatError(f"{name} must be {kind}, got {got or short(text)}") from None


def _line(cells) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def rounded(row_type: type, **values):
    """A row with its floats rounded to five significant digits; values without a column in ``row_type`` are dropped."""
    names = [f.name for f in fields(row_type) if f.name in values]
    return row_type(**{n: float(f"{values[n]:.5g}") if isinstance(values[n], float) else values[n] for n in names})


def results_table(name: str, results: Path | None = None) -> pd.DataFrame:
    """The rows of a file of results; ``results`` is its folder, by default ``data/results``."""
    path = (results or config.DATA / "results") / f"{name}.csv"
    if not path.is_file():
        raise HatError(f"no {path}: make it with `python -m studies {name}`")
    return pd.read_csv(path)
