"""Each loss against a value worked out by hand, with its gradient."""

import math

import pytest
import torch

from hat_lib.training.losses import distillation, divergence, entropy, exit_loss, exit_targets, z_loss

LOG3 = math.log(3)


def leaf(values, dtype=torch.float32):
    return torch.as_tensor(values).detach().to(dtype, copy=True).requires_grad_()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=tolerance, rtol=0)


def test_divergence_and_distillation_by_hand():
    # Token 1: p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.304099 - 0.173287 = 0.130812.
    # Token 2, the other way round: 1/2 log(2/3) + 1/2 log 2 = 0.143841.
    teacher, student = leaf([[[LOG3, 0.0], [0.0, 0.0]]]), leaf([[[0.0, 0.0], [LOG3, 0.0]]])
    each = divergence(teacher, student)
    close(each.detach(), [[0.130812, 0.143841]])
    close(divergence(teacher[0, 0], student[0, 0]).detach(), 0.130812)
    each.backward(torch.tensor([[2.0, 20.0]]))
    close(student.grad, [[[-0.5, 0.5], [5.0, -5.0]]])
    student.grad = None
    loss = distillation(teacher, student)  # the mean; its gradient is (q - p) / 2
    close(loss.detach(), (0.130812 + 0.143841) / 2)
    (3 * loss).backward()
    close(student.grad, [[[-0.375, 0.375], [0.375, -0.375]]])
    assert teacher.grad is None


def test_z_loss_and_entropy_by_hand():
    # s = 0: log 2 = 0.693147, squared 0.480453.  s = 2: log(e + 1/e) = log 3.086161 = 1.126928, squared 1.269967.
    close(z_loss(torch.tensor([[0.0], [2.0]])), (0.480453 + 1.269967) / 2)
    # s = 0: log 2.  s = log 3: p = 3/4, H = 3/4 log(4/3) + 1/4 log 4 = 0.215762 + 0.346574 = 0.562335, and for -s too.
    close(entropy(torch.tensor([LOG3])), 0.562335)
    close(entropy(torch.tensor([-LOG3, 0.0])), (0.562335 + 0.693147) / 2)


def test_exit_loss_by_hand():
    # (0, log 3) to leave: -log(3/4) = 0.287682.  (0, 0) to stay: log 2 = 0.693147.  Mean 0.490415.
    # Gradient: (p - target) / tokens, with p of leaving 3/4 and 1/2.
    logits, targets = leaf([[0.0, LOG3], [0.0, 0.0]]), torch.tensor([True, False])
    loss = exit_loss(logits, targets)
    close(loss.detach(), 0.490415)
    loss.backward()
    close(logits.grad, [[0.125, -0.125], [-0.25, 0.25]])
    teacher, exited = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]), torch.tensor([[9.0, 9.5, 9.4], [0.0, 0.1, 0.0]])
    assert exit_targets(teacher, exited.bfloat16()).tolist() == [True, False]


TARGETS = normal(3, 4, seed=9) > 0
PER_TOKEN = {
    "distillation": ((11,), lambda x: distillation(normal(*x.shape, seed=5, dtype=torch.float64), x)),
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
