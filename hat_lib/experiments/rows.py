"""Rows of results, written one at a time, so that a run that is stopped goes on where it was.

A CSV file whose columns are the fields of a dataclass; some of them, the key, say what was measured:

    with RowWriter(path, SweepRow, key=("text", "capacity", "seed")) as rows:
        for point in grid:
            if point not in rows.done:
                rows.write(measure(*point))

A row is on disk, whole, before `write` returns. A run killed inside a write leaves a line without its end: the next
`RowWriter` drops it, and `read_rows` passes over it. Nothing else that is in the file is ever changed. With
``replace=True`` rows go to a file beside it, which takes its place once all are there.

Text comes from anywhere, and the file is opened in spreadsheets and terminals: a cell that a spreadsheet would compute
gets an apostrophe in front, and control characters are spelt out (`safe_text`). `read_rows` undoes both.

One writer a file: it holds a lock until it is closed, which the system releases if the process dies (`flock`, so not
on Windows), and a second one is refused. Workers of a pool hand their rows to the process that writes.
"""

from __future__ import annotations

import csv
import fcntl
import os
import re
import types
import typing
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from hat_lib.config import HatError

KINDS = (str, bool, int, float)
# Quotes and ends of lines are CSV's own business; \r is not, for a terminal goes back to the line's start.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]|\\(?=x[0-9a-f]{2})")
FORMULA = re.compile("'*[=+@-]")


def safe_text(text: str) -> str:
    """``text`` as a cell that no spreadsheet computes and no terminal obeys.

    >>> print(safe_text("=1+1"), safe_text("\x1b[2J"), safe_text("a - b"))
    '=1+1 \\x1b[2J a - b
    """
    text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return "'" + text if FORMULA.match(text) else text


def _as_it_was(text: str) -> str:
    text = text[1:] if text.startswith("'") and FORMULA.match(text) else text
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text)


class RowWriter:
    """Appends rows of one dataclass to a CSV file; a context manager.

    Args:
        path: created, with its folders and a header line, if it is not there.
        row_type: a dataclass whose fields are `str`, `bool`, `int` or `float`, or one of these `` | None``. Floats are
            written in full: round them before.
        key: the fields that tell rows apart.
        replace: write to ``path`` + ".new", where a stopped run goes on, and put it in the place of ``path`` when the
            ``with`` block ends without an error.

    Raises `HatError` for other columns than the row's, a line that does not read back, a key that stands
    there twice, a file that is being written, and one that cannot be; the file stays as it was.
    """

    def __init__(self, path: str | Path, row_type: type, key: Sequence[str], *, replace: bool = False):
        self._replaces = Path(path) if replace else None
        self.path, self.row_type = Path(f"{path}.new" if replace else path), row_type
        self._kinds = _kinds(row_type)
        unknown = [k for k in key if k not in self._kinds]
        if unknown or not key or isinstance(key, str):
            raise HatError(f"key must name fields of {row_type.__name__} ({', '.join(self._kinds)}), got {key!r}")
        self.key = tuple(key)
        self.done: dict[tuple, typing.Any] = {}
        """the rows in the file by their keys, each a tuple in the order of ``key``"""
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
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HatError(f"{self.path} is being written by another run") from error
        except OSError as error:
            raise HatError(f"cannot lock {self.path}: {error.strerror or error}") from error
        self._file.seek(0)
        data = self._file.read()
        rows, whole = _read(self.path, data, self.row_type, self._kinds)
        for number, row in enumerate(rows, start=1):
            key = self._key(row)
            if key in self.done:
                raise HatError(f"{self.path}, row {number}: {self._named(key)} stands there twice")
            self.done[key] = row
        self._end = whole
        if whole < len(data):
            cut = len(data) - whole
            warnings.warn(f"{self.path}: dropped {cut} bytes of a line that was not written to its end", stacklevel=3)
            self._file.truncate(whole)
        if not whole:
            self._append(_line(self._kinds))

    def write(self, row) -> None:
        """Append one row. Raises `HatError` for a key that is done, and for a value that would not read back."""
        if type(row) is not self.row_type:
            raise HatError(f"{self.path} takes rows of {self.row_type.__name__}, got {type(row).__name__}")
        cells = {name: _cell(name, getattr(row, name), kind) for name, kind in self._kinds.items()}
        key = self._key(row)
        if key in self.done:
            raise HatError(f"{self.path}: {self._named(key)} is done already")
        if any(value != value for value in key):
            raise HatError(f"{self.path}: a key cannot hold nan, got {self._named(key)}")
        self._append(_line(cells.values()))
        self.done[key] = row

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, failure, *_) -> None:
        self.close()
        if self._replaces and failure is None:
            self.path.replace(self._replaces)

    def _append(self, line: bytes) -> None:
        try:
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except BaseException as error:
            self._file.truncate(self._end)  # neither a full disk nor Ctrl-C leaves half a line before the next one
            if isinstance(error, OSError):
                raise HatError(f"cannot write {self.path}: {error.strerror or error}") from error
            raise
        self._end += len(line)

    def _key(self, row) -> tuple:
        return tuple(getattr(row, name) for name in self.key)

    def _named(self, key: tuple) -> str:
        return ", ".join(f"{name} {value!r}" for name, value in zip(self.key, key, strict=True))


