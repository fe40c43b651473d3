"""A base that accelerate spreads: adapted like any other, and given back as it was."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from tiny_runs import random_blocks, skipping, tiny

from hat_lib.base.dispatch import is_dispatched
from hat_lib.base.load import fingerprint, load_base
from hat_lib.base.shapes import byte_tokenizer
from hat_lib.calibration.capacity import calibrate
from hat_lib.config import HatConfig, HatError
from hat_lib.hat import HierarchicalTransformer
from hat_lib.training.objective import Objective
from hat_lib.training.recipe import Recipe
from hat_lib.training.run import nominal_thresholds
from hat_lib.training.trainer import collate

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, base = tmp_path_factory.mktemp("saved"), tiny(name="random:tiny-qwen2")
    base.model.config.tie_word_embeddings = True
    base.model.tie_weights()
    base.model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def whole(folder):
    return load_base(folder, dtype="fp32", device="cpu")


@pytest.fixture(params=["cpu", "disk"])
def spread(request, folder, tmp_path):
    """All weights kept in memory and fetched for each forward; or the embedding and half of the layers on disk."""
    if request.param == "cpu":
        base = load_base(folder, dtype="fp32", device="cpu")
        cpu_offload(base.model, torch.device("cpu"))
        return base
    device_map = {"model.embed_tokens": "disk", "model.norm": "cpu", "lm_head": "disk", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(4)}
    return load_base(folder, dtype="fp32", device_map=device_map, offload_folder=tmp_path)


@torch.no_grad()
def test_equals_the_whole_base(spread, whole, ids):
    assert is_dispatched(spread.model) and not is_dispatched(whole.model)
    assert spread.fingerprint == fingerprint(spread.model) == whole.fingerprint
    expected = whole.model(ids).logits
    hats = [skipping("channel", base, translator_rank=2) for base in (spread, whole)]
    assert "spread over devices" in hats[0].decoding
    with hats[0].dense():
        assert torch.equal(hats[0].lm(ids).logits, expected)
    logits = [hat.lm(ids).logits for hat in hats]
    assert torch.equal(*logits) and not torch.equal(logits[0], expected)
    assert hats[0].trace.capacity == hats[1].trace.capacity < 1
    with hats[1].reference():
        texts = [hat.lm.generate(ids, **GREEDY) for hat in hats]
    assert torch.equal(*texts)
    twin = copy.deepcopy(hats[0])
    assert torch.equal(twin.lm(ids).logits, logits[0])
    assert torch.equal(hats[0].unload().model(ids).logits, expected)
    assert torch.equal(twin.unload().model(ids).logits, expected)


def test_is_calibrated_and_trained_as_the_whole_base(spread, whole, ids, tmp_path):
    hats = [HierarchicalTransformer(base, HatConfig.default(base, correction_rank=2)) for base in (spread, whole)]
    hats[1].load_adapter(hats[0].checkpoint())
    blocks = random_blocks(10, 32)
    for hat in hats:
        calibrate(hat, blocks, split="uniform", token_sensitivity=False, head=False, progress=False)
    assert hats[0].calibration == hats[1].calibration
    rows = collate([{"input_ids": row, "index": i} for i, row in enumerate(blocks[:2])])
    gradients = []
    for hat in hats:
        with torch.enable_grad():
            objective = Objective(hat, Recipe(split_lr=1e-3), "routers", nominal_thresholds(hat))
            objective(**rows, step=1, steps=4)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in hat.parameters() if p.grad is not None]))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    hats[0].save_pretrained(tmp_path)
    again = HierarchicalTransformer.from_pretrained(tmp_path, hats[1].unload())
    with hats[0].at(0.6), again.at(0.6), torch.no_grad():
        assert torch.equal(hats[0].lm(ids).logits, again.lm(ids).logits)


def test_a_map_of_one_device_leaves_the_base_there(folder):
    base = load_base(folder, dtype="fp32", device="meta", device_map={"": "cpu"})
    assert base.device.type == "cpu" and not is_dispatched(base.model)


def test_refusals(spread, folder):
    hat = HierarchicalTransformer(spread, HatConfig.default(spread))
    with pytest.raises(HatError, match="already adapted"):
        HierarchicalTransformer(spread, HatConfig.default(spread))
    with pytest.raises(HatError, match="cannot be moved or cast"):
        hat.to(torch.bfloat16)
    with pytest.raises(HatError, match="fp32 or bf16"):
        load_base(folder, dtype="fp16", device_map="auto")
