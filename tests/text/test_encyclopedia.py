"""MediaWiki markup becomes paragraphs of prose, and nothing else."""

import io

import pytest

from hat_lib.text.encyclopedia import articles, prose

SENTENCE = "This is a sentence of more than eight plain words."


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        (SENTENCE, [SENTENCE]),
        ("This is '''bold''' and a [[link]] to [[Some page|some other page]] of them.",
         ["This is bold and a link to some other page of them."]),
        ("{{Infobox\n| name = {{nested|x}}\n}}\n" + SENTENCE, [SENTENCE]),
        ("This is a claim<ref name=a>{{cite|Someone}}</ref> with notes<ref name=b/> in the middle of it.",
         ["This is a claim with notes in the middle of it."]),
        ("[[File:a.jpg|thumb|A [[caption]] of some words that is not prose.]]\n" + SENTENCE, [SENTENCE]),
        ("{| class=table\n|-\n| a cell of a table that has quite a few words in it.\n|}\n" + SENTENCE, [SENTENCE]),
        ("== A heading of quite a few words ==\n* A list item with more than eight words in it.", []),
        (SENTENCE + "\n== References ==\nThis is a reference of more than eight plain words.", [SENTENCE]),
        ("Bread ({{lang|fr|pain}}) is the oldest food that people make of flour &amp; water.",
         ["Bread is the oldest food that people make of flour & water."]),
        ("See [https://example.org the archive] for more about this than is said here.",
         ["See the archive for more about this than is said here."]),
        ("The area is <math>\\pi r^2</math> for every circle that has a radius.",
         ["The area is for every circle that has a radius."]),
        ("A line left with an open {{template of many words in it is dropped.", []),
        ("#REDIRECT [[Elsewhere]]", []),
        ("Too short.", []),
    ],
)  # fmt: skip
def test_prose(markup, expected):
    assert list(prose(markup)) == expected


def test_articles_of_a_dump():
    page = "<page><title>{}</title><revision><text>{}</text></revision></page>"
    pages = [("One", SENTENCE), ("Two", "#REDIRECT [[One]]"), ("Three", f"{SENTENCE}\n\n{SENTENCE}"), ("Four", "")]
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/">{"".join(page.format(*p) for p in pages)}</mediawiki>'
    assert list(articles(io.BytesIO(dump.encode()))) == [("One", SENTENCE), ("Three", f"{SENTENCE}\n\n{SENTENCE}")]
