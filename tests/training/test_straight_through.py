"""Hard forward, soft backward: values and gradients worked out by hand, and against plain autograd in fp64."""

import math

import pytest
import torch

from hat_lib.training import straight_through as module
from hat_lib.training.straight_through import channel_gate, decoupled_gumbel_softmax, seeded, straight_through

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaf(values, dtype=torch.float32):
    return torch.as_tensor(values).detach().to(dtype, copy=True).requires_grad_()


def sample(logits, forward=1.0, backward=1.0, **kwargs):
    return decoupled_gumbel_softmax(logits, forward_temperature=forward, backward_temperature=backward, **kwargs)


def gate(x, log_scale, cut, temperature=1.0, **rows):
    """`channel_gate`; by default every row counts and none is protected."""
    every = torch.ones(len(x), dtype=torch.bool)
    rows = {"threshold_scale": torch.ones(len(x), 1), "protected": ~every, "counted": every} | rows
    return channel_gate(x, log_scale, cut, temperature=temperature, **rows)


# Token router and exit gate


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
def test_decisions_are_exactly_0_or_1_in_the_logits_dtype(dtype):
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
    torch.testing.assert_close(gradient[:, 0], -gradient[:, 1])
    # Unlike the difference of two, three Gumbels would show a wrong sign.
    hard = sample(torch.tensor([0.6, 0.3, 0.1]).log().repeat(160_000, 1), generator=seeded("cpu", 15))
    torch.testing.assert_close(hard.mean(0), torch.tensor([0.6, 0.3, 0.1]), atol=0.006, rtol=0)  # 4 sigma = 0.005


def test_the_most_extreme_draws_are_harmless(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **_: self.zero_())
    logits = leaf([[5.0, 1.0], [0.0, 2.0]])
    keep, hard = straight_through(logits, noise=1.0), sample(logits)
    (keep.sum() + hard[:, 0].sum()).backward()
    assert keep.tolist() == [[0, 0], [0, 0]] and hard.tolist() == [[1, 0], [0, 1]]
    assert torch.isfinite(logits.grad).all()


# Channel router


def gate_case(n=600, width=24, seed=0, dtype=torch.float64):
    """x, the cut at log_scale 0, protected and counted rows, and gradients for both outputs."""
    g = seeded("cpu", seed)
    x = torch.randn(n, width, generator=g).to(dtype)
    cut = torch.rand(width, generator=g) + 0.2
    protected, counted = (torch.rand(2, n, generator=g) < torch.tensor([[0.1], [0.8]])).unbind()
    return x, cut, protected, counted, torch.randn(n, width, generator=g).to(dtype), torch.randn(width, generator=g)


