"""The timing harness, on a tiny shape: turns, forced shares, memory, files. No assertion on speed."""

import pandas as pd
import pytest
import torch

from hat_lib.backbone.base import load_base
from hat_lib.config import HatConfig, HatError
from hat_lib.experiments.benchmark import benchmark, forced_tokens, ratio, write_rows
from hat_lib.inference.timing import Variant, take_turns
from hat_lib.model.transformer import HierarchicalTransformer


def test_turns_are_interleaved_and_ratios_paired():
    order, fake = [], {"a": iter([9, 2.0, 4.0, 8.0]), "b": iter([9, 1.0, 1.0, 1.0])}
    variants = [Variant(n, None, torch.inference_mode) for n in "ab"]

    def once(v):
        order.append(v.name)
        return next(fake[v.name])

    take_turns(variants, once, rounds=3)
    assert order == list("baabbaab") and variants[0].times == [2.0, 4.0, 8.0]  # the warm-up is not counted
    assert ratio(*variants) == 4.0


@pytest.mark.parametrize(("grain", "capacities"), [("channel", [1.0, 0.75, 0.5]), ("token", [1.0, 0.75])])
def test_rows(grain, capacities, tmp_path):
    rows = benchmark(grain, capacities, "random:tiny", dtype="fp32", batches=(1, 2), rounds=1, steps=4, progress=False)
    assert {(r.phase, r.batch) for r in rows} == {("decode", 1), ("decode", 2), ("prefill", 1), ("prefill", 2)}
    for r in rows:
        assert r.threads >= 1 and r.dtype == "float32" and r.granularity == grain
        assert abs(r.realised - r.capacity) < 0.1
        assert r.ideal == pytest.approx(1.0) if r.capacity == 1 else r.ideal > 1.1
        assert r.efficiency_hf == pytest.approx(r.speedup_hf / r.ideal, abs=0.01)
        hat_mb = r.weights_mb - r.base_mb
        assert 0 <= hat_mb < 0.2 * r.base_mb, "a second copy of the weights"
    frame = pd.read_csv(write_rows(tmp_path / "new" / "x.csv", rows))
    assert len(frame) == len(rows) and not list(tmp_path.glob("new/*.part"))


def test_forced_tokens_skip_exactly():
    base = load_base("random:tiny", dtype=torch.float32, device="cpu")
    hat = HierarchicalTransformer(base, HatConfig.published(base, exit_layers=(), protected_tokens=0))
    ids = torch.randint(5, 250, (2, 40))
    with torch.no_grad(), hat.using(forced_tokens(hat, 0.5, 2, 40)):
        hat.lm(ids)
    share = hat.trace.share
    assert (share[0] == 1).all() and (share.sum(0) == 2).all() and hat.trace.capacity == 0.5
    assert len({tuple(share[:, b, t].tolist()) for b in range(2) for t in range(40)}) == 3


def test_bad_input(tmp_path):
    with pytest.raises(HatError, match="at least 1"):
        benchmark("token", [0.5], "random:tiny", rounds=0)
    with pytest.raises(HatError, match="at least 1"):
        benchmark("token", [0.5], "random:tiny", batches=(1, 0))
    (tmp_path / "file").write_text("")
    with pytest.raises(HatError, match="cannot write"):
        write_rows(tmp_path / "file" / "x.csv", [Variant("a", None, None)])
