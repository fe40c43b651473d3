"""Scores and policies."""

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
        router.set_threshold(threshold)
        cut = threshold / (router.column_norm * router.log_scale.exp())
        assert torch.equal(router.keep(x), x.float().abs() > cut)
        # The score divides where the cut multiplies: they may differ in the last bit of fp32.
        score = router.score(x)
        clear = (score - threshold).abs() > 1e-4 * max(abs(threshold), 1e-6)
        assert torch.equal(router.keep(x)[clear], (score > threshold)[clear])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_next_to_the_cut(dtype):
    """The numbers of a dtype on both sides of each cut are the ones that rounding could flip."""
    router = channel_router()
    router.set_threshold(0.5)
    cut = router._cut
    near = cut.to(dtype)
    for x in (near, torch.nextafter(near, torch.zeros_like(near)), torch.nextafter(near, near + 1)):
        assert torch.equal(router.keep(x[None])[0], x.float().abs() > cut)


def test_untrained_token_router_scores_zero():
    router = MoERouter(16)
    x = torch.randn(5, 16)
    assert torch.equal(router.score(x), torch.zeros(5)) and router.keep(x).all()
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
def test_an_ease_multiplies_the_thresholds_of_its_row(dtype):
    router = channel_router()
    generator = torch.Generator().manual_seed(1)
    x, threshold_scale = (
        torch.randn(64, 512, generator=generator).to(dtype),
        torch.randn(64, 1, generator=generator).exp().to(dtype),
    )
    router.set_threshold(0.5)
    score = router.score(x, threshold_scale)
    torch.testing.assert_close(score, router.score(x) / threshold_scale.float())
    # The row's cut is rounded to x's dtype.
    clear = (score / 0.5 - 1).abs() > 4 * torch.finfo(dtype).eps
    assert torch.equal(router.keep(x, threshold_scale)[clear], (score > 0.5)[clear]) and clear.float().mean() > 0.95
    assert torch.equal(router.keep(x, torch.ones(64, 1, dtype=dtype)), router.keep(x))
    alone = torch.cat([router.keep(row, e) for row, e in zip(x.split(1), threshold_scale.split(1), strict=True)])
    assert torch.equal(alone, router.keep(x, threshold_scale))
