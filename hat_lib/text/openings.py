"""Beginnings of texts of many kinds, for the base to go on with: broad text where there is no corpus.

A kind is a few patterns, filled with subjects, names and places that are drawn at random. What the base makes of them
is its own text (`hat_lib.text.mixture`); here are only the first words, written for this purpose and taken from
nowhere.
"""

from __future__ import annotations

import re

import numpy as np

PATTERNS: dict[str, tuple[str, ...]] = {
    "encyclopedia": (
        "{S} is", "{S} (also known as", "The history of {s}", "{S} was first described in {year} by",
        "{place} is a city in", "{name} (born {year}) is", "{name} was a", "In the study of {s}, the term",
        "The {n} of {s} refers to", "{S}\n\n{S} is the",
    ),
    "question": (
        "Q: What is {s}?\nA:", "Question: Why does {s} matter?\n\nAnswer:", "How does {s} work?",
        "What are the main causes of {s}?", "Can somebody explain {s} to me? I have tried to",
        "What is the difference between {s} and {t}?", "1. Which of the following is true of {s}?\na)",
    ),
    "chat": (
        "<|im_start|>user\nTell me about {s}.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nWrite a short text about {s} and {t}.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nHow can I learn {s}?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nSummarize what is known of {s} in {place}.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nWrite a function that",
    ),
    "guide": (
        "How to get started with {s}\n\n", "A beginner's guide to {s}\n", "Step 1:",
        "Before you begin with {s}, make sure that", "Ten tips for {s}:\n1.", "You will need:\n-", "Ingredients:\n-",
        "This tutorial shows how",
    ),
    "news": (
        "{place}, {month} {day} - ", "{PLACE} ({month} {day}, {year}) -",
        "The government of {place} announced on {weekday} that", "{name}, a spokesman for", "Shares of",
        "Officials in {place} said {weekday}", "Scientists at the University of {place} have",
        "After months of debate over {s},",
    ),
    "story": (
        "Once upon a time", "Chapter {digit}\n\n", "{name} looked out of the window",
        '"I never wanted to go to {place}," said {first}.', "It was a cold {month} morning when",
        "{first} and {other} had been friends since", "The old man", "Nobody in {place} remembered",
        "When {first} was {number} years old,",
    ),
    "letter": (
        "Dear {name},\n\n", "Dear Sir or Madam,\n\nI am writing", "Hi {first},\n\nThank you for",
        "To: {first}\nSubject: {S}\n\n", "{month} {day}, {year}\n\nMy dear {first},", "Hello everyone,\n\nI hope",
    ),
    "essay": (
        "Introduction\n\n{S} has long been", "In this essay I will argue that", "It is often said that {s}",
        "There are two views of {s}.", "Many people believe that {s}", "The relationship between {s} and {t}",
        "On {s}\n\n", "The aim of this chapter is",
    ),
    "science": (
        "Abstract. We study {s}", "Abstract\n\nBackground: {S}", "We present a new method for", "In this paper, we",
        "The results show that {s}", "1 Introduction\n\nThe problem of {s}", "Methods: A total of {number} patients",
        "Keywords: {s}, {t}", "Let $f$ be", "Theorem 1. Let",
    ),
    "python": (
        "def ", "import os\nimport ", "class {Word}:\n    def __init__(self", '"""{S}."""\n\nfrom ',
        "#!/usr/bin/env python\n", "import numpy as np\n\n", "def test_{word}():\n",
        "for i in range({number}):\n    ", "```python\n# {s}\n",
    ),
    "code": (
        "#include <stdio.h>\n\nint ", "function {word}(", "const {word} = ", "public class {Word} {{\n", "SELECT ",
        "<!DOCTYPE html>\n<html>\n", "package main\n\nimport", "#!/bin/bash\n", "/* {s} */\n", "struct {word} {{\n",
        '{{"name": "{word}", "', "$ git ", ".{word} {{\n  ",
    ),
    "documentation": (
        "# {Word}\n\n", "## Installation\n\n", "### Usage\n\n", "This module provides", "Returns the",
        "Parameters\n----------\n", "The `{word}` option", "# {S}\n\n## Overview\n",
        "Changelog\n\n{digit}.{digit}.0\n", "Note: this function",
    ),
    "list": (
        "- {s}\n- {t}\n-", "1. {S}\n2.", "* ", "Monday:", "Name, Age, City\n{name}, {number}, {place}\n",
        "| {s} | {t} |\n|---|---|\n|", "Contents\n\n1.", "{year}: ", "Pros:\n-",
    ),
    "speech": (
        "Ladies and gentlemen,", "Mr. Chairman,", "My fellow citizens,", "Thank you very much. It is",
        "MODERATOR: Our next question is about {s}.\n", "{name}: ",
        "Interviewer: What made you interested in {s}?\n{first}:", "We the people",
    ),
    "review": (
        "I bought this", "This book is", "The film, directed by {name},", "Rating: {digit}/5\n",
        "We stayed at the hotel in {place}", "I have been using", "Overall, the",
    ),
    "school": (
        "Lesson {digit}: {S}\n\nObjectives:", "Exercise {digit}.", "Solve the equation",
        "If {first} has {number} apples and {other} has {digit},", "Students will learn about {s}", "Definition. A",
        "Vocabulary:", "Read the following passage",
    ),
    "verse": (
        "O {s}", "The {s} of the", "Verse 1\n", "Roses are", "In {place}, where the", "Oh, ",
    ),
    "law": (
        "Section {digit}. ", "WHEREAS, ", "This Agreement is made on {month} {day}, {year}", "Article {digit}\n\n",
        "The court held that", "Terms of use\n\n1.", "The undersigned",
    ),
    "web": (
        "Home | About | Contact\n\n", "Posted by {first} on {month} {day}, {year}\n\n", "Welcome to",
        "We are a family-owned", "Copyright {year}", "Looking for {s} in {place}?", "FAQ\n\nWhat is {s}?\n",
        "Our team", "Re: {s}\n\n> ",
    ),
}  # fmt: skip
"""kind -> beginnings; in braces what `opening` draws"""

