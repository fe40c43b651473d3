"""Scores and policies."""

import numpy as np
import pytest
import torch

from hat_lib.model.policies import Random
from hat_lib.model.routers import ChannelRouter, MoERouter
from hat_lib.model.token_state import TokenState


def channel_router(width=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    router = ChannelRouter(torch.rand(width, generator=generator) + 0.1)
    with torch.no_grad():
        router.log_scale.copy_(torch.randn(width, generator=generator) * 0.3)
    return router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fast_comparison_decides_as_the_fp32_score_does(dtype):
    router = channel_router()
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    for threshold in (-torch.inf, 0.0, 0.37, 1.1):
        cut = threshold / (router.column_norm * router.log_scale.exp())
        assert torch.equal(router.keep(x, threshold), x.float().abs() > cut)
        # The score divides where the cut multiplies: they may differ in the last bit of fp32.
        score = router.score(x)
        clear = (score - threshold).abs() > 1e-4 * max(abs(threshold), 1e-6)
        assert torch.equal(router.keep(x, threshold)[clear], (score > threshold)[clear])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_next_to_the_cut(dtype):
    """The numbers of a dtype on both sides of each cut are the ones that rounding could flip."""
    router = channel_router()
    cut = router.cut(0.5)
    near = cut.to(dtype)
    for x in (near, torch.nextafter(near, torch.zeros_like(near)), torch.nextafter(near, near + 1)):
        assert torch.equal(router.keep(x[None], 0.5)[0], x.float().abs() > cut)


def test_untrained_token_router_scores_zero():
    router = MoERouter(16)
    x = torch.randn(5, 16)
    assert torch.equal(router.score(x), torch.zeros(5)) and router.keep(x, -torch.inf).all()
    with torch.no_grad():
        router.weight.copy_(torch.arange(16.0))
        router.bias.fill_(0.5)
    torch.testing.assert_close(router.score(x), x @ torch.arange(16.0) + 0.5)


def state(batch, tokens):
    position = torch.arange(tokens).expand(batch, tokens)
    real = torch.ones(batch, tokens, dtype=torch.bool)
    return TokenState(real, position, torch.zeros_like(real), [1.0], 4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_random_keeps_its_share_everywhere(share):
    keep = Random(share, seed=3)(2, "down", torch.zeros(400, 256), None, state(1, 400))
    assert abs(float(keep.float().mean()) - share) < 0.01
    for axis in (0, 1):  # no token and no channel is favoured
        assert float(keep.float().mean(axis).sub(share).abs().max()) < 0.15
    other = Random(share, seed=3)(3, "down", torch.zeros(400, 256), None, state(1, 400))
    assert float((keep != other).float().mean()) > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sensitive_token_has_lower_thresholds_alone_as_in_a_batch(dtype):
    """One fp32 path: no row flips a channel because it is alone."""
    router, token, draws = channel_router(), MoERouter(512), np.random.default_rng(1)
    with torch.no_grad():
        token.weight.copy_(torch.from_numpy(draws.normal(size=512) * 0.05))
    x = torch.from_numpy(draws.normal(size=(64, 512))).to(dtype)
    scale = token.threshold_scale(x)
    assert scale.shape == (64, 1) and scale.dtype == torch.float32 and float(scale.std()) > 0.3
    torch.testing.assert_close(scale[:, 0], (-token.score(x)).clamp(-3, 3).exp())
    score, keep = router.score(x, scale), router.keep(x, 0.5, scale)
    torch.testing.assert_close(score, router.score(x) / scale)
    clear = (score / 0.5 - 1).abs() > 1e-5
    assert torch.equal(keep[clear], (score > 0.5)[clear]) and clear.float().mean() > 0.99
    assert torch.equal(router.keep(x, 0.5, torch.ones(64, 1)), router.keep(x, 0.5))
    alone = torch.cat([router.keep(row, 0.5, token.threshold_scale(row)) for row in x.split(1)])
    assert torch.equal(alone, keep)
