"""On the real model: dense, the method is the base, on both paths; fewer bits change little."""

import pytest
import torch
from four_bits_read import packed_and_read
from test_transformer import stepwise

from hat_lib.config import DATA
from hat_lib.hat import HierarchicalTransformer
from hat_lib.text.blocks import load_text


def test_q4_is_near_the_file_s_own_numbers(bundled):
    for name, layer, own, read in packed_and_read(bundled.model):
        assert float((own - read).norm() / own.norm()) < 0.01, (name, layer)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "nats"), [("base", 1e-6), ("int8", 0.01), ("q4", 0.01)])
@torch.no_grad()
def test_dense_equals_base_and_fewer_bits_change_little(bundled, form, nats):
    ids = torch.tensor([load_text("addresses", bundled.tokenizer, max_tokens=96)[0]["input_ids"]])
    expected = bundled.model(ids).logits
    hat = HierarchicalTransformer.from_pretrained(DATA / "checkpoints" / "calibrated", bundled)
    try:
        hat.weight_format = form
        with hat.dense():
            assert torch.equal(hat.lm(ids).logits, expected)
            found = stepwise(hat, ids).log_softmax(-1)
    finally:
        hat.unload()
    expected = expected.log_softmax(-1)
    assert abs(float((expected.exp() * (expected - found)).sum(-1).mean())) < nats
