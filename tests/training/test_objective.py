"""What one step minimises: the same for a sample, whatever else is in the batch; and the learned split of a budget, an
offset per site at knots of capacity, folded into thresholds."""

import math
from functools import partial

import pytest
import torch
from tiny_runs import GRAINS, PHASES, new_hat, random_blocks, recipe

from hat_lib.training.objective import KNOTS, UNTIL, BudgetSplit, Objective, nominal_thresholds
from hat_lib.training.trainer import collate

LENGTHS, INDEX = (24, 9, 17), (7, 3, 11)
# All random draws are on, in both grains.
RANDOM = {"noise": 1.0, "layer_dropout": 0.5, "exit_tokens": 8}


def new(grain, phase, **changes):
    hat, generator = new_hat(grain), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in hat.hat_parameters().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return Objective(hat, recipe(grain, **RANDOM | changes), phase, nominal_thresholds(hat)).train()


def samples(lengths=LENGTHS):
    blocks = random_blocks(len(lengths), max(lengths), seed=2)
    return [{"input_ids": b[:n], "index": i} for b, n, i in zip(blocks, lengths, INDEX, strict=False)]


def step(objective, rows, at=8, steps=10):
    return objective(**collate(rows), step=at, steps=steps)


same = partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)


def numbers(out):
    """The metrics that are means over tokens; the loss is not one, because the budget is for the whole batch."""
    return {n: torch.as_tensor(v, dtype=torch.float64) for n, v in out.items() if n not in ("loss", "capacity")}


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_row_counts_the_same_alone_in_a_batch_and_padded(grain, phase):
    objective, rows = new(grain, phase), samples()
    whole = numbers(step(objective, rows))
    alone = [numbers(step(objective, [row])) for row in rows]
    # Weights: the number of real tokens, or of sampled ones: at most 8 that are not protected.
    weights = torch.tensor([n if phase == "routers" else min(8, n - 2) for n in LENGTHS], dtype=torch.float64)
    mean = {name: sum(w * a[name] for w, a in zip(weights, alone, strict=True)) / weights.sum() for name in whole}
    same(whole, mean)
    same(whole, numbers(step(objective, rows[::-1])))
    batch = collate(rows)
    padded = {name: torch.nn.functional.pad(batch[name], (0, 13)) for name in ("input_ids", "attention_mask")}
    padded["input_ids"][:, 24:] = torch.tensor(random_blocks(1, 13, seed=5))
    same(whole, numbers(objective(**batch | padded, step=8, steps=10)))


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_batch_of_protected_tokens_alone_trains_nothing(grain, phase):
    """No token may be skipped and none may leave: the loss is on the graph, finite, with gradient 0."""
    objective = new(grain, phase, z_weight=0.0, entropy_weight=0.0, layer_dropout=0.0)
    out = step(objective, samples((2, 1)))
    out["loss"].backward()
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in out.values())
    assert phase == "routers" or float(out["loss"].detach()) == 0
    own = [p for n, p in objective.hat.hat_parameters().items() if p.requires_grad]
    assert own and all(p.grad is None or not p.grad.any() for p in own)
    assert sum(p.grad is not None for p in own) >= len(own) - 2  # token grain: layer 0's router is never used


# What is drawn -> the changes that leave only it on, and a number it affects. Sampled decisions are shares of 22
# tokens, which may be the same for two draws; their gradient depends on the noise itself.
DRAWN = {
    "noise": ("routers", {"layer_dropout": 0.0}, "kl"),
    "layer dropout": ("routers", {"noise": 0.0}, "kl"),
    "positions": ("exit", {"exit_tokens": 4}, "kl"),
    "gate noise": ("exit", {"exit_tokens": 99, "decision_weight": 1.0, "budget_weight": 0.0}, "gradient"),
}


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("drawn", DRAWN)
def test_draws_depend_on_seed_step_and_sample(grain, drawn):
    phase, changes, name = DRAWN[drawn]
    changes = {"spread": 0.0, "anneal": 0.0, **changes}  # one capacity for all steps

    def value(at=8, number=7, **more):
        rows = [samples()[0] | {"index": number}]
        objective = new(grain, phase, **changes, **more)
        found = step(objective, rows, at=at)
        if name == "gradient":
            found["loss"].backward()
            found["gradient"] = sum(gate.gate.weight.grad.norm() for gate in objective.hat.gates.values())
        return round(float(found[name]), 4)

    found = [value(), value(seed=1), value(number=8), value(number=9), value(at=7), value(at=6)]
    torch.rand(5)  # nothing comes from the global random state
    assert value() == found[0] and len(set(found)) > 3
    assert found[1] != found[0] != found[2] and found[4] != found[0]


