"""Prompts: two hundred, of five kinds, always the same."""

import pytest

from hat_lib.config import HatError
from studies.prompts import LENGTH, prompts


def test_two_hundred_of_five_kinds(tiny_base):
    found = prompts(tiny_base.tokenizer, 200)
    assert len({p.text for p in found}) == 200 and found == prompts(tiny_base.tokenizer, 200)
    assert [p.kind for p in found[:5]] == ["address", "docstring", "code", "topic", "list"]
    assert all(p.text.strip() for p in found)
    cut = [p.text for p in found if p.kind in ("address", "docstring")]
    assert all(len(tiny_base.tokenizer(t).input_ids) <= LENGTH + 1 for t in cut)


@pytest.mark.parametrize("count", [0, 201])
def test_there_are_no_others(tiny_base, count):
    with pytest.raises(HatError, match="prompts"):
        prompts(tiny_base.tokenizer, count)
