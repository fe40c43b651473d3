"""Which tokens need more: the price model, and what is made of its predictions."""

import pytest
import torch
from tiny_runs import random_blocks, untrained

from hat_lib.calibration import token_sensitivity
from hat_lib.calibration.budget import PROBE_SHARES, site_damage
from hat_lib.calibration.capacity import calibrate
from hat_lib.calibration.quantiles import score_quantiles
from hat_lib.calibration.token_sensitivity import PRIOR, log_linear

pytestmark = pytest.mark.usefixtures("no_grad")
BLOCKS = random_blocks(16, 64)


def drawn(n=6000, width=8, seed=0):
    """Inputs, the eta of each, and prices scattered around exp(eta)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator) * torch.linspace(0.5, 20, width) + 3
    weight = 0.2 * torch.randn(width, generator=generator) / torch.linspace(0.5, 20, width)
    eta = (x - 3) @ weight - 1
    return x, eta, eta.exp() * torch.empty(n).exponential_(generator=generator)


def test_log_linear_is_at_its_optimum():
    """The gradient by hand: the pull of the prior against that of the data, on standardised columns."""
    x, _, y = drawn(n=500)
    weight, bias = log_linear(x, y)
    columns, own = (x - x.mean(0)) / x.std(0), weight * x.std(0)
    misfit = 1 - y * (-(x @ weight + bias)).exp()
    pull = columns.T @ misfit / len(x) + own * x.shape[1] / (len(x) * PRIOR**2)
    assert float(pull.abs().max()) < 1e-3 and abs(float(misfit.mean())) < 1e-3


def test_sensitivity_is_half_the_log_of_the_price(monkeypatch):
    hat = untrained()
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(4000, 64, generator=generator) for _ in range(4)]
    direction = torch.randn(64, generator=generator) / 64**0.5
    prices = torch.stack([(x @ direction).exp() for x in inputs])
    monkeypatch.setattr(token_sensitivity, "NEIGHBOURS", 0)  # each layer here has its own tokens
    monkeypatch.setattr(token_sensitivity, "token_prices", lambda *_: (prices, inputs))
    token_sensitivity.fit_token_sensitivity(hat, [], {}, seed=0, progress=False)
    for layer, x in enumerate(inputs):
        found, wanted = hat.routers[f"{layer}_token"].score(x), (x @ direction) / 2
        slope = float((found * wanted).sum() / wanted.square().sum())
        assert 0.85 < slope <= 1.02 and float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > 0.98


def test_prices_of_tokens_add_up_to_those_of_the_text():
    """For a single site, the mean over tokens is what `calibrate` takes as the site's price."""
    hat, text = untrained(), [torch.tensor([b]) for b in BLOCKS]
    quantiles = score_quantiles(hat, text, progress=False)
    thresholds = {key: -1.0 for key in quantiles.tables} | {(2, "down"): quantiles.threshold((2, "down"), 0.75)}
    prices, inputs = token_sensitivity.token_prices(hat, text, thresholds, seed=0, progress=False)
    whole = site_damage(hat, text, quantiles, progress=False)[PROBE_SHARES.index(0.75), 2, 3]
    assert prices.shape == (4, 16 * 62) and inputs[0].shape == (16 * 62, 64)
    assert not prices[[0, 1, 3]].any() and float(prices[2].sum()) / (16 * 64) == pytest.approx(whole, rel=1e-4)


def test_a_sensitive_token_keeps_more():
    hat, ids = untrained(), torch.tensor(BLOCKS[:2])
    calibrate(hat, BLOCKS, probe_tokens=128, progress=False)
    assert all(hat.routers[f"{i}_token"].weight.any() for i in range(4))
    calibrate(hat, BLOCKS, token_sensitivity=False, probe_tokens=128, progress=False)
    assert not any(hat.routers[f"{i}_token"].weight.any() for i in range(4))
    hat.capacity = 0.6
    hat.lm(ids)
    before = hat.trace.site_share
    hat.routers["1_token"].bias.fill_(0.5)  # takes effect at once, at the current capacity
    hat.lm(ids)
    more = hat.trace.site_share - before
    assert (more[1, :, :, 2:].mean((1, 2)) > 0.05).all() and not more[0].any()


def test_it_fades_where_little_runs():
    hat, ids = untrained(), torch.tensor(BLOCKS[:2])
    calibrate(hat, BLOCKS, probe_tokens=128, progress=False)
    scales = []
    for capacity in (0.35, 0.5, 0.7):
        hat.capacity = capacity
        hat.lm(ids)
        scales.append(float(hat.trace.threshold_scale.log().abs().mean()))
    assert scales[0] == 0 < scales[1] < scales[2]