def test_a_dropped_layer_gives_back_its_input():
    objective, seen = new("channel", "routers"), []
    lm, dropped = objective.hat.lm, torch.tensor([[False, True], [True, True], [False, False], [False, True]])
    for layer in lm.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with objective._without(dropped):
        lm(collate(samples((24, 24)))["input_ids"])
    for sequences, before, after in zip(dropped, seen, seen[1:], strict=False):
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == sequences.tolist()
    with pytest.raises(KeyboardInterrupt), objective._without(dropped):
        raise KeyboardInterrupt
    assert not any(layer._forward_hooks for layer in lm.model.layers)


def test_each_loss_is_the_sum_of_its_parts():
    def parts(phase, **weights):
        objective = new("token", phase, budget_weight=3.0, **weights)
        out = step(objective, samples())
        return {n: float(torch.as_tensor(v).detach()) for n, v in out.items() if n != "site_share"}, objective.recipe

    out, _ = parts("routers", z_weight=0.5, entropy_weight=0.25)
    pull = abs(out["share"] - out["capacity"])
    assert out["loss"] == pytest.approx(out["kl"] + 3 * pull + 0.5 * out["z_loss"] + 0.25 * out["entropy"], rel=1e-5)
    found = []
    for weight in (0.0, 2.0):
        out, recipe = parts("exit", decision_weight=weight)
        decisions = out["wrong"] + 3 * abs(out["exit_rate"] - recipe.sampled_exit_rate(8))
        assert out["loss"] == pytest.approx(out["kl"] + out["gate_loss"] + weight * decisions, rel=1e-5)
        found.append(out["wrong"])
    assert 0 < found[0] == found[1] <= 1  # the weight does not change any draw


# The split


def test_offsets_are_interpolated_between_knots_and_end_and_move_thresholds():
    found, nominal = BudgetSplit(2, ("a", "b")), {(i, s): 1.0 + i for i in range(2) for s in "ab"}
    assert found.on(lambda c: nominal)(0.4) == nominal
    with torch.no_grad():
        found.offsets.copy_(torch.arange(12.0).view(3, 2, 2) / 10)
    for knot, offsets in zip(KNOTS, found.offsets, strict=True):
        assert torch.allclose(found.at(knot), offsets)
    assert torch.allclose(found.at((KNOTS[0] + KNOTS[1]) / 2), found.offsets[:2].mean(0))
    assert torch.allclose(found.at((KNOTS[-1] + UNTIL) / 2), found.offsets[-1] / 2)
    assert torch.equal(found.at(0.1), found.at(KNOTS[0])) and not found.at(UNTIL).any() and not found.at(1.0).any()
    assert found.on(lambda c: nominal)(KNOTS[1])[1, "a"] == pytest.approx(2 * math.exp(-0.6))
    assert found.on(lambda c: nominal)(1.0) == nominal


def test_a_step_decides_at_the_moved_thresholds():
    """The training pass with offsets keeps what the method keeps at the thresholds they give."""
    hat = new_hat("channel")
    objective = Objective(hat, recipe("channel", capacity=0.5, spread=0.0), "routers", nominal_thresholds(hat))
    with torch.no_grad():
        objective.split.offsets.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    batch = collate([{"input_ids": ids, "index": i} for i, ids in enumerate(random_blocks(2, 24))])
    out = objective.eval()(**batch, step=0, steps=1)
    with torch.no_grad(), hat.dense(), hat.using(hat.threshold_policy(objective.thresholds(0.5))):
        hat.lm(batch["input_ids"], use_cache=False)
    assert float(out["share"]) == pytest.approx(float(hat.trace.capacity), abs=1e-4)
    assert objective.thresholds(0.5) != objective.nominal(0.5)
    assert Objective(hat, recipe("channel", split_lr=0.0), "routers", nominal_thresholds(hat)).split is None
