"""Each loss against a value worked out by hand, its gradient, and what it must not depend on."""

import math

import pytest
import torch
import torch.nn.functional as F

from hat_lib.config import HatError
from hat_lib.training import losses
from hat_lib.training.losses import budget, distillation, divergence, entropy, exit_loss, exit_targets, z_loss

LOG3 = math.log(3)


def leaf(values, dtype=torch.float32):
    return torch.as_tensor(values).detach().to(dtype, copy=True).requires_grad_()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=tolerance, rtol=0)


# --- distillation ---


def test_distillation_by_hand():
    # Token 1: p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.304099 - 0.173287 = 0.130812.
    # Token 2: p = q, KL = 0. Mean over the two 0.065406; gradient (q - p) / 2.
    teacher, student = torch.tensor([[LOG3, 0.0], [1.0, 2.0]]), leaf([[0.0, 0.0], [1.0, 2.0]])
    loss = distillation(teacher, student)
    close(loss.detach(), 0.065406)
    (3 * loss).backward()
    close(student.grad, [[-0.375, 0.375], [0, 0]])


@pytest.mark.parametrize("masked", [False, True])
def test_distillation_gradcheck(masked, monkeypatch):
    monkeypatch.setattr(losses, "CPU_TILE", 10)  # several tiles, the last one shorter
    teacher = normal(3, 3, 5, dtype=torch.float64)
    student = leaf(normal(3, 3, 5, seed=1), torch.float64)
    mask = normal(3, 3, seed=2) > 0 if masked else None
    assert distillation(teacher, student, mask).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda s: distillation(teacher, s, mask), student)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_distillation_is_kl_div(dtype, tolerance):
    teacher, student = 3 * normal(2, 7, 300), leaf(3 * normal(2, 7, 300, seed=1), dtype)
    reference = leaf(student)
    p, q = F.log_softmax(teacher.view(14, 300), -1), F.log_softmax(reference.view(14, 300), -1)
    expected = F.kl_div(q, p, log_target=True, reduction="batchmean")
    loss = distillation(teacher, student)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    error = (student.grad.float() - reference.grad).abs()
    assert (error <= tolerance * reference.grad.abs() + 1e-6).all()


def test_distillation_from_itself_is_exactly_zero_and_ignores_a_shift():
    teacher, student = 5 * normal(20, 100), 5 * normal(20, 100, seed=1)
    assert float(distillation(teacher, teacher)) == 0
    shift = 30 * normal(20, 1, seed=2)
    torch.testing.assert_close(distillation(teacher, student + shift), distillation(teacher, student))
    torch.testing.assert_close(distillation(teacher - shift, student), distillation(teacher, student))


def test_divergence_of_each_token():
    # The test above; the other way, 1/2 log(2/3) + 1/2 log 2 = 0.143841; a masked token that is not even read.
    teacher = torch.tensor([[[LOG3, 0.0], [0.0, 0.0], [math.nan, 0.0]]])
    student = leaf([[[0.0, 0.0], [LOG3, 0.0], [math.nan, 0.0]]])
    each = divergence(teacher, student, torch.tensor([True, True, False]))
    close(each.detach(), [[0.130812, 0.143841, 0.0]])
    each.backward(torch.tensor([[1.0, 10.0, 100.0]]))
    close(student.grad, [[[-0.25, 0.25], [2.5, -2.5], [0.0, 0.0]]])
    close(divergence(teacher[0, 0], student[0, 0]).detach(), 0.130812)


def test_distillation_gives_the_teacher_nothing_and_can_be_walked_twice():
    teacher, student = leaf(normal(4, 9)), leaf(normal(4, 9, seed=1))
    loss = distillation(teacher, student)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * once)


