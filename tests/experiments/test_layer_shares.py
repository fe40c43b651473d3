"""What each layer executes: that of the trace, at the settings that the sweep has."""

import pytest
import torch
from tiny_runs import adaptive

from hat_lib.config import DATA, HatError
from hat_lib.experiments import quality, registry
from hat_lib.experiments.layer_shares import layer_shares
from hat_lib.experiments.quality import Point
from hat_lib.experiments.rows import RowWriter, read_rows

BLOCKS = [
    {"input_ids": torch.randint(5, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist()} for n in (30, 20)
]


@pytest.fixture(scope="module")
def hat():
    return adaptive("channel")


def test_those_of_the_trace(hat):
    rows = layer_shares(hat, BLOCKS, [(0.6, 0.0), (0.6, 0.5), (1.0, 0.0)])
    n = hat.config.n_layers
    assert [row.layer for row in rows] == 3 * list(range(n)) and {row.tokens for row in rows} == {50}
    expected = torch.zeros(n, dtype=torch.float64)
    with hat.at(0.6, 0.5), torch.no_grad():
        for row in BLOCKS:
            hat.lm.model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
            expected += hat.trace.share.double().sum((1, 2))
    gated, leaving, everything = rows[:n], rows[n : 2 * n], rows[2 * n :]
    assert [row.executed for row in leaving] == pytest.approx((expected / 50).tolist(), rel=1e-4)
    entered = [row.entered for row in leaving]
    assert entered == sorted(entered, reverse=True) and entered[0] == 1 and entered[-1] < 1
    assert all(row.entered == 1 for row in gated) and all(row.executed == row.entered == 1 for row in everything)


@pytest.mark.parametrize(("blocks", "settings"), [([], [(0.6, 0.0)]), (BLOCKS, [(7.0, 0.0)])])
def test_nothing_and_nonsense_are_refused(hat, blocks, settings):
    before = hat.capacity, hat.exit_rate
    with pytest.raises(HatError):
        layer_shares(hat, blocks, settings)
    assert (hat.capacity, hat.exit_rate) == before


def test_at_the_settings_of_the_sweep(hat, tmp_path):
    hat.save_pretrained(tmp_path / "channel")
    template = read_rows(DATA / "results" / "quality.csv", quality.Row)[0]
    with RowWriter(tmp_path / "quality.csv", quality.Row, quality.KEY) as writer:
        for capacity, rate in ((0.5, 0.0), (1.0, 0.3)):
            point = Point("channel", "docstrings", 4000, capacity, rate, "trained")
            writer.write(quality.Row(**vars(template) | point._asdict()))
    rows = list(registry.measure("layer_shares", tmp_path, checkpoint=tmp_path / "channel", dtype="fp32"))
    settings = {(row.capacity, row.exit_rate) for row in rows}
    assert settings == {(0.5, 0.0), (1.0, 0.0), (1.0, 0.3)}, "those of quality.csv, and the base"
    assert len(rows) == 3 * hat.config.n_layers
