"""Hard forward, soft backward: values and gradients worked out by hand, and against plain autograd in fp64."""

import math

import pytest
import torch

from hat_lib.config import HatError
from hat_lib.training import straight_through as relax
from hat_lib.training.straight_through import channel_gate, decoupled_gumbel_softmax, seeded, straight_through

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaf(values, dtype=torch.float32):
    return torch.as_tensor(values).detach().to(dtype, copy=True).requires_grad_()


# --- straight_through ---


def test_straight_through_by_hand():
    # sigmoid'(z) = s (1 - s). At T = 2 the gradient is sigmoid'(logit / 2) / 2:
    #   logit -1: s = 0.377541, s (1 - s) = 0.235004, half of it 0.117502
    #   logit  0: s = 1/2, 1/4, 1/8
    #   logit  2: s = 0.731059, 0.196612, 0.098306
    logit = leaf([-1.0, 0.0, 2.0])
    keep = straight_through(logit, temperature=2.0)
    assert keep.tolist() == [0.0, 0.0, 1.0]
    (keep * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    torch.testing.assert_close(logit.grad, torch.tensor([0.117502, 1.25, 9.8306]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_decisions_are_exactly_0_or_1_in_the_logits_dtype(dtype):
    logit = leaf(torch.randn(50, 40, generator=seeded("cpu", 0)) * 3, dtype)
    keep = straight_through(logit, noise=0.7, temperature=0.3, generator=seeded("cpu", 1))
    assert keep.dtype == dtype and keep.shape == logit.shape
    assert set(keep.unique().tolist()) == {0.0, 1.0}


def test_noise_is_logistic():
    n = 200_000
    # P(logit + noise * g > 0) = sigmoid(logit / noise): sigmoid(1) = 0.7311, sigmoid(0.5) = 0.6225; 4 sigma = 0.004
    for noise, share in ((1.0, 0.7311), (2.0, 0.6225)):
        keep = straight_through(torch.ones(n), noise=noise, generator=seeded("cpu", 3))
        assert abs(float(keep.mean()) - share) < 0.005
    # At logit 0 and T = 1 the mean gradient is E[sigmoid'(g)] = integral of (p (1-p))^2 dg
    # = integral of p (1-p) dp = 1/6.
    logit = leaf(torch.zeros(n))
    straight_through(logit, noise=1.0, generator=seeded("cpu", 4)).sum().backward()
    assert abs(float(logit.grad.mean()) - 1 / 6) < 0.001
    assert float(logit.grad.min()) < 0.01 and float(logit.grad.max()) > 0.249


def test_noise_of_decision_and_gradient_is_the_same_draw():
    logit = leaf(torch.full((1000,), 3.0))
    keep = straight_through(logit, noise=2.0, temperature=0.01, generator=seeded("cpu", 5))
    keep.sum().backward()
    # At so low a temperature only logits within about 0.1 of the decision's edge get any gradient.
    u = torch.rand(1000, generator=seeded("cpu", 5))
    distance = (3 + 2 * torch.log(u / (1 - u))).abs()
    assert torch.equal(keep.detach(), (3 + 2 * torch.log(u / (1 - u)) > 0).float())
    assert (logit.grad[distance > 0.2] < 1e-6).all() and (logit.grad[distance < 0.02] > 1).all()


def test_without_noise_nothing_is_drawn():
    state, generator = torch.get_rng_state(), seeded("cpu", 7)
    before = generator.get_state()
    logit = torch.randn(20, generator=seeded("cpu", 8))
    straight_through(logit, generator=generator)
    decoupled_gumbel_softmax(
        logit.view(10, 2), forward_temperature=1.0, backward_temperature=1.0, noise=0.0, generator=generator
    )
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(before, generator.get_state())


# --- decoupled_gumbel_softmax ---


def sample(logits, forward=1.0, backward=1.0, **kwargs):
    return decoupled_gumbel_softmax(logits, forward_temperature=forward, backward_temperature=backward, **kwargs)


def test_decoupled_by_hand_without_noise():
    # tau_b = 2 on (1, 0): p = sigmoid(1/2) = 0.622459; d p_0 / d l_0 = p (1 - p) / 2 = 0.117502 = -d p_0 / d l_1
    logits = leaf([[1.0, 0.0], [0.0, 0.0]])
    hard = sample(logits, backward=2.0, noise=0.0)
    assert hard.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    hard[0, 0].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.117502, -0.117502], [0, 0]]), atol=1e-6, rtol=0)


