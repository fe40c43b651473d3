"""A handful of equalities on the real model, and the reference checkpoint as the README uses it."""

import pytest
import torch
from four_bits_read import packed_and_read
from test_transformer import close, stepwise

from hat_lib.backbone.base import exact_hash, load_base
from hat_lib.config import DATA, HatConfig
from hat_lib.evaluation.perplexity import compare, score
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import load_text

CHECKPOINT = DATA / "checkpoints" / "calibrated"


@pytest.fixture
def hat(bundled):
    model = HierarchicalTransformer.from_pretrained(CHECKPOINT, bundled)
    with torch.no_grad():
        yield model
    model.unload()


def prompt(base):
    return base.tokenizer("The future of AI is", return_tensors="pt")


@pytest.mark.parametrize("grain", ["channel", "token"])
@torch.no_grad()
def test_untrained_equals_base_and_unload_restores(bundled, grain):
    inputs, before = prompt(bundled), exact_hash(bundled.model)
    expected = bundled.model(**inputs).logits
    model = HierarchicalTransformer(bundled, HatConfig.default(bundled, granularity=grain))
    close(model.lm(**inputs).logits, expected)
    assert exact_hash(model.unload().model) == before


@pytest.mark.slow
def test_generate_at_capacity_one_is_transformers_token_for_token(hat):
    inputs = prompt(hat.base)
    hat.capacity = 1.0
    found = hat.lm.generate(**inputs, max_new_tokens=24, do_sample=False)
    plain = load_base("bundled", dtype=torch.float32, device="cpu").model
    assert torch.equal(found, plain.generate(**inputs, max_new_tokens=24, do_sample=False))


@pytest.mark.slow
def test_the_reference_checkpoint_costs_little(hat):
    blocks = load_text("addresses", hat.base.tokenizer, block_size=256, max_tokens=1024)
    with hat.dense():
        base = score(hat, blocks, progress=False)
    hat.capacity = 0.75
    adaptive = score(hat, blocks, progress=False)
    assert abs(adaptive.capacity - 0.75) < 0.02
    assert -0.02 < compare(base, adaptive).increase < 0.06


def test_q4_is_near_the_file_s_own_numbers(bundled):
    for name, layer, own, read in packed_and_read(bundled.model):
        assert float((own - read).norm() / own.norm()) < 0.01, (name, layer)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "nats"), [("int8", 0.01), ("q4", 0.01)])
def test_fewer_bits_change_little(hat, form, nats):
    ids = torch.tensor([load_text("addresses", hat.base.tokenizer, max_tokens=96)[0]["input_ids"]])
    hat.weight_format = form
    with hat.dense():
        found, expected = stepwise(hat, ids).log_softmax(-1), hat.lm(ids).logits.log_softmax(-1)
    assert 0 <= float((expected.exp() * (expected - found)).sum(-1).mean()) < nats
