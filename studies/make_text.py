"""The texts in `data/text`, made once from pinned wheels: prose of docstrings and of encyclopedia articles.

    python -m studies.make_text

Each becomes lines of JSON, ``{"doc": id, "text": ...}``, compressed with xz, for `hat_lib.text.corpora`.
"""

import ast
import bz2
import hashlib
import html
import json
import lzma
import re
import warnings
from collections.abc import Iterator
from typing import IO
from xml.etree import ElementTree

from hat_lib.base.wheels import GENSIM, WheelSpec, open_wheel
from hat_lib.text.corpora import FOLDER, Document

NETWORKX = WheelSpec("networkx", "3.6.1", "networkx-3.6.1-py3-none-any.whl",
                     "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762", 2_068_504)  # fmt: skip
WIKIPEDIA = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
LICENSES = {NETWORKX: "networkx-3.6.1.dist-info/licenses/LICENSE.txt",
            GENSIM: "gensim-4.4.0.dist-info/licenses/COPYING"}  # fmt: skip

# numpydoc sections without prose
NOT_PROSE = re.compile(
    r"((other )?parameters|keyword arguments|returns|yields|receives|raises|warns|attributes|methods"
    r"|examples?|see also|references|implementation):?",
    re.IGNORECASE,
)
UNDERLINE = re.compile(r"([=\-~^\"#*])\1{2,}")
MARKED = re.compile(r"\.\. |[-*+•|>:#=\[]|\(?\w{1,3}[.)] ")  # directive, list item, table, field, citation
NOT_A_SENTENCE = re.compile(r"\\|::|://|[=<>{}_^|]")  # LaTeX, code, addresses, formulas, identifiers
WORD = re.compile(r"[(\"']*[A-Za-z][A-Za-z'’–-]*[.,;:!?)\"']*")

# MediaWiki
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


def main() -> None:
    with open_wheel(GENSIM) as wheel, bz2.open(wheel.open(WIKIPEDIA)) as file:
        encyclopedia = list(articles(file))
    texts = {"docstrings": docstrings(NETWORKX), "reserve": docstrings(GENSIM), "encyclopedia": encyclopedia}
    FOLDER.mkdir(exist_ok=True)
    for name, found in texts.items():
        # By hash, so that any leading part of a corpus is a mixture of subjects.
        found = sorted(found, key=lambda document: hashlib.sha256(document[0].encode()).digest())
        lines = [json.dumps({"doc": doc, "text": text}, ensure_ascii=False) + "\n" for doc, text in found]
        packed = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
        (FOLDER / f"{name}.jsonl.xz").write_bytes(packed)
    for spec, file in LICENSES.items():
        with open_wheel(spec) as wheel:
            (FOLDER / f"LICENSE.{spec.name}").write_bytes(wheel.read(file))


def docstrings(spec: WheelSpec) -> Iterator[Document]:
    """The prose of a library's docstrings, one document per module; each paragraph once."""
    seen: set[str] = set()
    with open_wheel(spec) as wheel:
        modules = [n for n in wheel.namelist() if n.endswith(".py") and not {"test", "tests"} & set(n.split("/"))]
        for name in sorted(modules):
            fresh = [p for p in dict.fromkeys(module_prose(wheel.read(name).decode())) if p not in seen]
            seen.update(fresh)
            if fresh:
                yield name.removesuffix(".py").replace("/", "."), "\n\n".join(fresh)


def module_prose(source: str) -> Iterator[str]:
    """Paragraphs of English prose in the docstrings of Python source, which is parsed and never run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstring_prose(ast.get_docstring(node) or "")


def docstring_prose(docstring: str) -> Iterator[str]:
    """Paragraphs of whole sentences in one dedented docstring, of at least eight mostly plain words, one line each."""
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
    """Inline markup of reStructuredText to plain text on one line."""
    text = re.sub(r":[\w:]+:`~?!?(?:[\w.]+\.)?([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1", block)  # roles
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)  # links
    text = re.sub(r"(\[\w+\])_", r"\1", text)  # citations
    text = re.sub(r"\$([^$]*)\$", r"\1", text)  # inline maths
    text = re.sub(r"\*\*?([^*\s][^*]*)\*\*?", r"\1", text.replace("`_", "").replace("`", ""))
    return " ".join(text.split())


def articles(file: IO[bytes]) -> Iterator[Document]:
    """``(title, prose)`` of each article with prose in a page dump."""
    title = ""
    for _, element in ElementTree.iterparse(file):
        tag = element.tag.rpartition("}")[2]
        if tag == "title":
            title = element.text or ""
        elif tag == "text":
            text = "\n\n".join(article_prose(element.text or ""))
            if text:
                yield title, text
        elif tag == "page":
            element.clear()


def article_prose(markup: str) -> Iterator[str]:
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


if __name__ == "__main__":
    main()
