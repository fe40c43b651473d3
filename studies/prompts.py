"""What studies read, always the same: prompts of several kinds, cut from texts or assembled; whole blocks of a text."""

from itertools import product
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hat_lib.config import check_count
from hat_lib.text.blocks import load_text, spread

KINDS = 5
LENGTH = 24  # tokens of a prompt that is cut from a text

BEGUN = ("{} is", "The history of {} begins", "Five facts about {}:\n1.", "My teacher told me that {}",
         "A poem about {}:\n")  # fmt: skip
TOPICS = ("gravity", "inflation", "photosynthesis", "a prime number", "the French Revolution", "machine learning",
          "plate tectonics", "a sonnet", "vaccination", "the speed of light")  # fmt: skip
CODED = ("def fibonacci(n):\n", "class Stack:\n", "for i in range(10):\n", "SELECT name FROM users",
         "import numpy as np\n", "while True:\n    try:\n", "public static int sum(", "<html>\n<head>\n")  # fmt: skip
HEADS = ("", "# Example\n", "```\n", "Here is the code:\n\n", "// version 2\n")
STARTED = ("1, 2, 3, 4,", "Monday, Tuesday,", "a, b, c, d,", "10, 20, 30,", "red, green,", "2, 4, 8, 16,",
           "January, February,", "one, two, three,")  # fmt: skip
FRAMES = ("{}", "Count on: {}", "The list goes {}", "Continue the series.\n{}", "x = [{}")


class Prompt(NamedTuple):
    kind: str
    text: str


def prompts(tokenizer: PreTrainedTokenizerBase, count: int = 200) -> list[Prompt]:
    """``count`` prompts, kinds in turn: address, docstring, code, topic, list; at most 200."""
    check_count("prompts", count, 1, 200)
    each = -(-count // KINDS)
    kinds = {
        "address": _cut(tokenizer, "addresses", each),
        "docstring": _cut(tokenizer, "docstrings", each),
        "code": [head + coded for head, coded in product(HEADS, CODED)][:each],
        "topic": [begun.format(topic) for topic, begun in product(TOPICS, BEGUN)][:each],
        "list": [frame.replace("{}", started) for frame, started in product(FRAMES, STARTED)][:each],
    }
    turns = [Prompt(kind, texts[i]) for i in range(each) for kind, texts in kinds.items()]
    return turns[:count]


def _cut(tokenizer: PreTrainedTokenizerBase, source: str, count: int) -> list[str]:
    """``count`` pieces of a test split, evenly spaced, each from the beginning of a line."""
    lines = []
    for block in load_text(source, tokenizer, split="test", max_tokens=60_000):
        text = tokenizer.decode(block["input_ids"], skip_special_tokens=True)
        # The first line began in the previous block, and a piece needs text after its start.
        starts = [i + 1 for i, c in enumerate(text[: len(text) * 3 // 4]) if c == "\n"]
        lines += [text[i:] for i in starts if text[i] != "\n"]
    chosen = [lines[i * len(lines) // count] for i in range(count)]
    return [tokenizer.decode(tokenizer(text).input_ids[:LENGTH], skip_special_tokens=True) for text in chosen]


def whole_blocks(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, size: int, context: int) -> Dataset:
    """About ``tokens`` of a test split, in evenly spaced blocks of ``size``; of each, ``context`` is only read."""
    blocks = load_text(text, tokenizer, split="test", block_size=size)
    whole = [i for i, ids in enumerate(blocks["input_ids"]) if len(ids) == size]
    blocks = spread(blocks.select(whole), tokens)
    return blocks.remove_columns("n_context").add_column("n_context", [context] * len(blocks))
