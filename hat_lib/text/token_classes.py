"""Kinds of tokens: the text of each token, and its class, by its own text and its neighbours'.

A rule of thumb for English, not a parser. A token gets the first class in `CLASSES` whose description fits it. A name
is a capitalised word inside a sentence, so acronyms and the words of a title are names too, while a name that opens a
sentence is not; a sentence begins after . ! ? : or a line's end, and at the beginning of a block.
"""

import re
from collections.abc import Sequence
from importlib.resources import files
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase

# Class -> what it holds, in order of precedence.
CLASSES = {
    "special": "a token of the tokenizer's own, such as the beginning of a text",
    "fragment": "bytes that are no character, or part of one that a later token completes",
    "space": "white space and line ends alone",
    "digits": "has a digit",
    "punctuation": "has neither letter nor digit",
    "word rest": "goes on with a word that an earlier token began",
    "function word": "a whole word of a closed class",
    "name": "a capitalised word inside a sentence, whole or its first piece",
    "word start": "the first piece of any other word",
    "whole word": "any other word in one token",
}
# Lower-case words of closed classes, as one token holds them: "don" and "'t", not "don't".
FUNCTION_WORDS = frozenset(files(__package__).joinpath("function_words.txt").read_text(encoding="utf-8").split())

_SENTENCE_BEGINS = re.compile(r"""(^|[.!?:…]["'”’)\]]*\s|\n)\s*["'“‘(\[*]*$""")


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the whole text. A character that several tokens share belongs to the
    last of them."""
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    out, end = [], 0
    for n in range(1, len(ids) + 1):
        # For a character that is still incomplete, decoders show U+FFFD, which is not what is there in the end.
        so_far = tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
        out.append(commonprefix([so_far[end:], whole[end:]]))
        end += len(out[-1])
    return out


def classes(texts: Sequence[str], special: Sequence[bool] = ()) -> list[str]:
    """The class of each token of a text, a key of `CLASSES`; ``texts`` are as from `pieces`, in order, and ``special``
    is True at the tokenizer's own tokens (without it, none is)."""
    out, before = [], ""
    for i, text in enumerate(texts):
        after = next((t for t in texts[i + 1 :] if t), "")
        out.append("special" if any(special[i : i + 1]) else _class(text, before, after))
        before = (before + text)[-20:]  # white space and quotes before a word, and what ended the sentence
    return out


def _class(text: str, before: str, after: str) -> str:
    word = text.strip()
    if not text or "\ufffd" in text:
        return "fragment"
    if not word:
        return "space"
    if any(c.isdigit() for c in word):
        return "digits"
    if not any(c.isalpha() for c in word):
        return "punctuation"
    if text[0].isalpha() and before[-1:].isalpha():
        return "word rest"
    whole = not (text[-1].isalpha() and after[:1].isalpha())
    acronym = len(word) > 1 and word.isupper()
    if whole and not acronym and word.lower().replace("’", "'") in FUNCTION_WORDS:
        return "function word"
    lead = text[: next(i for i, c in enumerate(text) if c.isalpha())]
    if text[len(lead)].isupper() and not _SENTENCE_BEGINS.search(before + lead):
        return "name"
    return "whole word" if whole else "word start"