def test_forward_temperature_sets_the_sample_and_backward_temperature_the_gradient():
    n = 100_000

    def run(forward, backward):
        logits = leaf(torch.tensor([1.0, 0.0]).repeat(n, 1))
        hard = sample(logits, forward, backward, generator=seeded("cpu", 11))
        hard[:, 0].sum().backward()
        return hard.detach(), logits.grad

    cold, gradient = run(0.5, 1.0)
    warm, same_gradient = run(2.0, 1.0)
    same_sample, other_gradient = run(0.5, 4.0)
    # P(class 0) = sigmoid(1 / tau_f): 0.8808 at 0.5, 0.6225 at 2; 4 sigma = 0.006
    assert abs(float(cold[:, 0].mean()) - 0.8808) < 0.006 and abs(float(warm[:, 0].mean()) - 0.6225) < 0.006
    assert torch.equal(cold, same_sample) and not torch.equal(cold, warm)
    assert torch.equal(gradient, same_gradient) and not torch.equal(gradient, other_gradient)


def test_decoupled_gradient_under_noise():
    # The difference of two Gumbels is logistic, so at equal logits and tau_b = 2 the mean of p (1-p) / 2 is 1/12.
    logits = leaf(torch.zeros(200_000, 2))
    sample(logits, backward=2.0, generator=seeded("cpu", 12))[:, 1].sum().backward()
    assert abs(float(logits.grad[:, 1].mean()) - 1 / 12) < 0.0005
    torch.testing.assert_close(logits.grad[:, 0], -logits.grad[:, 1])


def test_three_classes_are_sampled_by_their_softmax():
    # Unlike the difference of two, three Gumbels would show a wrong sign. 4 sigma = 0.005
    hard = sample(torch.tensor([0.6, 0.3, 0.1]).log().repeat(160_000, 1), generator=seeded("cpu", 15))
    torch.testing.assert_close(hard.mean(0), torch.tensor([0.6, 0.3, 0.1]), atol=0.005, rtol=0)


def test_the_most_extreme_draws_are_harmless(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **_: self.zero_())
    logits = leaf([[5.0, 1.0], [0.0, 2.0]])
    keep, hard = straight_through(logits, noise=1.0), sample(logits)
    (keep.sum() + hard[:, 0].sum()).backward()
    assert keep.tolist() == [[0, 0], [0, 0]] and hard.tolist() == [[1, 0], [0, 1]]
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoupled_samples_are_one_hot(dtype):
    logits = leaf(torch.randn(400, 3, generator=seeded("cpu", 13)), dtype)
    hard = sample(logits, generator=seeded("cpu", 14))
    assert hard.dtype == dtype
    assert set(hard.unique().tolist()) == {0.0, 1.0} and (hard.sum(-1) == 1).all() and (hard.sum(0) > 0).all()


# --- channel_gate ---


def test_channel_gate_by_hand():
    # r = |x| / cut = 2, 1, 1/2 at T = 1: sigmoid'(log r) = r / (1 + r)^2 = 2/9, 1/4, 2/9. A tie is not kept.
    x, log_scale = leaf([[2.0, -1.0, 0.5]]), leaf(torch.zeros(3))
    y, keep, count = channel_gate(x, log_scale, torch.ones(3), temperature=1.0)
    assert y.tolist() == [[2.0, 0.0, 0.0]]
    assert keep.dtype == torch.bool and keep.tolist() == [[True, False, False]] and not keep.requires_grad
    assert count.dtype == torch.float32 and count.tolist() == [1.0, 0.0, 0.0]
    (y * torch.tensor([1.0, 10.0, 100.0])).sum().backward(retain_graph=True)
    assert x.grad.tolist() == [[1.0, 0.0, 0.0]]
    torch.testing.assert_close(log_scale.grad, torch.tensor([2 * 2 / 9, -10 / 4, 100 * 0.5 * 2 / 9]))
    log_scale.grad = None
    (count * torch.tensor([3.0, 5.0, 7.0])).sum().backward()
    torch.testing.assert_close(log_scale.grad, torch.tensor([3 * 2 / 9, 5 / 4, 7 * 2 / 9]))


