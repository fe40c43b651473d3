"""What a training step costs beside the plain base: sane numbers here; the bar is for the real base."""

import pytest
import torch
from tiny_runs import GRAINS, new_hat, random_blocks

from hat_lib.experiments import step_cost
from hat_lib.experiments.step_cost import step_ratio
from hat_lib.training.trainer import collate

BATCH = collate([{"input_ids": ids, "index": i} for i, ids in enumerate(random_blocks(2, 64))])


@pytest.mark.parametrize("grain", GRAINS)
def test_a_step_takes_some_times_as_long_as_the_plain_base(grain):
    hat = new_hat(grain)
    before = {n: p.clone() for n, p in hat.hat_parameters().items()}
    found = step_ratio(hat, BATCH, rounds=3)
    assert min(found.ratio, found.step_seconds, found.base_seconds) > 0
    assert (found.tokens, found.rounds, found.base, found.granularity) == (128, 3, "random:tiny", grain)
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", torch.get_num_threads())
    # The model is as it was.
    assert not hat.training and all(p.grad is None for p in hat.parameters())
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in hat.hat_parameters().items())


def test_a_row_for_each_grain():
    rows = list(step_cost.rows({("token",)}, base="random:tiny", rounds=1, dtype="fp32"))
    assert [(row.granularity, row.tokens) for row in rows] == [("channel", 1024)]
