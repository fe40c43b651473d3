"""Scores of routers and gates, and the shares of a state."""

import pytest
import torch

from hat_lib.method.routers import ChannelRouter, ExitGate, MoERouter
from hat_lib.method.trace import Trace

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


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_untrained_router_and_gate():
    router, gate, x = MoERouter(16), ExitGate(16, rank=2), torch.randn(5, 16)
    assert torch.equal(router.score(x), torch.zeros(5)) and router.keep(x, -torch.inf).all()
    assert torch.equal(gate.score(x), torch.zeros(5)) and torch.equal(gate.translate(x), x)
    assert torch.equal(ExitGate(16, rank=0).translate(x), x)
    router.weight.copy_(torch.arange(16.0))
    router.bias.fill_(0.5)
    torch.testing.assert_close(router.score(x), x @ torch.arange(16.0) + 0.5)


def test_token_state_share():
    real = torch.tensor([[False, True, True], [True, True, True]])
    places, shapes = (real, real.long().cumsum(1) - 1, torch.zeros_like(real)), {"a": (2,), "b": (2,)}
    state = Trace(*places, [0.25, 0.75], n_layers=2, mask_shapes=shapes)
    state.note(0, "a", None, 6)
    state.note(0, "b", torch.tensor([[True, False]]).repeat(6, 1), 6)
    state.leave(torch.tensor([5]), 1)  # the last token of row 1, after one layer
    state.note(1, "a", torch.tensor([[True, True]] * 5), 5)
    state.note(1, "b", torch.tensor([[True, True]] * 4 + [[False, False]]), 5)
    share = state.share
    torch.testing.assert_close(share[0], torch.where(real, 0.625, 0.0))
    torch.testing.assert_close(share[1], torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.25, 0.0]]))
    assert state.capacity == pytest.approx((5 * 0.625 + 3 + 0.25) / 9) and state.exit_rate == pytest.approx(1 / 5)
