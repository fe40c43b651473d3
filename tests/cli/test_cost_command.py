"""``hat cost`` counts what is there, without the weights."""

import pytest
import torch
from tiny_runs import skipping, tiny

from hat_lib.engine.weights import pack, packed_bytes
from hat_lib.training.memory import SAVED, needs
from hat_lib.training.objective import Objective
from hat_lib.training.recipe import Recipe


@pytest.mark.parametrize("name", ["random:tiny", "random:tiny-qwen3"])
def test_needs(name):
    lm, found = tiny(name=name).model, needs(name, torch.float32)
    assert next(iter(found.values())) == sum(p.numel() for p in lm.parameters()) * 4
    for form, shown in (("base", "float32"), ("int8", "int8"), ("q4", "q4")):
        # With scales and norms, which are little in a real base.
        packed = packed_bytes(pack(lm, form, head_norm=torch.ones(lm.config.hidden_size)))
        assert found[f"the engine's copy, {shown}"] == pytest.approx(packed, rel=0.2)


def test_command(run_hat):
    code, out, _ = run_hat("cost", "--base", "random:tinyllama", "--dtype", "bf16")
    assert code == 0 and "1,100,048,384 parameters in bfloat16" in out and "2.05 GiB" in out


def test_what_a_training_step_keeps():
    """Counted on a tiny model, by the storages that autograd saves."""
    hat, ids, saved = skipping("channel", correction_rank=4), torch.randint(0, 256, (1, 256)), {}
    objective = Objective(hat, Recipe.named("default", "channel"), "routers", hat.calibration.thresholds_at)
    weights = {p.untyped_storage().data_ptr() for p in hat.lm.parameters()}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(ids, torch.ones_like(ids), torch.tensor([0]), 5, 10)
    counted = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in weights) / 4 / ids.numel()
    config = hat.lm.config
    said = config.num_hidden_layers * sum(number * getattr(config, field) for field, number in SAVED.items())
    assert said + config.vocab_size == pytest.approx(counted, rel=0.1)
