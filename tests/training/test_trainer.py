"""One phase: what trains, what a stop leaves behind, and what a NaN does."""

import signal
from unittest.mock import Mock

import pytest
import torch
from tiny_runs import GRAINS, PHASES, new_hat, random_blocks, run_phase, skipping

from hat_lib.backbone.base import exact_hash
from hat_lib.config import HatError
from hat_lib.training import losses, trainer
from hat_lib.training.objective import Objective
from hat_lib.training.run import nominal_thresholds
from hat_lib.training.trainer import STATE_FILE, Stops


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
    save = torch.save

    def full(state, path):
        if state["step"] > 2:
            raise RuntimeError("iostream error")  # torch's wording
        save(state, path)

    monkeypatch.setattr(trainer.torch, "save", full)
    with pytest.raises(HatError, match="cannot write"):
        run_phase(new_hat("token"), tmp_path, steps=4, save_steps=2)
    assert saved_step(tmp_path) == 2