def by_autograd(x, cut, temperature, protected, counted, grad, grad_count):
    """The same outputs and gradients, computed explicitly on full-size tensors in fp64."""
    x, cut = x.detach().double().requires_grad_(), cut.double()
    log_scale = leaf(torch.zeros(cut.shape[-1]), torch.float64)
    size = x.detach().abs()
    u = torch.log(size / cut) + log_scale  # only the size of x matters here, without gradient
    hard = (size > cut) | protected[:, None]
    soft = torch.sigmoid(u / temperature) * ~protected[:, None]
    keep = hard + (soft - soft.detach())
    y, count = x * keep, (keep * counted[:, None]).sum(0)
    torch.autograd.backward([y, count], [grad.double(), grad_count.double()])
    return y.detach(), hard, count.detach(), x.grad, log_scale.grad


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [100, 100_000])
def test_channel_gate_against_autograd(temperature, dtype, tile, scaled, monkeypatch):
    """With and without a scale on each row's thresholds."""
    monkeypatch.setattr(module, "CPU_TILE", tile)
    x, cut, protected, counted, grad, grad_count = gate_case(dtype=dtype)
    scale = torch.randn(len(x), 1, generator=seeded("cpu", 5)).exp() if scaled else torch.ones(len(x), 1)
    expected = by_autograd(x, cut * scale, temperature, protected, counted, grad, grad_count)
    x, log_scale = leaf(x, dtype), leaf(torch.zeros(len(cut)))
    rows = {"threshold_scale": scale, "protected": protected, "counted": counted}
    y, keep, count = gate(x, log_scale, cut, temperature=temperature, **rows)
    torch.autograd.backward([y, count], [grad, grad_count])
    assert y.dtype == x.grad.dtype == dtype and log_scale.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected[0], rtol=0, atol=0)
    assert torch.equal(keep, expected[1]) and torch.equal(count.double(), expected[2])
    torch.testing.assert_close(x.grad.double(), expected[3], rtol=0, atol=0)
    # Computed in fp32 even from bfloat16: an error of 1e-6 of the largest, where bfloat16 sums would give 1e-3.
    tolerance = 2e-6 * float(expected[4].abs().max())
    torch.testing.assert_close(log_scale.grad.double(), expected[4], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_comparison_is_in_fp32_whatever_the_dtype_of_x(dtype):
    cut = torch.rand(2000, generator=seeded("cpu", 2)) * 3
    near = cut.to(dtype)
    below, above = (torch.nextafter(near, torch.full_like(near, s * math.inf)) for s in (-1, 1))
    x = torch.stack([near, below, above, -near, -below, -above])
    _, keep, _ = gate(x, torch.zeros(2000), cut)
    assert torch.equal(keep, x.float().abs() > cut)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_extremes_give_finite_gradients(temperature):
    inf, tiny = math.inf, 1e-40
    #      cut: keep all, keep all but 0, drop all, ratio overflows, ratio underflows
    cut = torch.tensor([-inf, 0.0, inf, tiny, 1e30])
    x, log_scale = leaf(torch.tensor([0.0, 1e-30, 5.0, -1e30])[:, None].expand(4, 5)), leaf(torch.zeros(5))
    y, keep, count = gate(x, log_scale, cut, temperature=temperature)
    assert keep.sum(0).tolist() == [4, 3, 0, 3, 0]
    torch.autograd.backward([y, count], [torch.ones_like(y), torch.ones(5)])
    assert torch.isfinite(x.grad).all() and torch.isfinite(log_scale.grad).all()
    assert log_scale.grad[:3].tolist() == [0.0, 0.0, 0.0]


def test_no_row_is_fine():
    x, log_scale = leaf(torch.zeros(0, 5)), leaf(torch.zeros(5))
    y, keep, count = gate(x, log_scale, torch.ones(5))
    (y.sum() + count.sum()).backward()
    assert keep.shape == (0, 5) and count.tolist() == [0.0] * 5 and log_scale.grad.tolist() == [0.0] * 5


def test_channel_gate_keeps_only_x_and_a_byte_per_element_and_gives_only_the_gradients_that_are_asked_for():
    x, cut, protected, counted, grad, _ = gate_case(dtype=torch.bfloat16)
    x, saved = leaf(x, x.dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        gate(x, leaf(torch.zeros(24)), cut, protected=protected, counted=counted)
    assert sum(saved) == 600 * 24 * (2 + 1) + 24 * 4 + (2 + 4) * 600
    gate(x, torch.zeros(24), cut)[0].backward(grad)  # no gradient of log_scale
    torch.testing.assert_close(x.grad, grad * (x.abs() > cut))
    unused, log_scale = leaf(x), leaf(torch.zeros(24))
    gate(unused, log_scale, cut)[2].sum().backward()  # through the count alone
    assert float(unused.grad.abs().max()) == 0 and float(log_scale.grad.min()) > 0


def test_autocast_changes_nothing():
    x, cut, protected, counted, grad, grad_count = gate_case(dtype=torch.float32)
    results = []
    for enabled in (False, True):
        log_scale = leaf(torch.zeros(24))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _, count = gate(x, log_scale, cut, protected=protected, counted=counted)
            torch.autograd.backward([y, count], [grad, grad_count])
        results.append((y, count, log_scale.grad))
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype and torch.equal(plain, cast)


# Generators


def test_a_key_always_gives_the_same_generator_and_another_key_another():
    # The first eight bytes of SHA-256("1,2,3"), little-endian.
    assert seeded("cpu", 1, 2, 3).initial_seed() == 2959428052538452618
    keys = [(0,), (1,), (-1,), (12,), (123,), (1, 23), (12, 3), (2, 1), (1, 2), (1, 0), (2**70,)]
    assert len({seeded("cpu", *key).initial_seed() for key in keys}) == len(keys)
