"""Losses and hard decisions: values worked out by hand, gradients by hand, finite differences and autograd in fp64."""

import math

import pytest
import torch

from hat_lib.training import losses
from hat_lib.training.losses import divergence, entropy, exit_loss, mean, seeded, straight_through, z_loss

LOG3 = math.log(3)


def leaf(values, dtype=torch.float32):
    return torch.as_tensor(values).detach().to(dtype, copy=True).requires_grad_()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=tolerance, rtol=0)


def test_values_by_hand():
    # Token 1: p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.304099 - 0.173287 = 0.130812.
    # Token 2, the other way round: 1/2 log(2/3) + 1/2 log 2 = 0.143841.
    teacher, student = torch.tensor([[[LOG3, 0.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [LOG3, 0.0]]])
    close(divergence(teacher, student), [[0.130812, 0.143841]])
    close(divergence(teacher[0, 0], student[0, 0]), 0.130812)
    close(mean(divergence(teacher, student)), (0.130812 + 0.143841) / 2)
    # s = 0: log 2 = 0.693147, squared 0.480453.  s = 2: log(e + 1/e) = log 3.086161 = 1.126928, squared 1.269967.
    close(z_loss(torch.tensor([[0.0], [2.0]])), (0.480453 + 1.269967) / 2)
    # s = 0: log 2.  s = log 3: p = 3/4, H = 3/4 log(4/3) + 1/4 log 4 = 0.215762 + 0.346574 = 0.562335, and for -s too.
    close(entropy(torch.tensor([LOG3])), 0.562335)
    close(entropy(torch.tensor([-LOG3, 0.0])), (0.562335 + 0.693147) / 2)
    # (0, log 3) to leave: -log(3/4) = 0.287682.  (0, 0) to stay: log 2 = 0.693147.
    close(exit_loss(torch.tensor([[0.0, LOG3], [0.0, 0.0]]), torch.tensor([True, False])), (0.287682 + 0.693147) / 2)


def weights(x):
    """Another gradient for each token."""
    return torch.arange(x[..., 0].numel()).view(x.shape[:-1])


TARGETS = normal(3, 4, seed=9) > 0
PER_TOKEN = {
    "divergence": ((11,), lambda x: mean(weights(x) * divergence(normal(*x.shape, seed=5, dtype=torch.float64), x))),
    "z_loss": ((), z_loss),
    "entropy": ((), entropy),
    "exit_loss": ((2,), lambda x: exit_loss(x, TARGETS[: len(x)])),
}


@pytest.mark.parametrize(("tail", "loss"), PER_TOKEN.values(), ids=PER_TOKEN)
def test_gradcheck_half_precision_and_no_tokens(tail, loss):
    x = leaf(4 * normal(3, 4, *tail, seed=1), torch.float64)
    assert loss(x).dtype == torch.float64 and torch.autograd.gradcheck(loss, x)
    none = leaf(torch.zeros(0, 4, *tail), torch.float64)
    value = loss(none)
    value.backward()
    assert value.item() == 0 and none.grad.shape == none.shape
    half = leaf(x, torch.bfloat16)
    torch.testing.assert_close(loss(half), loss(leaf(half)), rtol=1e-6, atol=0)
    loss(half).backward()
    assert loss(half).dtype == torch.float32 and half.grad.dtype == torch.bfloat16


# Hard forward, soft backward


def sample(logits, forward=1.0, backward=1.0, **kwargs):
    temperatures = {"forward_temperature": forward, "backward_temperature": backward}
    return losses.decoupled_gumbel_softmax(logits, **temperatures, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_by_hand(dtype):
    # sigmoid'(z) = s (1 - s). At T = 2 the gradient is sigmoid'(logit / 2) / 2:
    #   logit -1: s = 0.377541, s (1 - s) = 0.235004, half of it 0.117502
    #   logit  0: s = 1/2, 1/4, 1/8
    #   logit  2: s = 0.731059, 0.196612, 0.098306
    state, logit = torch.get_rng_state(), leaf([-1.0, 0.0, 2.0], dtype)
    keep = straight_through(logit, temperature=2.0)
    assert keep.tolist() == [0.0, 0.0, 1.0] and keep.dtype == dtype
    (keep * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    tolerance = {"atol": 0, "rtol": 1e-5 if dtype == torch.float32 else 1e-2}
    torch.testing.assert_close(logit.grad.float(), torch.tensor([0.117502, 1.25, 9.8306]), **tolerance)
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn


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
    return losses.masked_channels(x, log_scale, threshold.expand(x.shape), **how)


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
