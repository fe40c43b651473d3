"""One phase: its recipe, what trains, what is logged and measured meanwhile, and what a NaN or a full disk does."""

import errno
import signal
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import GRAINS, PHASES, logged_steps, new_hat, random_blocks, run_phase, skipping, table

from hat_lib.base.load import exact_hash
from hat_lib.config import HatError
from hat_lib.evaluation.perplexity import score_each
from hat_lib.training import losses
from hat_lib.training.log import CAPACITIES, extend_curve, seconds_so_far
from hat_lib.training.objective import Objective, nominal_thresholds
from hat_lib.training.recipe import Recipe
from hat_lib.training.trainer import STATE_FILE, Stops

BLOCKS = tiny_runs.rows(random_blocks(2, 32, seed=5)).add_column("n_context", [0] * 2)


def saved_step(folder):
    return torch.load(folder / "work" / "routers" / STATE_FILE)["step"]


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_trains_and_saves_its_own_parameters(grain, phase, tmp_path):
    hat = new_hat(grain)
    before, frozen = {n: p.detach().clone() for n, p in hat.hat_parameters().items()}, exact_hash(hat.lm)
    outcome, nominal = run_phase(hat, tmp_path, phase, steps=3), nominal_thresholds(hat)
    assert outcome.done and (outcome.step, outcome.steps) == (3, 3)
    assert outcome.thresholds(1.0) == nominal(1.0)
    assert (outcome.thresholds(0.5) != nominal(0.5)) == (grain == "channel" and phase == "routers")  # the split

    own = {n for n in before if n.startswith("routers." if phase == "routers" else "gates.")}
    own -= {"routers.0_ffn.weight", "routers.0_ffn.bias"}  # token grain: layer 0's FFN always runs, its router is idle
    own -= {n for n in own if "_token." in n}  # channel grain: token sensitivity is measured
    assert own == {n for n, p in hat.hat_parameters().items() if not torch.equal(p, before[n])}
    assert exact_hash(hat.lm) == frozen and exact_hash(hat.unload().model) == frozen


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("phase", PHASES)
def test_capacity_exits_and_decisions_stay(grain, phase, tmp_path, monkeypatch):
    """Even where training ends inside its forward; the learning rate is 0, so that the parameters stay."""
    hat = skipping(grain)
    requested = hat.capacity, hat.exit_rate

    def decided():
        with torch.no_grad(), hat.record():
            hat.lm(torch.tensor(random_blocks(2, seed=3)))
        assert hat.trace.capacity < 0.9 and hat.trace.exit_rate > 0
        return [mask for kind in (hat.trace.masks.keep, hat.trace.masks.exits) for mask in kind.values()]

    before = decided()
    run_phase(hat, tmp_path, phase, steps=2, router_lr=0, exit_lr=0)
    monkeypatch.setattr(losses, "divergence", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_phase(hat, tmp_path, phase)
    assert (hat.capacity, hat.exit_rate) == requested and not hat.training
    assert all(torch.equal(a, b) for a, b in zip(before, decided(), strict=True))


def test_a_second_ctrl_c_stops_at_once():
    stops = Stops(None)
    stops.receive(signal.SIGINT)
    stops.receive(signal.SIGINT)  # immediately: the same signal, passed on by torchrun
    stops.since -= 2
    stops.receive(signal.SIGTERM)  # what follows it, if anything, is SIGKILL
    with pytest.raises(KeyboardInterrupt):
        stops.receive(signal.SIGINT)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_stops_and_leaves_a_checkpoint(tmp_path, monkeypatch, where):
    """In step 3; training resumes from step 2."""
    hat, forward = new_hat("token"), Objective.forward

    def planted(self, *args, step, **kwargs):
        out = forward(self, *args, step=step, **kwargs)
        if step == 2 and where == "gradient":
            hat.routers["2_ffn"].weight.register_hook(lambda gradient: gradient * torch.nan)
        return out | {"loss": out["loss"] * float("nan")} if step == 2 and where == "loss" else out

    monkeypatch.setattr(Objective, "forward", planted)
    with pytest.raises(HatError, match="step 3"):
        run_phase(hat, tmp_path, steps=4, save_steps=2)
    assert all(torch.isfinite(p).all() for p in hat.hat_parameters().values())
    assert saved_step(tmp_path) == 2


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    write, room = Path.write_bytes, [0, 1]  # for the state after two steps, not for that after four

    def full(path, data):
        if not room.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(HatError, match="cannot write .*: No space left on device"):
        run_phase(new_hat("token"), tmp_path, steps=4, save_steps=2)
    assert saved_step(tmp_path) == 2


# log.csv and validation.csv


@pytest.mark.parametrize("grain", GRAINS)
def test_columns_and_cells(grain, tmp_path):
    hat = new_hat(grain)
    for phase in ("routers", "exit"):
        run_phase(hat, tmp_path, phase, steps=2)
    found = table(tmp_path / "log.csv")
    assert logged_steps(tmp_path) == [("routers", 1), ("routers", 2), ("exit", 1), ("exit", 2)]
    sites = {"token": ["ffn"], "channel": ["qkv", "o", "gate_up", "down"]}[grain]
    shares = [f"share_{name}" for name in (*sites, 0, 1, 2, 3)]
    always = {"phase", "step", "steps", "seconds", "loss", "capacity", "kl", "grad_norm", "learning_rate"}
    always |= {"tokens_per_second", "eta_seconds"}
    only_token = {"z_loss", "entropy"} if grain == "token" else set()
    of_phase = {"routers": {"share", *shares} | only_token, "exit": {"gate_loss", "wrong", "exit_rate", "agreement"}}
    for row in found:
        assert {name for name, cell in row.items() if cell != ""} == always | of_phase[row["phase"]]
    # A layer's share is that of its sites weighted by work, and the total share is the mean over layers.
    for row in found[:2]:
        by_site = sum(float(row[f"share_{s}"]) * work for s, work in zip(sites, hat.site_work, strict=True))
        by_layer = sum(float(row[f"share_{i}"]) for i in range(4)) / 4
        assert by_site == pytest.approx(by_layer, abs=2e-4) and by_layer == pytest.approx(float(row["share"]), abs=2e-4)
    run_phase(hat, tmp_path, "exit", steps=1)  # gates trained anew keep the rows of their routers
    assert logged_steps(tmp_path) == [("routers", 1), ("routers", 2), ("exit", 1)]


def test_a_row_is_the_mean_since_the_one_before(tmp_path, monkeypatch):
    """There is one where a run stops and where it ends, too: no step and no second is left out."""
    tiny_runs.interrupt_at(monkeypatch, ("routers", 4))
    for resume in (False, True):
        run_phase(new_hat("token"), tmp_path, steps=5, log_steps=3, resume=resume)
    found = table(tmp_path / "log.csv")
    assert [int(row["step"]) for row in found] == [1, 3, 4, 5]
    drawn = [tiny_runs.recipe("token").sampled_capacity(step, 5) for step in range(5)]
    means = [drawn[0], sum(drawn[1:3]) / 2, *drawn[3:]]
    assert [float(row["capacity"]) for row in found] == pytest.approx(means, rel=1e-5)
    assert seconds_so_far(tmp_path / "log.csv", "routers") == float(found[-1]["seconds"])
    assert seconds_so_far(tmp_path / "log.csv", "exit") == seconds_so_far(tmp_path / "none.csv", "exit") == 0


def test_a_resumed_run_has_no_step_twice_and_adds_up_its_time(tmp_path, monkeypatch):
    tiny_runs.interrupt_at(monkeypatch, ("routers", 2))
    run_phase(new_hat("token"), tmp_path, steps=4)
    path = tmp_path / "log.csv"
    header, first, second = path.read_text().splitlines(keepends=True)
    second = second.replace(second.split(",")[3], "90.0", 1)
    # A step that no checkpoint knows of, and half a row: what a kill leaves.
    path.write_text("".join([header, first, second, second.replace("routers,2,", "routers,3,"), second[:30]]))
    run_phase(new_hat("token"), tmp_path, steps=4, resume=True)
    assert logged_steps(tmp_path) == [("routers", step) for step in range(1, 5)]
    assert all(float(row["seconds"]) >= 90 for row in table(path)[1:])


def test_the_learning_curve_is_what_evaluation_says(tmp_path):
    hat = new_hat("channel").train()
    thresholds = nominal_thresholds(hat)
    extend_curve(tmp_path / "validation.csv", hat, BLOCKS, thresholds, 0, 448)
    assert hat.training
    hat.eval()
    found = table(tmp_path / "validation.csv")
    assert [float(row["capacity"]) for row in found] == list(CAPACITIES)
    for row, capacity in zip(found, CAPACITIES, strict=True):
        with hat.using(hat.threshold_policy(thresholds(capacity))):
            _, (there,) = score_each(hat, BLOCKS, progress=False)
        assert row["step"] == "0" and row["tokens"] == "448"
        assert float(row["kl"]) == pytest.approx(there.kl, abs=1e-5)
        assert float(row["share"]) == pytest.approx(capacity, abs=0.1)
    assert 0 < float(found[0]["kl"]) < float(found[-1]["kl"])


def test_a_resumed_run_goes_on_with_its_curve(tmp_path):
    run_phase(new_hat("channel"), tmp_path / "whole", steps=3, save_steps=2)
    hat = new_hat("channel")
    run_phase(hat, tmp_path, steps=3, save_steps=2, max_minutes=1e-9, validation=BLOCKS)
    run_phase(hat, tmp_path, steps=3, save_steps=2, resume=True, validation=BLOCKS)
    steps = [int(row["step"]) for row in table(tmp_path / "validation.csv")]
    assert steps == [step for step in (0, 1, 2, 3) for _ in CAPACITIES]
    read = [int(row["tokens"]) for row in table(tmp_path / "validation.csv")]
    assert read == [2 * 32 * step for step in steps]  # the blocks are shorter than the recipe's
    undisturbed, measured = (table(folder / "log.csv") for folder in (tmp_path / "whole", tmp_path))
    assert [row["loss"] for row in measured] == [row["loss"] for row in undisturbed]


# Recipes


def test_sampled_capacity():
    recipe = Recipe(capacity=0.5, anneal=0.4, spread=0.0)
    schedule = [recipe.sampled_capacity(step, 100) for step in range(100)]
    assert schedule[0] == 1.0 and schedule[20] == pytest.approx(0.75)
    assert schedule[40:] == [0.5] * 60 and np.all(np.diff(schedule) <= 0)
    wide = Recipe(capacity=0.15, anneal=0.5, spread=0.9)
    drawn = [wide.sampled_capacity(step, 100) for step in range(100)]
    assert min(drawn) == 0.1 and max(drawn) == 1.0


def test_samples_depend_on_seed_and_step_alone():
    def draws(seed):
        recipe = Recipe(seed=seed, capacity=0.5, anneal=0.0, spread=0.2, exit_rate=0.3)
        return [(recipe.sampled_capacity(step, 2000), recipe.sampled_exit_rate(step)) for step in range(2000)]

    assert draws(0) == (first := draws(0)) != draws(1)
    capacities, rates = np.transpose(first)
    assert 0.3 <= min(capacities) < 0.31 and 0.69 < max(capacities) <= 0.7 and abs(np.mean(capacities) - 0.5) < 0.01
    assert 0 <= min(rates) < 0.01 and 0.29 < max(rates) <= 0.3 and abs(np.corrcoef(capacities, rates)[0, 1]) < 0.1


def test_named():
    assert Recipe.named("default", "channel") == Recipe.channel()
    assert Recipe.named("default", "token", "quick", seed=3) == Recipe.token("quick", seed=3)
    assert Recipe.named("published", "token") == Recipe.published() == Recipe()
    for wrong in (("published", "channel"), ("best", "token"), ("default", "channel", "fast")):
        with pytest.raises(HatError):
            Recipe.named(*wrong)
    with pytest.raises(HatError):
        Recipe.named("default", "token", learning_rate=1.0)


@pytest.mark.parametrize(
    "name, value",
    [
        ("tokens", 1), ("block_size", 8.0), ("batch_size", 0), ("seed", -1), ("router_epochs", 0),
        ("exit_lr", float("nan")), ("noise", -1), ("anneal", 1.1), ("capacity", 0.05), ("text", 3),
    ],
)  # fmt: skip
def test_bad_values(name, value):
    with pytest.raises(HatError, match=name):
        Recipe.channel(**{name: value})
