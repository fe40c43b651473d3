"""``hat cost`` counts what is there, without the weights."""

import pytest
import torch
from tiny_runs import tiny

from hat_lib.cli.cost import needs
from hat_lib.engine.weights import pack, packed_bytes


@pytest.mark.parametrize("name", ["random:tiny", "random:tiny-qwen3"])
def test_needs(name):
    lm, found = tiny(name=name).model, needs(name, torch.float32)
    assert next(iter(found.values())) == sum(p.numel() for p in lm.parameters()) * 4
    for form, shown in (("base", "float32"), ("int8", "int8"), ("q4", "q4")):
        packed = packed_bytes(pack(lm, form, preview=True))  # with scales and norms, which are little in a real base
        assert found[f"the engine's copy, {shown}"] == pytest.approx(packed, rel=0.2)


def test_command(run_hat):
    code, out, _ = run_hat("cost", "--base", "random:tinyllama", "--dtype", "bf16")
    assert code == 0 and "1,100,048,384 parameters in bfloat16" in out and "2.05 GiB" in out