def test_small_gradients_survive_in_fp16_under_a_loss_scale():
    # q - p is about 1.1e-5 and 1000 tokens share it: 1.1e-8, below fp16's least number, but not once scaled by 2^16.
    teacher, student = torch.tensor([0.0, -11.0]).expand(1000, 2), torch.tensor([0.0, -10.5]).expand(1000, 2)
    student = leaf(student, torch.float16)
    (2**16 * distillation(teacher, student)).backward()
    expected = 2**16 / 1000 * (1 / (1 + math.exp(10.5)) - 1 / (1 + math.exp(11.0)))
    torch.testing.assert_close(student.grad[:, 1].float(), torch.full((1000,), expected), rtol=2e-2, atol=0)


# --- budget ---


@pytest.mark.parametrize(("share", "value", "slope"), [(0.75, 0.25, 1.0), (0.25, 0.25, -1.0), (0.5, 0.0, 0.0)])
def test_budget(share, value, slope):
    share = leaf(share)
    loss = budget(share, 0.5)
    loss.backward()
    close(loss.detach(), value)
    assert float(share.grad) == slope


# --- z-loss and entropy ---


def test_z_loss_by_hand():
    # s = 0: log 2 = 0.693147, squared 0.480453.  s = 2: log(e + 1/e) = log 3.086161 = 1.126928, squared 1.269967.
    close(z_loss(torch.tensor([0.0])), 0.480453)
    close(z_loss(torch.tensor([2.0])), 1.269967)
    close(z_loss(torch.tensor([[0.0], [2.0]])), (0.480453 + 1.269967) / 2)


def test_z_loss_favours_neither_decision():
    scores = leaf([-3.0, 3.0, 0.0, -1e4, 1e4])
    z_loss(scores).backward()
    left, right, middle, far_left, far_right = scores.grad.tolist()
    assert left == -right < 0 and middle == 0 and far_left == -far_right
    # At large |s| the loss is (s / 2)^2, its slope s / 2, and a mean over five.
    assert far_right == pytest.approx(1e4 / 2 / 5)


def test_entropy_by_hand():
    # s = 0: log 2.  s = log 3: p = 3/4, H = 3/4 log(4/3) + 1/4 log 4 = 0.215762 + 0.346574 = 0.562335, and for -s too.
    close(entropy(torch.tensor([0.0])), math.log(2))
    close(entropy(torch.tensor([LOG3])), 0.562335)
    close(entropy(torch.tensor([-LOG3, 0.0])), (0.562335 + 0.693147) / 2)


def test_entropy_of_a_sure_decision_is_zero():
    scores = leaf([-1e4, 1e4, -90.0, 0.0])
    entropy(scores).backward()
    close(entropy(scores).detach(), math.log(2) / 4)
    close(scores.grad, [0, 0, 0, 0])


@pytest.mark.parametrize("loss", [z_loss, entropy])
def test_score_losses_gradcheck(loss):
    scores = leaf(4 * normal(3, 5), torch.float64)
    mask = normal(3, 5, seed=1) > 0
    assert loss(scores).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda s: loss(s, mask), scores)


# --- exit gates ---


