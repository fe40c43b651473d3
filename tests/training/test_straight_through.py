"""Hard forward, soft backward: values and gradients worked out by hand, and against plain autograd in fp64."""

import math

import pytest
import torch

from hat_lib.training.straight_through import decoupled_gumbel_softmax, masked_channels, seeded, straight_through

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaf(values, dtype=torch.float32):
    return torch.as_tensor(values).detach().to(dtype, copy=True).requires_grad_()


def sample(logits, forward=1.0, backward=1.0, **kwargs):
    return decoupled_gumbel_softmax(logits, forward_temperature=forward, backward_temperature=backward, **kwargs)


def test_straight_through_by_hand():
    # sigmoid'(z) = s (1 - s). At T = 2 the gradient is sigmoid'(logit / 2) / 2:
    #   logit -1: s = 0.377541, s (1 - s) = 0.235004, half of it 0.117502
    #   logit  0: s = 1/2, 1/4, 1/8
    #   logit  2: s = 0.731059, 0.196612, 0.098306
    state, logit = torch.get_rng_state(), leaf([-1.0, 0.0, 2.0])
    keep = straight_through(logit, temperature=2.0)
    assert keep.tolist() == [0.0, 0.0, 1.0]
    (keep * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    torch.testing.assert_close(logit.grad, torch.tensor([0.117502, 1.25, 9.8306]), atol=1e-5, rtol=1e-5)
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn


@pytest.mark.parametrize("dtype", DTYPES)
def test_decisions_are_0_or_1_in_the_logits_dtype(dtype):
    logit = leaf(torch.linspace(-6, 6, 2000).view(50, 40), dtype)
    keep = straight_through(logit, noise=0.7, temperature=0.3, generator=seeded("cpu", 1))
    one_hot = sample(logit, generator=seeded("cpu", 14))
    for hard in (keep, one_hot):
        assert hard.dtype == dtype and hard.shape == logit.shape and set(hard.unique().tolist()) == {0.0, 1.0}
    assert (one_hot.sum(-1) == 1).all()


def test_forward_temperature_sets_the_sample_and_backward_temperature_the_gradient():
    def run(forward, backward, values=(1.0, 0.0)):
        logits = leaf(torch.tensor(values).repeat(200_000, 1))
        hard = sample(logits, forward, backward, generator=seeded("cpu", 11))
        hard[:, 0].sum().backward()
        return hard.detach(), logits.grad

    cold, gradient = run(0.5, 1.0)
    warm, same_gradient = run(2.0, 1.0)
    same_sample, other_gradient = run(0.5, 4.0)
    # P(class 0) = sigmoid(1 / tau_f): 0.8808 at 0.5, 0.6225 at 2; 4 sigma = 0.0045
    assert abs(float(cold[:, 0].mean()) - 0.8808) < 0.006 and abs(float(warm[:, 0].mean()) - 0.6225) < 0.006
    assert torch.equal(cold, same_sample) and not torch.equal(cold, warm)
    assert torch.equal(gradient, same_gradient) and not torch.equal(gradient, other_gradient)
    # The difference of two Gumbels is logistic, so at equal logits and tau_b = 2 the mean of p (1-p) / 2 is 1/12.
    _, gradient = run(1.0, 2.0, (0.0, 0.0))
    assert abs(float(gradient[:, 0].mean()) - 1 / 12) < 0.001
    # Unlike the difference of two, three Gumbels would show a wrong sign.
    hard = sample(torch.tensor([0.6, 0.3, 0.1]).log().repeat(160_000, 1), generator=seeded("cpu", 15))
    torch.testing.assert_close(hard.mean(0), torch.tensor([0.6, 0.3, 0.1]), atol=0.006, rtol=0)  # 4 sigma = 0.005


def masked(x, log_scale, threshold, temperature=1.0, protected=None):
    """`masked_channels`; by default no row is protected, and all are real."""
    protected = torch.zeros(len(x), dtype=torch.bool) if protected is None else protected
    how = {"temperature": temperature, "protected": protected, "real": torch.arange(len(x)) % 5 != 1}
    return masked_channels(x, log_scale, threshold.expand(x.shape), **how)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_channels_by_hand(temperature, dtype, autocast):
    g = seeded("cpu", 0)
    x, threshold = torch.randn(6000, 24, generator=g).to(dtype), torch.rand(6000, 24, generator=g) + 0.2
    protected, real = torch.rand(6000, generator=g) < 0.1, torch.arange(6000) % 5 != 1
    grad = torch.randn(6000, 24, generator=g).to(dtype)
    x, log_scale = leaf(x, dtype), leaf(torch.zeros(24))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, keep, share = masked(x, log_scale, threshold, temperature, protected)
        torch.autograd.backward([y, share], [grad, torch.tensor(1e5)])
    size = x.detach().double().abs()
    assert torch.equal(keep, (size > threshold) | protected[:, None])
    torch.testing.assert_close(share.detach(), keep[real].float().mean())
    assert y.dtype == x.grad.dtype == dtype and torch.equal(y, x * keep) and torch.equal(x.grad, grad * keep)
    # The derivative of sigmoid(log(r) / T) by log(r) is p (1 - p) / T.
    p = torch.sigmoid((size / threshold).log() / temperature)
    slope = (p * (1 - p) / temperature) * ~protected[:, None]
    expected = (slope * x.detach().double() * grad.double()).sum(0) + 1e5 * slope[real].sum(0) / keep[real].numel()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 3e-6
    torch.testing.assert_close(log_scale.grad.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_extremes_give_finite_gradients(temperature):
    #                 keep all, keep all but 0, drop all, ratio overflows, ratio underflows
    threshold = torch.tensor([-math.inf, 0.0, math.inf, 1e-40, 1e30])
    x, log_scale = leaf(torch.tensor([0.0, 1e-30, 5.0, -1e30])[:, None].expand(4, 5)), leaf(torch.zeros(5))
    y, keep, share = masked(x, log_scale, threshold, temperature)
    assert keep.sum(0).tolist() == [4, 3, 0, 3, 0]
    torch.autograd.backward([y, share], [torch.ones_like(y), torch.tensor(15.0)])
    assert torch.isfinite(x.grad).all() and torch.isfinite(log_scale.grad).all()
    assert log_scale.grad[2] == 0 and log_scale.grad[:2].abs().max() < 1e-2