def read_rows(path: str | Path, row_type: type) -> list:
    """The rows of a file as ``row_type``, in its order, types restored; also while it is being written.

    Raises `HatError` if there is no such file, its columns are not the row's fields, or a cell is of another type.
    """
    kinds = _kinds(row_type)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise HatError(f"cannot read {path}: {error.strerror or error}") from error
    return _read(path, data, row_type, kinds)[0]


def _read(path, data: bytes, row_type: type, kinds: dict) -> tuple[list, int]:
    """The rows, and the length in bytes of the lines that were written to their end."""
    header = _line(kinds)
    if header.startswith(data):  # nothing yet, or killed inside its first line
        return [], len(data) if data == header else 0
    try:
        records, whole = _records(data)
    except (UnicodeDecodeError, csv.Error) as error:
        raise HatError(f"{path} is not CSV: {error}") from error
    columns = records[0] if records else []
    if columns != list(kinds):
        missing, unknown = ([n for n in a if n not in b] for a, b in ((kinds, columns), (columns, kinds)))
        odd = f"missing {missing}, unknown {unknown}" if missing or unknown else f"in the order {columns}"
        raise HatError(f"{path} has other columns than {row_type.__name__}: {odd}")
    return [_row(f"{path}, row {n}", cells, row_type, kinds) for n, cells in enumerate(records[1:], 1)], whole


def _records(data: bytes) -> tuple[list[list[str]], int]:
    """The cells of each line that has its end, and where the last of them ends. Quoted line breaks end no line."""
    lines = [line + b"\n" for line in data.split(b"\n")[:-1]]
    records, n_lines, exhausted = [], 0, False

    def feed():
        nonlocal exhausted
        for line in lines:
            yield line.decode()
        exhausted = True

    reader = csv.reader(feed(), strict=True)
    try:
        for cells in reader:
            records.append(cells)
            n_lines = reader.line_num
    except csv.Error:
        if not exhausted:  # else the data ended inside quotes
            raise
    return records, sum(map(len, lines[:n_lines]))


def _row(where: str, cells: list[str], row_type: type, kinds: dict):
    if len(cells) != len(kinds):
        raise HatError(f"{where}: expected {len(kinds)} values, got {len(cells)}")
    values = {}
    for (name, kind), text in zip(kinds.items(), cells, strict=True):
        try:
            values[name] = _value(text, kind)
        except (ValueError, KeyError) as error:
            raise HatError(f"{where}: {name} must be {_said(kind)}, got {text!r}") from error
    return row_type(**values)


def _kinds(row_type: type) -> dict[str, tuple[type, bool]]:
    """Field -> (type, may it be None)."""
    hints = typing.get_type_hints(row_type)
    kinds = {}
    for field in fields(row_type):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        parts = typing.get_args(hint) if union else (hint,)
        found = [part for part in parts if part is not types.NoneType]
        if len(found) != 1 or found[0] not in KINDS:
            raise HatError(f"{row_type.__name__}.{field.name} must be a str, bool, int or float, got {hint}")
        kinds[field.name] = (found[0], len(found) < len(parts))
    return kinds


def _cell(name: str, value, kind: tuple[type, bool]) -> str:
    """The text of a value, from which `_value` makes an equal one."""
    wanted, optional = kind
    if value is None and optional:
        return ""
    fits = isinstance(value, int | float if wanted is float else wanted) and isinstance(value, bool) == (wanted is bool)
    if not fits or (optional and value == ""):  # there, an empty cell is None
        raise HatError(f"{name} must be {_said(kind)}, got {value!r}")
    text = safe_text(value) if wanted is str else repr(float(value)) if wanted is float else str(value)
    if len(text) > csv.field_size_limit():
        raise HatError(f"{name} holds {len(text)} characters, at most {csv.field_size_limit()} read back")
    return text


def _value(text: str, kind: tuple[type, bool]):
    wanted, optional = kind
    if optional and not text:
        return None
    if wanted is str:
        return _as_it_was(text)
    return {"True": True, "False": False}[text] if wanted is bool else wanted(text)


def _said(kind: tuple[type, bool]) -> str:
    return kind[0].__name__ + " or None (an empty cell)" * kind[1]


def _line(cells: Iterable[str]) -> bytes:
    quoted = ('"' + cell.replace('"', '""') + '"' if set(cell) & set(',"\n') else cell for cell in cells)
    try:
        return ((",".join(quoted) or '""') + "\n").encode()
    except UnicodeEncodeError as error:
        raise HatError(f"{error.object[error.start : error.end]!r} is not text that UTF-8 can write") from error