def test_exit_targets():
    teacher = torch.tensor([[[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]])
    exited = torch.tensor([[[9.0, 9.5, 9.4], [0.0, 0.1, 0.0]]])
    assert exit_targets(teacher, exited.bfloat16()).tolist() == [[True, False]]


def test_exit_loss_by_hand():
    # (0, log 3) to leave: -log(3/4) = 0.287682.  (0, 0) to stay: log 2 = 0.693147.  Mean 0.490415.
    # Gradient: (p - target) / tokens, with p of leaving 3/4 and 1/2.
    logits, targets = leaf([[0.0, LOG3], [0.0, 0.0]]), torch.tensor([True, False])
    loss = exit_loss(logits, targets)
    close(loss.detach(), 0.490415)
    loss.backward()
    close(logits.grad, [[0.125, -0.125], [-0.25, 0.25]])


# --- masks and dtypes, for every loss over tokens ---

SHAPE = (2, 6)
TARGETS = normal(*SHAPE, seed=9) > 0
PER_TOKEN = {
    "distillation": ((11,), lambda x, mask=None: distillation(normal(*x.shape, seed=5), x, mask)),
    "z_loss": ((), z_loss),
    "entropy": ((), entropy),
    "exit_loss": ((2,), lambda x, mask=None: exit_loss(x, TARGETS[..., : x.shape[1]], mask)),
}
every_loss = pytest.mark.parametrize(("tail", "loss"), PER_TOKEN.values(), ids=PER_TOKEN)


@every_loss
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_a_masked_token_never_matters(tail, loss, junk):
    clean = leaf(normal(*SHAPE, *tail))
    mask = normal(*SHAPE, seed=3) > 0
    dirty = leaf(torch.where(mask[(...,) + (None,) * len(tail)], clean, junk))
    (clean_loss, dirty_loss) = loss(clean, mask), loss(dirty, mask)
    clean_loss.backward()
    dirty_loss.backward()
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(clean_loss, dirty_loss) and torch.equal(clean.grad, dirty.grad)
    assert (dirty.grad[~mask] == 0).all() and (dirty.grad[mask] != 0).any()


@every_loss
def test_the_mean_is_over_the_mask(tail, loss):
    x = normal(*SHAPE, *tail)
    first = torch.arange(6).expand(SHAPE) < 3
    shorter = torch.where(first[(...,) + (None,) * len(tail)], x, 100.0)
    assert float(loss(x, torch.ones(SHAPE, dtype=torch.bool))) == pytest.approx(float(loss(x)), rel=1e-6)
    one_by_one = [loss(shorter, first & (torch.arange(12).view(SHAPE) == i)) for i in (0, 1, 2, 6, 7, 8)]
    torch.testing.assert_close(loss(shorter, first), torch.stack(one_by_one).mean())


@every_loss
def test_an_empty_mask_gives_zero_with_gradient(tail, loss):
    x = leaf(normal(*SHAPE, *tail))
    value = loss(x, torch.zeros(SHAPE, dtype=torch.bool))
    value.backward()
    assert value.item() == 0 and torch.equal(x.grad, torch.zeros_like(x))


@every_loss
def test_half_precision_is_computed_in_fp32(tail, loss):
    x = normal(*SHAPE, *tail, dtype=torch.bfloat16)
    half, full = leaf(x, torch.bfloat16), leaf(x)
    torch.testing.assert_close(loss(half), loss(full), rtol=1e-6, atol=0)
    loss(half).backward()
    assert loss(half).dtype == torch.float32 and half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("loss", [z_loss, entropy])
def test_a_mask_of_the_last_axes_is_for_all_layers(loss):
    x, mask = normal(4, *SHAPE), normal(*SHAPE, seed=3) > 0
    torch.testing.assert_close(loss(x, mask), torch.stack([loss(layer, mask) for layer in x]).mean())


@every_loss
@pytest.mark.parametrize("mask", [torch.ones(SHAPE, dtype=torch.int64), torch.ones(6, 2, dtype=torch.bool)])
def test_a_mask_of_another_kind_is_refused(tail, loss, mask):
    with pytest.raises(HatError, match=r"mask must be bool \[2, 6\], got torch\.\w+ \[\d, \d\]"):
        loss(normal(*SHAPE, *tail), mask)


# --- bad input ---


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: distillation(torch.zeros(2, 3), torch.zeros(2, 4)), r"\[2, 3\] and \[2, 4\]"),
        (lambda: exit_targets(torch.zeros(2, 3), torch.zeros(3, 3)), r"\[2, 3\] and \[3, 3\]"),
        (lambda: budget(torch.zeros(3), 0.5), r"global mean, got shape \[3\]"),
        (lambda: exit_loss(torch.zeros(3, 2), torch.zeros(3)), "bool targets.*float32"),
        (lambda: exit_loss(torch.zeros(3, 1), torch.zeros(3, dtype=torch.bool)), r"got \[3, 1\]"),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(HatError, match=names):
        call()
