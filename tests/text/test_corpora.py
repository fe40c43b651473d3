"""The bundled corpora are the ones that results were measured on."""

import re

import pytest

from hat_lib.config import DATA, HatError
from hat_lib.text.blocks import load_text, text_hash
from hat_lib.text.corpora import ONE_SPLIT, documents

TABLE = re.findall(r"^\| `(\w+)` \| (\w+) \| \d+ .*?\| ([\d,]+) \| `(\w+)` \|", (DATA / "README.md").read_text(), re.M)


def test_addresses_are_split_by_year():
    years = {s: [int(doc[:4]) for doc, _ in documents("addresses", s)] for s in ("train", "validation", "test")}
    assert years["validation"] == [2022, 2023] and years["test"] == [2026, 2024]
    assert (years["train"][0], years["train"][-1], len(years["train"])) == (1934, 2020, 89)
    assert len(list(documents("addresses", "all"))) == 93
    assert list(documents("bundled", "test")) == list(documents("addresses", "test"))


@pytest.mark.parametrize("name", ONE_SPLIT)
def test_other_corpora_have_no_split_to_train_on(name):
    assert list(documents(name, "all")) == list(documents(name, ONE_SPLIT[name]))
    with pytest.raises(HatError, match=name):
        documents(name, "train")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "split", "tokens", "beginning"), TABLE, ids=[f"{n}-{s}" for n, s, *_ in TABLE])
def test_corpora_are_those_of_the_data_readme(bundled, name, split, tokens, beginning):
    dataset = load_text(name, bundled.tokenizer, split=split)
    assert f"{sum(map(len, dataset['input_ids'])):,}" == tokens and text_hash(dataset).startswith(beginning)
