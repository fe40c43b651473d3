"""The texts of the tokens add up to the whole text; each class by examples, and by its place in the order."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hat_lib.base.shapes import byte_tokenizer
from hat_lib.text.token_classes import classes, pieces


def spaced_tokenizer():
    """Like Llama's: a space is part of the next token, the first one is dropped, unknown characters become bytes."""
    words = ["▁", "▁the", "▁cat", "s", "é", "."]
    names = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    vocabulary = {name: i for i, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def test_a_character_belongs_to_its_last_byte_and_spaces_stay_where_the_tokenizer_has_them():
    tokenizer = byte_tokenizer()
    assert pieces(tokenizer, tokenizer("a é🦙\n").input_ids) == ["a", " ", "", "é", "", "", "", "🦙", "\n"]
    assert pieces(tokenizer, []) == []
    tokenizer = spaced_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "s", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>", "▁the", "."])
    assert pieces(tokenizer, ids) == ["the", " cat", "s", "", "", "", "🦙", " the", "."]
    ids = tokenizer.convert_tokens_to_ids(["<0x99>", "▁cat", "<0xF0>", "<0x9F>"])
    assert pieces(tokenizer, ids) == ["\ufffd", " cat", "\ufffd", "\ufffd"], "half a character as the decoder has it"


@pytest.mark.parametrize("make", [byte_tokenizer, spaced_tokenizer])
def test_pieces_of_any_ids_join_to_their_text(make):
    tokenizer, draw = make(), random.Random(0)
    for _ in range(100):
        ids = [draw.randrange(len(tokenizer)) for _ in range(20)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["In", " the", " end"], ["function word", "function word", "whole word"]),
        ([" a", " in", "verse"], ["function word", "word start", "word rest"]),  # "in" is not a word here
        ([" met", " Ada", " in", " Paris"], ["whole word", "name", "function word", "name"]),
        (["Paris", " fell", ".", " Rome"], ["whole word", "whole word", "punctuation", "whole word"]),
        ([" so", " (", "NASA", ")"], ["function word", "punctuation", "name", "punctuation"]),
        ([" of", " the", " WHO"], ["function word", "function word", "name"]),
        ([" met", " Ja", "ne"], ["whole word", "name", "word rest"]),
        ([" in", " ", "2", "0"], ["function word", "space", "digits", "digits"]),
        ([" don", "'t", " I"], ["function word", "function word", "function word"]),
        ([" it", "’s", "\n\n", "Now"], ["function word", "function word", "space", "whole word"]),
        (['."', " Go", " +", " €"], ["punctuation", "whole word", "punctuation", "punctuation"]),
        ([" x1", " _y"], ["digits", "whole word"]),
        (["", "🦙", "\ufffd"], ["fragment", "punctuation", "fragment"]),
        ([" na", "", "ïve"], ["word start", "fragment", "word rest"]),
        ([" 日", "本"], ["word start", "word rest"]),
    ],
)  # fmt: skip
def test_classes_by_example(texts, expected):
    assert classes(texts) == expected


def test_special_tokens_come_first_and_only_where_said():
    assert classes(["<s>", "The"], [True, False]) == ["special", "function word"]
    assert classes(["2", "</s>"], [True, True]) == ["special", "special"]
    assert classes(["<s>", "2"]) == ["whole word", "digits"]
