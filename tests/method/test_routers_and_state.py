"""The score of a channel router, and what it keeps."""

import pytest
import torch

from hat_lib.method.routers import ChannelRouter, MoERouter

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channel_router(dtype):
    """``keep`` is ``score > threshold``, compared in fp32; no row flips a channel because it is alone."""
    torch.manual_seed(0)
    router, token, x = ChannelRouter(torch.rand(512) + 0.1), MoERouter(512), torch.randn(64, 512).to(dtype)
    router.log_scale.normal_(0, 0.3)
    token.weight.normal_(0, 0.05)
    scale = token.threshold_scale(x)
    assert scale.shape == (64, 1) and scale.dtype == torch.float32 and float(scale.std()) > 0.3
    torch.testing.assert_close(scale[:, 0], (-token.score(x)).clamp(-3, 3).exp())
    for threshold in (-torch.inf, 0.0, 0.37, 1.1):
        for factor in (None, scale):
            score, keep = router.score(x, factor), router.keep(x, threshold, factor)
            clear = (score - threshold).abs() > 1e-4 * max(abs(threshold), 1e-6)  # else they may differ by rounding
            assert torch.equal(keep[clear], (score > threshold)[clear])
    alone = torch.cat([router.keep(row, 0.5, token.threshold_scale(row)) for row in x.split(1)])
    assert torch.equal(alone, router.keep(x, 0.5, scale))
    near = router.channel_thresholds(0.5).to(dtype)  # the numbers on both sides, which rounding could flip
    for x in (near, torch.nextafter(near, torch.zeros_like(near)), torch.nextafter(near, near + 1)):
        assert torch.equal(router.keep(x[None], 0.5)[0], x.float().abs() > router.channel_thresholds(0.5))
