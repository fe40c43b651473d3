"""Calibration on a tiny random Llama: what was asked for is realised, and prices are KL."""

import gc

import numpy as np
import pytest
import tiny_runs
import torch
import torch.nn.functional as F

from hat_lib.backbone.base import load_base
from hat_lib.calibration import capacity as module
from hat_lib.calibration.capacity import calibrate, fit_token_routers
from hat_lib.config import HatConfig, HatError
from hat_lib.model.transformer import HierarchicalTransformer


def blocks(n=16, length=64, seed=0):
    return torch.randint(5, 250, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


def new(grain):
    base = load_base("random:tiny", dtype=torch.float32, device="cpu")
    return HierarchicalTransformer(base, HatConfig.default(base, granularity=grain))


@pytest.mark.filterwarnings("ignore:token grain")
@pytest.mark.parametrize(("grain", "capacities"), [("channel", (0.3, 0.5, 0.75, 0.9)), ("token", (0.5, 0.7, 0.9))])
def test_realised_capacity_is_the_requested_one(grain, capacities):
    hat = new(grain)
    calibrate(hat, blocks(), probe_tokens=256, progress=False)
    fresh = torch.tensor(blocks(8, 64, seed=9))
    with torch.no_grad():
        for capacity in capacities:
            hat.capacity = capacity
            hat.lm(fresh)
            assert abs(hat.trace.capacity - capacity) < (0.02 if grain == "channel" else 0.06)


def test_same_text_same_tables():
    tables = [calibrate(new("channel"), blocks(), probe_tokens=128, progress=False) for _ in range(2)]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens():
    """Graphs of finished blocks go at once, not when the garbage collector comes by."""
    hat = new("channel")
    calibrate(hat, blocks(), probe_tokens=64, progress=False)
    gc.collect(), gc.disable()
    try:
        before = sum(type(o) is torch.Tensor for o in gc.get_objects())
        calibrate(hat, blocks(), probe_tokens=768, progress=False)
        assert sum(type(o) is torch.Tensor for o in gc.get_objects()) == before
    finally:
        gc.enable()


@pytest.mark.slow
def test_prices_predict_small_kl():
    """The Fisher form against the KL that gating one site really causes, where it is small."""
    hat = new("channel")
    text = [torch.tensor([b]) for b in blocks(24)]
    with torch.no_grad():
        quantiles = module.score_quantiles(hat, text, progress=False)
        predicted = module._damage(hat, text, quantiles, seed=0, progress=False)
        share = module.PROBE_SHARES[-1]
        ratios = []
        for layer in range(4):
            for j, site in enumerate(hat.grain.sites):
                router, cut = hat.routers[f"{layer}_{site}"], quantiles.cut((layer, site), share)

                def only(i, s, x, rows, state, at=(layer, site), router=router, cut=cut):
                    return router.keep(x, cut) if (i, s) == at else None

                kl = []
                for block in text:
                    with hat.dense():
                        teacher = F.log_softmax(hat.lm(block).logits, -1)
                    with hat.using(only):
                        student = F.log_softmax(hat.lm(block).logits, -1)
                    kl.append(float((teacher.exp() * (teacher - student)).sum(-1).mean()))
                ratios.append(predicted[-1, layer, j] / np.mean(kl))
    assert 0.7 < np.median(ratios) < 1.4 and min(ratios) > 0.3 and max(ratios) < 3


def test_token_routers_are_fitted_once():
    hat = new("token")
    text = [torch.tensor([b]) for b in blocks(4)]
    with torch.no_grad():
        fit_token_routers(hat, text, progress=False)
        first = hat.routers["2_ffn"].weight.clone()
        fit_token_routers(hat, text[:1], progress=False)
    assert first.any() and torch.equal(first, hat.routers["2_ffn"].weight)


def test_bad_input():
    with pytest.raises(HatError, match="256 tokens"):
        calibrate(new("channel"), blocks(2, 16), progress=False)


@pytest.mark.parametrize("grain", ["channel", "token"])
@pytest.mark.filterwarnings("ignore:token grain")
def test_the_model_is_left_as_it_was_found(grain):
    """Capacity, exit rate and decisions stay; with exits on as well."""
    hat = tiny_runs.decides(tiny_runs.skipping(grain), {}, [0.0] * 3)
    ids = torch.tensor(blocks(2))
    calibrate(hat, blocks(), probe_tokens=128, progress=False)
    assert hat.capacity == 0.7 and hat.exit_rate == 0.2
    found = hat.calibration
    with torch.no_grad():
        hat.lm(ids)
        realised = hat.trace.share
        with hat.using(hat.threshold_policy(found.thresholds_at(0.7))):
            hat.lm(ids)
    assert torch.equal(hat.trace.share, realised)
    assert found.exit_scores == [[[0.0] * 3] * 2]  # the tables of exits are another calibration's


def test_quantiles_rest_on_all_tokens_of_a_wide_base(monkeypatch):
    """Drawn at random from rows and channels: every token has a part, however few scores are kept."""
    hat, text = new("channel"), [torch.tensor([b]) for b in blocks(8)]
    whole = module.score_quantiles(hat, text, progress=False)
    assert whole.tokens == 8 * 62
    monkeypatch.setattr(module, "SAMPLES", 4_000)
    some = module.score_quantiles(hat, text, progress=False)
    assert some.tokens == whole.tokens and 4_000 <= some.scores <= 4_100
    for share in (0.3, 0.5, 0.7):
        a, b = (np.array(list(q.cuts(share).values())) for q in (whole, some))
        assert np.abs(a / b - 1).max() < 0.12
    calibration = calibrate(hat, blocks(8), probe_tokens=128, text="a text", progress=False)
    assert calibration.text.startswith("a text; quantiles of 4") and calibration.text.endswith("tokens")
