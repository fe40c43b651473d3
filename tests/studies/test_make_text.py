"""Markup becomes paragraphs of prose, and nothing else."""

import io

import pytest

from studies.make_text import article_prose, articles, docstring_prose, module_prose

SENTENCE = "This is a sentence of more than eight plain words."


def test_modules_are_parsed_and_never_run():
    source = '"""This module must never be run, only read by the parser."""\nraise SystemExit("run")\n'
    source += 'def f():\n    r"""Every function of the module is read as well, of course."""\n    "\\d"\n'
    assert list(module_prose(source)) == [
        "This module must never be run, only read by the parser.",
        "Every function of the module is read as well, of course.",
    ]


@pytest.mark.parametrize(
    "docstring, prose",
    [
        ("Return the `frob` of **every** node of\nthe graph, as :class:`~lib.core.Frob` objects; see [1]_ and $n$.",
         ["Return the frob of every node of the graph, as Frob objects; see [1] and n."]),
        ("    This is an indented block of words that would otherwise look like prose.", []),
        (".. note:: This is a directive with enough plain words in it to be prose.", []),
        ("The bound is :math:`\\sum_i x_i` for all of the nodes that are in the graph.", []),
        ("Parameters\n----------\nG : graph\n    The graph whose nodes are taken, given as any of the classes.", []),
        ("Notes\n-----\n" + SENTENCE, [SENTENCE]),
    ],
)  # fmt: skip
def test_docstring_prose(docstring, prose):
    assert list(docstring_prose(docstring)) == prose


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("This is '''bold''' and a [[link]] to [[Some page|some other page]] of them.",
         ["This is bold and a link to some other page of them."]),
        ("{{Infobox\n| name = {{nested|x}}\n}}\n" + SENTENCE, [SENTENCE]),
        ("This is a claim<ref name=a>{{cite|Someone}}</ref> with notes<ref name=b/> in the middle of it.",
         ["This is a claim with notes in the middle of it."]),
        ("[[File:a.jpg|thumb|A [[caption]] of some words that is not prose.]]\n" + SENTENCE, [SENTENCE]),
        ("{| class=table\n|-\n| a cell of a table that has quite a few words in it.\n|}\n" + SENTENCE, [SENTENCE]),
        (SENTENCE + "\n== References ==\nThis is a reference of more than eight plain words.", [SENTENCE]),
        ("A line left with an open {{template of many words in it is dropped.", []),
        ("#REDIRECT [[Elsewhere]]", []),
    ],
)  # fmt: skip
def test_article_prose(markup, expected):
    assert list(article_prose(markup)) == expected


def test_articles_of_a_dump():
    page = "<page><title>{}</title><revision><text>{}</text></revision></page>"
    pages = [("One", SENTENCE), ("Two", "#REDIRECT [[One]]"), ("Three", f"{SENTENCE}\n\n{SENTENCE}"), ("Four", "")]
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/">{"".join(page.format(*p) for p in pages)}</mediawiki>'
    assert list(articles(io.BytesIO(dump.encode()))) == [("One", SENTENCE), ("Three", f"{SENTENCE}\n\n{SENTENCE}")]
