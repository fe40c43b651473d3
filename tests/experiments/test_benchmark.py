"""The timing harness, on a tiny shape: turns, forced shares, memory, one process a grain. No assertion on speed."""

import pytest
import torch

from hat_lib.backbone.base import load_base
from hat_lib.config import HatConfig, HatError
from hat_lib.experiments import benchmark
from hat_lib.experiments.benchmark import Setting, forced_channels, forced_tokens, measure, of_grain, ratio
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


@pytest.mark.parametrize(("grain", "capacities"), [("channel", [1.0, 0.75, 0.5]), ("token", [1.0, 0.75])])
def test_rows(grain, capacities):
    plan = {(phase, size): capacities for phase in ("decode", "prefill") for size in (1, 2)}
    rows = of_grain(grain, plan, "random:tiny", rounds=1, steps=4, dtype="fp32")
    assert [(r.phase, r.batch, r.capacity) for r in rows] == [(*at, c) for at in plan for c in capacities]
    for r in rows:
        assert r.threads >= 1 and r.dtype == "float32" and r.granularity == grain
        assert abs(r.realised - r.capacity) < 0.1
        assert r.ideal == pytest.approx(1.0) if r.capacity == 1 else r.ideal > 1.1
        assert r.efficiency_hf == pytest.approx(r.speedup_hf / r.ideal, rel=1e-3)
        assert 0 <= r.weights_mb - r.base_mb < 0.2 * r.base_mb, "a second copy of the weights"


def test_a_grain_runs_in_its_own_process_and_what_is_done_is_left_out(monkeypatch):
    asked = []

    class Pool:
        def __init__(self, processes):
            assert processes == 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def apply(self, function, args):
            asked.append((function, *args))
            return [args[0]]

    monkeypatch.setattr(benchmark, "get_context", lambda kind: {"spawn": type("Context", (), {"Pool": Pool})}[kind])
    done = {("channel", phase, 1, c, 0.0) for phase in ("decode", "prefill") for c in (1.0, 0.5)}
    done |= {("token", "decode", 1, 0.5, 0.0)}
    assert list(benchmark.rows(done, channel=[1.0, 0.5], token=[0.5], batches=[1])) == ["token"]
    ((_, grain, plan, base, *_),) = asked
    assert (grain, base, plan) == ("token", "random:tinyllama", {("decode", 1): [], ("prefill", 1): [0.5]})


def test_nothing_that_was_forced_stays_behind():
    base = load_base("random:tiny", dtype=torch.float32, device="cpu")
    hat = HierarchicalTransformer(base, HatConfig.default(base))
    ids = torch.randint(5, 250, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        policy = forced_channels(hat, ids[:, :200], [0.5])[0.5]
        before = hat.lm(ids[:, :60]).logits
        (row,) = measure(hat, base.model, {Setting(0.5): lambda: hat.using(policy)}, ids, phase="decode", rounds=1,
                         steps=4)  # fmt: skip
        assert row.realised < 0.7 and torch.equal(hat.lm(ids[:, :60]).logits, before)
        assert hat.trace.capacity == 1


def test_forced_tokens_skip_exactly():
    base = load_base("random:tiny", dtype=torch.float32, device="cpu")
    hat = HierarchicalTransformer(base, HatConfig.published(base, exit_layers=(), protected_tokens=0))
    ids = torch.randint(5, 250, (2, 40))
    with torch.no_grad(), hat.using(forced_tokens(hat, 0.5, 2, 40)):
        hat.lm(ids)
    share = hat.trace.share
    assert (share[0] == 1).all() and (share.sum(0) == 2).all() and hat.trace.capacity == 0.5
    assert len({tuple(share[:, b, t].tolist()) for b in range(2) for t in range(40)}) == 3


@pytest.mark.parametrize("odd", [{"rounds": 0}, {"batches": (1, 0)}, {"steps": 0}])
def test_bad_input(odd):
    with pytest.raises(HatError, match="at least 1"):
        next(benchmark.rows(**odd))