SUBJECTS = """
photosynthesis; the French Revolution; inflation; machine learning; vaccination; plate tectonics; a balanced diet;
the immune system; chess; public transport; renewable energy; the stock market; gardening; black holes; probability;
the Roman Empire; bread; climate change; bees; jazz; the human heart; cryptography; football; the water cycle;
poverty; architecture; coffee; sleep; democracy; volcanoes; antibiotics; slavery; operating systems; glass; the Silk
Road; migration; taxes; dinosaurs; grammar; evolution; earthquakes; childhood; the Moon; rice; painting;
unemployment; databases; steel; whales; marriage; swimming; the Cold War; algebra; wine; housing; insects;
philosophy; electric cars; rivers; mental health; the printing press; trade; ballet; forests; nuclear power; memory;
maps; cancer; the Ottoman Empire; photography; soil; refugees; language learning; bicycles; salt; elections;
diabetes; robotics; the Renaissance; tea; prisons; museums; calculus; fishing; copyright; wolves; stress; railways;
mathematics; cotton; the ocean; kinship; compilers; hiking; genetics; insurance; mythology; yoga; bridges; opera;
sugar; teaching; the atom; agriculture; tourism; knitting; artificial intelligence; weather; leadership; fire; film;
parenting; debt; birds; statistics
"""
PLACES = """
London; Nairobi; Lima; Chicago; Mumbai; Kyoto; Warsaw; Cairo; Toronto; Lagos; Madrid; Sydney; Texas; Norway; Brazil;
Vietnam; Ohio; Athens
"""
FIRST = """
Anna; David; Maria; James; Wei; Fatima; John; Elena; Kofi; Sarah; Thomas; Priya; Lucas; Emma; Ahmed; Grace; Peter;
Yuki; Rosa; Daniel
"""
LAST = """
Smith; Garcia; Chen; Okafor; Müller; Johnson; Kim; Rossi; Patel; Brown; Novak; Silva; Cohen; Nguyen; Andersson;
Williams; Haddad; Clark
"""
MONTHS = "January; February; March; April; May; June; July; August; September; October; November; December"
WEEKDAYS = "Monday; Tuesday; Wednesday; Thursday; Friday"
WORDS = """
parser; user; node; config; image; matrix; queue; server; token; graph; account; event; cache; player; request;
vector; counter; report
"""


def openings(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """``(kind, beginning)``, drawn evenly over kinds, then over a kind's patterns."""
    kinds = list(PATTERNS)
    return [(kind, opening(kind, rng)) for kind in (kinds[i] for i in rng.integers(len(kinds), size=count))]


def opening(kind: str, rng: np.random.Generator) -> str:
    """One beginning of a kind of `PATTERNS`."""
    pattern = PATTERNS[kind][rng.integers(len(PATTERNS[kind]))]
    some = {name: _one(words, rng) for name, words in _WORDS.items()}
    s, place = some["s"], some["place"]
    drawn = some | {
        "S": s[0].upper() + s[1:],
        "PLACE": place.upper(),
        "Word": some["word"].capitalize(),
        "name": f"{some['first']} {_one(LAST, rng)}",
        "n": _one("theory; history; practice; economics; future; nature", rng),
        "year": int(rng.integers(1750, 2024)),
        "day": int(rng.integers(1, 29)),
        "number": int(rng.integers(2, 100)),
        "digit": int(rng.integers(1, 10)),
    }
    return pattern.format_map(drawn)


_WORDS = {"s": SUBJECTS, "t": SUBJECTS, "place": PLACES, "first": FIRST, "other": FIRST, "month": MONTHS,
          "weekday": WEEKDAYS, "word": WORDS}  # fmt: skip


def _one(words: str, rng: np.random.Generator) -> str:
    found = re.split(r";\s*", words.strip())
    return found[rng.integers(len(found))]
