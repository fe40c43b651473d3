"""What a training step costs beside the plain base: sane numbers here; the bar is for the real base."""

import csv

import pytest
import torch
from tiny_runs import GRAINS, new_hat, random_blocks
from typer.testing import CliRunner

from hat_lib.cli.app import app
from hat_lib.config import HatError
from hat_lib.experiments.step_cost import step_ratio
from hat_lib.training.trainer import collate

BATCH = collate([{"input_ids": ids, "index": i} for i, ids in enumerate(random_blocks(2, 64))])


@pytest.mark.parametrize("grain", GRAINS)
def test_a_step_takes_some_times_as_long_as_the_plain_base(grain):
    hat = new_hat(grain)
    before = {n: p.clone() for n, p in hat.hat_parameters().items()}
    found = step_ratio(hat, BATCH, rounds=3)
    assert 0.3 < found.ratio < 30 and found.step_seconds > 0 and found.base_seconds > 0
    assert (found.tokens, found.rounds, found.base, found.granularity) == (128, 3, "random:tiny", grain)
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", torch.get_num_threads())
    assert found.to_dict()["ratio"] == found.ratio
    # The model is as it was.
    assert not hat.training and all(p.grad is None for p in hat.parameters())
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in hat.hat_parameters().items())


def test_bad_input():
    with pytest.raises(HatError, match="rounds must be at least 1, got 0"):
        step_ratio(new_hat("token"), BATCH, rounds=0)
    hat = new_hat("channel")
    hat.calibration = None
    with pytest.raises(HatError, match="needs a calibration"):
        step_ratio(hat, BATCH)


def test_the_command_writes_a_row_for_each_grain(tmp_path):
    out = tmp_path / "step_cost.csv"
    done = CliRunner().invoke(app, ["step-cost", "--base", "random:tiny", "--rounds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(out.open()))
    assert [row["granularity"] for row in rows] == ["channel", "token"]
    assert all(float(row["ratio"]) > 0 and row["tokens"] == "1024" for row in rows)