def test_channel_gate_at_another_temperature_by_hand():
    # T = 2: sigmoid'(log(r) / 2) / 2 with sqrt(r) = 2, 1, 1/2: 1/9, 1/8, 1/9
    x, log_scale = leaf([[4.0, 1.0, 0.25]]), leaf(torch.zeros(3))
    _, _, count = channel_gate(x, log_scale, torch.ones(3), temperature=2.0)
    count.sum().backward()
    torch.testing.assert_close(log_scale.grad, torch.tensor([1 / 9, 1 / 8, 1 / 9]))


def gate_case(n=600, width=24, seed=0, dtype=torch.float64):
    """x, the cut at log_scale 0, protected and counted rows, and gradients for both outputs."""
    g = seeded("cpu", seed)
    x = torch.randn(n, width, generator=g).to(dtype)
    cut = torch.rand(width, generator=g) + 0.2
    protected, counted = (torch.rand(2, n, generator=g) < torch.tensor([[0.1], [0.8]])).unbind()
    return x, cut, protected, counted, torch.randn(n, width, generator=g).to(dtype), torch.randn(width, generator=g)


def by_autograd(x, cut, temperature, protected, counted, grad, grad_count):
    """The same outputs and gradients, spelled out on full-size tensors in fp64."""
    x, cut = x.detach().double().requires_grad_(), cut.double()
    log_scale = leaf(torch.zeros(len(cut)), torch.float64)
    size = x.detach().abs()
    u = torch.log(size / cut) + log_scale  # x takes part by its size alone, without gradient
    hard = (size > cut) | protected[:, None]
    soft = torch.sigmoid(u / temperature) * ~protected[:, None]
    keep = hard + (soft - soft.detach())
    y, count = x * keep, (keep * counted[:, None]).sum(0)
    torch.autograd.backward([y, count], [grad.double(), grad_count.double()])
    return y.detach(), hard, count.detach(), x.grad, log_scale.grad


@pytest.mark.parametrize("tile", [100, 100_000])
def test_an_ease_raises_the_cut_of_its_row(tile, monkeypatch):
    """All rows at once, against each row alone with a cut of its own."""
    monkeypatch.setattr(relax, "CPU_TILE", tile)
    x, cut, protected, counted, grad, grad_count = gate_case(n=40)
    threshold_scale = torch.randn(40, 1, generator=seeded("cpu", 5)).exp().double()

    def run(x, cut, threshold_scale, *rows):
        x, log_scale = leaf(x, torch.float64), leaf(torch.zeros(len(cut)), torch.float64)
        y, keep, count = channel_gate(
            x, log_scale, cut, temperature=0.5, threshold_scale=threshold_scale, protected=rows[0], counted=rows[1]
        )
        torch.autograd.backward([y, count.double()], [rows[2], grad_count.double()])
        return y.detach(), keep, x.grad, count, log_scale.grad

    together = run(x, cut, threshold_scale, protected, counted, grad)
    rows = [part.split(1) for part in (x, threshold_scale, protected, counted, grad)]
    alone = [run(a, cut * e.view(()), None, p, c, g) for a, e, p, c, g in zip(*rows, strict=True)]
    y, keep, grad_x, count, grad_scale = zip(*alone, strict=True)
    for got, expected in zip(together, [*map(torch.cat, (y, keep, grad_x)), sum(count), sum(grad_scale)], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(HatError, match=r"threshold_scale must have the shape \[40, 1\], got \[39, 1\]"):
        channel_gate(x, torch.zeros(24), cut, temperature=0.5, threshold_scale=threshold_scale[:39])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [100, 100_000])
