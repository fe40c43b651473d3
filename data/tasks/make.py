"""Makes the data of the tasks beside it from the test split of the addresses: python data/tasks/make.py

cloze.jsonl     the beginning of a paragraph up to the last word of a sentence, and four words to end it with. The three
                wrong ones end sentences of addresses of any year after the same word, so that the word before does not
                tell; none of them stands in the passage.
passages.jsonl  paragraphs of 40 to 120 words.

As many from each address, spread evenly over it. One seed, one result.
"""

import json
import random
import re
from collections import defaultdict
from pathlib import Path

from hat_lib.text.corpora import SPLITS, documents

HERE = Path(__file__).resolve().parent
CLOZES, PASSAGES = 60, 14  # of each address
CONTEXT, PASSAGE = range(14, 70), range(40, 121)  # words
ENDING = re.compile(r"(.*\b([a-z]+)) ([a-z]{3,12})\.(?= |$)")  # passage, its last word, the word to be found
STAGE = re.compile(r"[\[\]]|^(The President|Audience)\b")  # [Applause], or a name before what is said


def spread(items: list, n: int) -> list:
    return [items[i * len(items) // n] for i in range(n)]


def endings(paragraph: str) -> list[tuple[str, str, str]]:
    """`ENDING` of each sentence that has one, passages from the paragraph's beginning."""
    ends = [m.end() for m in re.finditer(r"\.(?= |$)", paragraph)]
    return [m.groups() for m in (ENDING.fullmatch(paragraph[:end]) for end in ends) if m]


def clozes(paragraphs: list[str], after: dict[str, set[str]], draw: random.Random) -> list[dict]:
    found = {}
    for number, paragraph in enumerate(paragraphs):
        for passage, before, word in endings(paragraph):
            wrong = after[before] - {word, *re.findall(r"[a-z]+", passage.lower())}
            if len(wrong) >= 3 and len(passage.split()) in CONTEXT:
                found[number] = passage, word, sorted(wrong)  # one of a paragraph, its last
    rows = []
    for passage, word, wrong in spread(list(found.values()), CLOZES):
        choices = [word, *draw.sample(wrong, 3)]
        draw.shuffle(choices)
        rows.append({"context": passage, "choices": choices, "label": choices.index(word)})
    return rows


def make() -> dict[str, str]:
    """The content of each file by its name."""
    draw, after = random.Random(0), defaultdict(set)
    for split in SPLITS:
        for _, text in documents("addresses", split):
            for paragraph in text.split("\n\n"):
                for _, before, word in endings(paragraph):
                    after[before].add(word)
    files = {"cloze.jsonl": [], "passages.jsonl": []}
    for name, text in documents("addresses", "test"):
        paragraphs = [p for p in text.split("\n\n") if not STAGE.search(p)]
        passages = [p for p in paragraphs if len(p.split()) in PASSAGE]
        files["cloze.jsonl"] += [{"address": name, **row} for row in clozes(paragraphs, after, draw)]
        files["passages.jsonl"] += [{"address": name, "text": p} for p in spread(passages, PASSAGES)]
    lines = {name: [json.dumps(row, ensure_ascii=False) for row in rows] for name, rows in files.items()}
    return {name: "\n".join(found) + "\n" for name, found in lines.items()}


if __name__ == "__main__":
    for name, content in make().items():
        (HERE / name).write_text(content, encoding="utf-8")
