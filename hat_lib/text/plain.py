"""Text from outside, made harmless for a terminal and for a spreadsheet.

A text, a file's name or a token may hold escape sequences that move the cursor or set the title of a terminal, marks
that reverse the order of letters, or a beginning that a spreadsheet takes for a formula and computes
(https://owasp.org/www-community/attacks/CSV_Injection).
"""

from __future__ import annotations

FORMULA = tuple("=+-@＝＋－＠")
"""what spreadsheets take for the beginning of a formula"""


def printable(text: str) -> str:
    r"""``text`` on one line, with every character that shows nothing or acts written as Python writes it.

    >>> print(printable("red \x1b[31m\n"))
    red \x1b[31m\n
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(text: str) -> str:
    """``text`` for a cell of a table: `printable`, and with an apostrophe before what would be a formula.

    >>> plain("=1+1"), plain("a = b")
    ("'=1+1", 'a = b')
    """
    return ("'" if text.lstrip().startswith(FORMULA) else "") + printable(text)