def test_channel_gate_against_autograd(temperature, dtype, tile, monkeypatch):
    monkeypatch.setattr(relax, "CPU_TILE", tile)
    x, cut, protected, counted, grad, grad_count = gate_case(dtype=dtype)
    expected = by_autograd(x, cut, temperature, protected, counted, grad, grad_count)
    x, log_scale = leaf(x, dtype), leaf(torch.zeros(len(cut)))
    y, keep, count = channel_gate(x, log_scale, cut, temperature=temperature, protected=protected, counted=counted)
    torch.autograd.backward([y, count], [grad, grad_count])
    assert y.dtype == x.grad.dtype == dtype and log_scale.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected[0], rtol=0, atol=0)
    assert torch.equal(keep, expected[1]) and torch.equal(count.double(), expected[2])
    torch.testing.assert_close(x.grad.double(), expected[3], rtol=0, atol=0)
    # Worked out in fp32 even from bfloat16: an error of 1e-6 of the largest, where bfloat16 sums would make 1e-3.
    tolerance = 1e-6 * float(expected[4].abs().max())
    torch.testing.assert_close(log_scale.grad.double(), expected[4], rtol=0, atol=tolerance)


def test_log_scale_gradient_is_the_slope_of_the_soft_count():
    """A finite difference through the cut itself, threshold / exp(log_scale), so that the sign is tested too."""
    x, threshold, *_ = gate_case()
    temperature, step = 0.7, 1e-5

    def soft_count(shift):
        return torch.sigmoid(torch.log(x.abs() / (threshold.double() / math.exp(shift))) / temperature).sum(0)

    log_scale = leaf(torch.zeros(len(threshold)))
    channel_gate(x, log_scale, threshold, temperature=temperature)[2].sum().backward()
    slope = (soft_count(step) - soft_count(-step)) / (2 * step)
    assert (slope > 1).all()
    torch.testing.assert_close(log_scale.grad.double(), slope, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_comparison_in_x_dtype_decides_as_fp32_does(dtype):
    cut = torch.rand(2000, generator=seeded("cpu", 2)) * 3
    near = cut.to(dtype)
    below, above = (torch.nextafter(near, torch.full_like(near, s * math.inf)) for s in (-1, 1))
    x = torch.stack([near, below, above, -near, -below, -above])
    _, keep, _ = channel_gate(x, torch.zeros(2000), cut, temperature=1.0)
    assert torch.equal(keep, x.float().abs() > cut)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_extremes_give_finite_gradients(temperature):
    inf, tiny = math.inf, 1e-40
    #      cut: keep all, keep all but 0, drop all, ratio overflows, ratio underflows
    cut = torch.tensor([-inf, 0.0, inf, tiny, 1e30])
    x, log_scale = leaf(torch.tensor([0.0, 1e-30, 5.0, -1e30])[:, None].expand(4, 5)), leaf(torch.zeros(5))
    y, keep, count = channel_gate(x, log_scale, cut, temperature=temperature)
    assert keep.sum(0).tolist() == [4, 3, 0, 3, 0]
    torch.autograd.backward([y, count], [torch.ones_like(y), torch.ones(5)])
    assert torch.isfinite(x.grad).all() and torch.isfinite(log_scale.grad).all()
    assert log_scale.grad[:3].tolist() == [0.0, 0.0, 0.0]


def test_protected_rows_keep_everything_and_teach_nothing():
    x, cut, protected, _, grad, grad_count = gate_case(dtype=torch.float32)

    def scale_gradient(x, grad):
        log_scale = leaf(torch.zeros(len(cut)))
        y, keep, count = channel_gate(x, log_scale, cut, temperature=1.0, protected=protected)
        assert keep[protected].all() and torch.equal(y[protected], x[protected])
        torch.autograd.backward([y, count], [grad, grad_count])
        return log_scale.grad

    other = torch.where(protected[:, None], 7 * x + 1, x), torch.where(protected[:, None], grad - 3, grad)
    assert protected.any() and torch.equal(scale_gradient(x, grad), scale_gradient(*other))


def test_every_row_is_counted_once():
    """More rows than a byte can count."""
    x, cut, *_ = gate_case(n=1000, dtype=torch.float32)
    _, keep, count = channel_gate(x, torch.zeros(len(cut)), cut, temperature=1.0)
    assert torch.equal(count, keep.double().sum(0).float()) and float(count.max()) > 255


def test_channel_gate_keeps_only_x_and_a_byte_per_element_for_the_backward():
    x, cut, protected, counted, *_ = gate_case(dtype=torch.bfloat16)
    x, saved = leaf(x, x.dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        channel_gate(x, leaf(torch.zeros(24)), cut, temperature=1.0, protected=protected, counted=counted)
    assert sum(saved) == 600 * 24 * (2 + 1) + 24 * 4 + 2 * 600


def test_channel_gate_gives_only_the_gradients_that_are_asked_for():
    x, cut, _, _, grad, _ = gate_case(dtype=torch.float32)
    frozen = leaf(x)
    channel_gate(frozen, torch.zeros(24), cut, temperature=1.0)[0].backward(grad)
    torch.testing.assert_close(frozen.grad, grad * (x.abs() > cut))
    log_scale = leaf(torch.zeros(24))
    channel_gate(x, log_scale, cut, temperature=1.0)[0].backward(grad)
    assert float(log_scale.grad.abs().min()) > 0
    unused, log_scale = leaf(x), leaf(torch.zeros(24))
    channel_gate(unused, log_scale, cut, temperature=1.0)[2].sum().backward()
    assert float(unused.grad.abs().max()) == 0 and float(log_scale.grad.min()) > 0


def test_autocast_changes_nothing():
    x, cut, protected, counted, grad, grad_count = gate_case(dtype=torch.float32)
    results = []
    for enabled in (False, True):
        log_scale = leaf(torch.zeros(24))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _, count = channel_gate(x, log_scale, cut, temperature=1.0, protected=protected, counted=counted)
            torch.autograd.backward([y, count], [grad, grad_count])
        results.append((y, count, log_scale.grad))
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype and torch.equal(plain, cast)


def test_no_rows():
    x, log_scale = leaf(torch.zeros(0, 5)), leaf(torch.zeros(5))
    y, keep, count = channel_gate(x, log_scale, torch.ones(5), temperature=1.0)
    (y.sum() + count.sum()).backward()
    assert keep.shape == (0, 5) and count.tolist() == [0.0] * 5 and log_scale.grad.tolist() == [0.0] * 5


# --- seeded ---


def test_a_key_always_gives_the_same_generator():
    # The first eight bytes of SHA-256("1,2,3"), little-endian.
    assert seeded("cpu", 1, 2, 3).initial_seed() == 2959428052538452618
    draws = [torch.rand(3, generator=seeded("cpu", *key)).tolist() for key in [(1, 2, 3), (1, 2, 3), (1, 2, 4)]]
    assert draws[0] == draws[1] != draws[2]


def test_keys_that_differ_give_different_generators():
    keys = [(0,), (1,), (-1,), (12,), (123,), (1, 23), (12, 3), (2, 1), (1, 2), (1, 0), (2**70,)]
    assert len({seeded("cpu", *key).initial_seed() for key in keys}) == len(keys)


# --- bad input ---


def gate(**changes):
    arguments = {"x": torch.zeros(2, 3), "log_scale": torch.zeros(3), "cut": torch.zeros(3), "temperature": 1.0}
    return channel_gate(**arguments | changes)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: straight_through(torch.zeros(2), temperature=0.0), "temperature"),
        (lambda: straight_through(torch.zeros(2), noise=-1.0), "noise"),
        (lambda: sample(torch.zeros(1, 2), forward=-1.0), "forward_temperature"),
        (lambda: sample(torch.zeros(1, 2), backward=math.nan), "backward_temperature"),
        (lambda: sample(torch.zeros(1, 2), noise=math.inf), "noise"),
        (lambda: gate(temperature=math.inf), "temperature"),
        (lambda: gate(x=torch.zeros(1, 2, 3)), r"\[1, 2, 3\]"),
        (lambda: gate(log_scale=torch.zeros(2)), r"\[2\]"),
        (lambda: gate(protected=torch.ones(3, dtype=torch.bool)), r"protected must be bool \[2\]"),
        (lambda: gate(counted=torch.ones(2, dtype=torch.int64)), "counted must be bool.*int64"),
        (lambda: seeded("cpu"), "whole number"),
        (lambda: seeded("cpu", 1.5), "1.5"),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(HatError, match=names):
        call()
