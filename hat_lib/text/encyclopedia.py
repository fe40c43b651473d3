"""Prose of encyclopedia articles, from MediaWiki markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import IO
from xml.etree import ElementTree

INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)  # templates, tables
NOT_TEXT = re.compile(
    r"<!--.*?-->|<ref[^>]*/>|<ref[^>]*>.*?</ref>|<(math|code|gallery|source|timeline)[^>]*>.*?</\1>|</?[a-z][^>]*>",
    re.DOTALL | re.IGNORECASE,
)
MEDIA = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
OUTER_LINK = re.compile(r"\[(?:https?:)?//[^\s\]]*\s*([^\]]*)\]")
EMPTY = re.compile(r"\(\s*[;,]*\s*\)")
END = re.compile(r"^==\s*(See also|Notes|References|Further reading|External links|Bibliography|Sources)", re.M | re.I)


def articles(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """``(title, prose)`` of each article in a page dump, without redirects and pages that have no prose."""
    title = ""
    for _, element in ElementTree.iterparse(file):
        tag = element.tag.rpartition("}")[2]
        if tag == "title":
            title = element.text or ""
        elif tag == "text":
            text = "\n\n".join(prose(element.text or ""))
            if text:
                yield title, text
        elif tag == "page":
            element.clear()


def prose(markup: str) -> Iterator[str]:
    """Paragraphs of whole sentences, one line each, without notes, tables, lists, headings or formulas."""
    if markup[:9].upper() == "#REDIRECT":
        return
    if end := END.search(markup):
        markup = markup[: end.start()]
    text, found = NOT_TEXT.sub("", markup), 1
    while found:  # from the inside out
        text, found = INNERMOST.subn("", text)
    text = OUTER_LINK.sub(r"\1", LINK.sub(r"\1", MEDIA.sub("", text)))
    text = html.unescape(re.sub(r"'{2,}", "", text))
    for line in text.split("\n"):
        line = " ".join(EMPTY.sub("", line).split()).replace(" ,", ",").replace(" .", ".")
        sentences = len(line.split()) >= 8 and line[0].isupper() and line[-1] in '.!?"'
        if sentences and not re.search(r"[{}\[\]|<>\\]", line):
            yield line
