"""The timing harness, on a tiny shape: turns, forced shares. No assertion on speed."""

import pytest
import torch
from tiny_runs import new_hat

from hat_lib.config import HatConfig, HatError
from hat_lib.experiments import benchmark
from hat_lib.experiments.benchmark import Setting, forced, measure, ratio
from hat_lib.inference.speed import Variant, take_turns
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


TINY = {"base": "random:tiny", "rounds": 1, "steps": 4, "dtype": "fp32", "batches": (1, 2)}


def test_rows_and_what_is_done_is_left_out():
    asked = {"channel": [1.0, 0.75, 0.5], "token": [1.0, 0.75]}
    rows = list(benchmark.rows(**asked, **TINY))
    keys = [tuple(getattr(row, name) for name in benchmark.KEY) for row in rows]
    phases = [(phase, size) for phase in ("decode", "prefill") for size in (1, 2)]
    assert keys == [(grain, *at, c, 0.0) for grain in asked for at in phases for c in asked[grain]]
    for r in rows:
        assert r.threads >= 1 and r.dtype == "float32"
        assert abs(r.realised - r.capacity) < 0.1
        assert r.ideal == pytest.approx(1.0) if r.capacity == 1 else r.ideal > 1.1
        assert r.efficiency_hf == pytest.approx(r.speedup_hf / r.ideal, rel=1e-3)
    again = benchmark.rows({key for key in keys if key[:2] != ("token", "prefill")}, **asked, **TINY)
    assert [(r.granularity, r.phase, r.batch, r.capacity) for r in again] == [key[:4] for key in keys[-4:]]


@pytest.mark.parametrize("grain", ["channel", "token"])
def test_nothing_that_was_forced_stays_behind(grain):
    hat = new_hat(grain)
    ids = torch.randint(5, 250, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        around = forced(hat, [0.5], 1, 600)[0.5]
        before = hat.lm(ids[:, :60]).logits
        (row,) = measure(hat, hat.base.model, {Setting(0.5): around}, ids, phase="decode", rounds=1, steps=4)
        assert row.realised < 0.7 and torch.equal(hat.lm(ids[:, :60]).logits, before)
        assert hat.trace.capacity == 1


def test_forced_tokens_skip_exactly(tiny_base):
    hat = HierarchicalTransformer(tiny_base, HatConfig.published(tiny_base, exit_layers=(), protected_tokens=0))
    with torch.no_grad(), forced(hat, [0.5], 2, 40)[0.5]():
        hat.lm(torch.randint(5, 250, (2, 40)))
    share = hat.trace.share
    hat.unload()
    assert (share[0] == 1).all() and (share.sum(0) == 2).all()
    assert len({tuple(share[:, b, t].tolist()) for b in range(2) for t in range(40)}) == 3


@pytest.mark.parametrize("odd", [{"rounds": 0}, {"batches": (1, 0)}, {"steps": 0}])
def test_bad_input(odd):
    with pytest.raises(HatError, match="at least 1"):
        next(benchmark.rows(**odd))
