"""Text from outside, made harmless for terminals and spreadsheets: a text, file name or token may hold escape
sequences, marks that reverse the order of letters, or a beginning that a spreadsheet evaluates as a formula
(https://owasp.org/www-community/attacks/CSV_Injection)."""

import re

from hat_lib.config import HatError

ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
# What spreadsheets take for the beginning of a formula; an apostrophe before one needs another, or it would be dropped.
FORMULA = re.compile("[' ]*[=+@＝＋－＠-]")


def printable(text: str) -> str:
    r"""``text`` on one line, with every invisible or control character escaped as in Python: ``\x1b[31m\n``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_whole(what: str, text: str) -> None:
    """Raise `HatError` for half a character (a lone surrogate), which UTF-8, and so a tokenizer, cannot take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = printable(text[error.start])
        raise HatError(f"{what} has half a character, {half}, at {error.start}: expected whole ones") from error


def cell(text: str) -> str:
    """``text`` for a cell of a table, on one line: `printable`, and with an apostrophe before what would be a formula,
    such as ``'=1+1``."""
    text = ESCAPE.sub(r"\\x5c\1", text)
    text = "".join(f"\\x{ord(c):02x}" if c in "\t\n\r" else printable(c) for c in text)
    return "'" + text if FORMULA.match(text) else text


def from_cell(text: str) -> str:
    """What `cell` was given."""
    text = text[1:] if text.startswith("'") and FORMULA.match(text) else text
    return ESCAPE.sub(lambda match: chr(int(match[1][1:], 16)), text)
