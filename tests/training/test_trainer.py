"""One phase on Trainer: what trains, what a stop leaves behind, and what a NaN does."""

import re
import shutil
import signal
import time
from contextlib import nullcontext

import pytest
import torch
from tiny_runs import GRAINS, PHASES, gradients, interrupt_at, new_hat, random_blocks, run_phase, skipping

from hat_lib.backbone.base import exact_hash
from hat_lib.config import HatError
from hat_lib.model.checkpoint import is_hat_parameter, read_checkpoint
from hat_lib.training import losses, trainer
from hat_lib.training.objective import Objective
from hat_lib.training.trainer import collate, sound_checkpoint


def values(hat):
    return {n: p.detach().clone() for n, p in hat.hat_parameters().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# What trains


@pytest.fixture(params=[(grain, phase) for grain in GRAINS for phase in PHASES], ids="-".join)
def grain_and_phase(request):
    return request.param


def test_only_the_phase_s_own_parameters_train_and_all_of_them_are_saved(grain_and_phase, tmp_path, monkeypatch):
    grain, phase = grain_and_phase
    hat, got_gradient = new_hat(grain), set()
    before, frozen = values(hat), exact_hash(hat.lm)

    def note(self, model, clip=trainer.HatTrainer._clip_grad_norm):
        got_gradient.update(n.removeprefix("hat.") for n, p in self.model.named_parameters() if p.grad is not None)
        return clip(self, model)

    monkeypatch.setattr(trainer.HatTrainer, "_clip_grad_norm", note)
    outcome = run_phase(hat, tmp_path, phase)
    assert outcome.done and (outcome.step, outcome.steps) == (6, 6)

    own = {n for n in before if n.startswith("routers." if phase == "routers" else "gates.")}
    own -= {"routers.0_ffn.weight", "routers.0_ffn.bias"}  # token grain: layer 0's FFN always runs, its router is idle
    own -= {n for n in own if "_token." in n}  # channel grain: token sensitivity is measured
    split = {"split.offsets"} if (grain, phase) == ("channel", "routers") else set()
    assert got_gradient - split == own == {n for n, p in hat.hat_parameters().items() if not torch.equal(p, before[n])}
    assert split <= got_gradient

    saved = read_checkpoint(sound_checkpoint(tmp_path / "work" / phase)).tensors
    assert same(saved, values(hat)) and set(saved) == {n for n, _ in hat.named_parameters() if is_hat_parameter(n)}
    assert not any(p.requires_grad for n, p in hat.named_parameters() if n not in saved)
    files = {path.suffix for path in (tmp_path / "work" / phase).rglob("checkpoint-*/*")}
    assert files == {".json", ".safetensors", ".pt", ".pth"}  # no copy of the base among them
    assert sum(path.stat().st_size for path in (tmp_path / "work").rglob("*.safetensors")) < 200_000
    assert exact_hash(hat.lm) == frozen and exact_hash(hat.unload().model) == frozen


@pytest.mark.slow
def test_how_long_it_will_take_is_said_first_and_changes_nothing(grain_and_phase, tmp_path, capsys):
    grain, phase = grain_and_phase
    found = []
    for progress in (False, True):
        hat = new_hat(grain)
        run_phase(hat, tmp_path / str(progress), phase, progress=progress)
        found.append(values(hat))
        said = re.search(rf"^{phase}: 6 steps of about \S+ s, about 0 minutes$", capsys.readouterr().err, re.M)
        assert bool(said) == progress
    assert same(*found)


@pytest.mark.parametrize("ending", ["done", "not finite", "interrupted"])
def test_capacity_exits_and_decisions_stay_as_they_were(grain_and_phase, ending, tmp_path, monkeypatch):
    """However training ends, even inside its forward; the learning rate is 0, so that the parameters stay."""
    grain, phase = grain_and_phase
    hat, name = skipping(grain), "distillation" if phase == "routers" else "divergence"
    loss = getattr(losses, name)
    requested = hat.capacity, hat.exit_rate

    def decided():
        with torch.no_grad(), hat.record():
            hat.lm(torch.tensor(random_blocks(2, seed=3)))
        assert hat.trace.capacity < 0.9 and hat.trace.exit_rate > 0
        return [mask for kind in (hat.trace.masks.keep, hat.trace.masks.exits) for mask in kind.values()]

    def ends(*args):
        if ending == "interrupted":
            raise KeyboardInterrupt
        return loss(*args) * float("nan")

    before = decided()
    if ending != "done":
        monkeypatch.setattr(losses, name, ends)
    with nullcontext() if ending == "done" else pytest.raises((HatError, KeyboardInterrupt)):
        run_phase(hat, tmp_path, phase, steps=2, router_lr=0, exit_lr=0)
    assert (hat.capacity, hat.exit_rate) == requested and not hat.training
    assert all(map(torch.equal, before, decided()))


def test_gradients_are_clipped(tmp_path, monkeypatch):
    norms, clip = [], trainer.HatTrainer._clip_grad_norm

    def note(self, model):
        before = clip(self, model)
        after = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        norms.append((float(before), float(after)))
        return before

    monkeypatch.setattr(trainer.HatTrainer, "_clip_grad_norm", note)
    run_phase(new_hat("token"), tmp_path, max_grad_norm=0.1)
    assert max(before for before, _ in norms) > 0.2 and max(after for _, after in norms) < 0.1001


def test_accumulated_gradients_are_the_mean_of_their_batches_whatever_the_step(tmp_path):
    hat = new_hat("channel")
    hat.save_pretrained(tmp_path / "start")
    alone, both = (gradients(tmp_path / "start", "routers", tmp_path, accumulate=n, spread=0) for n in (1, 2))
    for name, found in both[0].items():
        torch.testing.assert_close(found, (alone[0][name] + alone[1][name]) / 2)


# Stops


@pytest.fixture
def terminated(monkeypatch):
    """Where SIGTERM ends up, instead of ending this process."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    yield received
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number, reason", [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminate"), (0, "time")])
def test_a_stop_finishes_the_step_and_saves_it(tmp_path, monkeypatch, terminated, number, reason):
    """Ctrl-C, SIGTERM (which is then passed on), and a time limit."""
    if number:
        interrupt_at(monkeypatch, ("routers", 3), by=number)
    outcome = run_phase(new_hat("token"), tmp_path, max_minutes=None if number else 1e-9)
    step = 3 if number else 1
    assert (outcome.step, outcome.steps, outcome.stopped, outcome.done) == (step, 6, reason, False)
    assert sound_checkpoint(tmp_path / "work" / "routers").name == f"checkpoint-{step}"
    assert terminated == [True] * (reason == "terminate")
    assert run_phase(new_hat("token"), tmp_path, resume=True, max_minutes=9).done
    assert terminated == [True] * (reason == "terminate")


@pytest.mark.parametrize("event", ["on_step_begin", "on_save"])
def test_ctrl_c_in_the_last_step_or_while_it_is_saved_is_not_lost(tmp_path, monkeypatch, event):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == (5 if event == "on_step_begin" else 6):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "CsvLog", type("Log", (trainer.CsvLog,), {event: interrupt}))
    outcome = run_phase(new_hat("token"), tmp_path)
    assert outcome.step == outcome.steps == 6 and outcome.stopped == "interrupt"


def test_a_second_ctrl_c_stops_at_once_but_not_a_save():
    stops = trainer._Stops(None)
    stops.receive(signal.SIGINT)
    stops.receive(signal.SIGINT)  # immediately: the same signal, passed on by torchrun
    stops.since -= 2
    stops.receive(signal.SIGTERM)  # what follows it, if anything, is SIGKILL
    stops.saving = True
    stops.receive(signal.SIGINT)
    stops.saving = False
    with pytest.raises(KeyboardInterrupt):
        stops.receive(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_it_saves_leaves_the_save_whole(tmp_path, monkeypatch, number, terminated):
    interrupt_at(monkeypatch, ("routers", 3))

    def save(self, *args, save=trainer.HatTrainer._save):
        self.stops.since -= 2
        signal.raise_signal(number)
        save(self, *args)

    monkeypatch.setattr(trainer.HatTrainer, "_save", save)
    assert run_phase(new_hat("token"), tmp_path).stopped == "interrupt"
    assert sound_checkpoint(tmp_path / "work" / "routers").name == "checkpoint-3"


def test_a_resumed_phase_at_its_end_has_nothing_to_do(tmp_path, capsys):
    hat, again, started = new_hat("token"), new_hat("token"), time.monotonic()
    assert 0 < run_phase(hat, tmp_path).seconds <= time.monotonic() - started
    assert capsys.readouterr() == ("", "")  # no line for a logged step
    outcome = run_phase(again, tmp_path, resume=True)
    assert outcome.done and outcome.step == 6 and same(values(again), values(hat))


# Half-written checkpoints


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Trainer's folders of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("phase")
    run_phase(new_hat("token"), folder)
    return folder / "work" / "routers"


FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "hat_config.json",
         "hat_adapter.safetensors")  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "zeros"])
def test_a_half_written_checkpoint_is_passed_over(two_checkpoints, tmp_path, file, damage):
    work = shutil.copytree(two_checkpoints, tmp_path / "work")
    assert sound_checkpoint(work).name == "checkpoint-6"
    path = work / "checkpoint-6" / file
    data = path.read_bytes()
    if damage == "missing" and file != "rng_state.pth":  # every random number has its own key
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2]}.get(damage, bytes(len(data))))
    assert sound_checkpoint(work).name == "checkpoint-4"


def test_folders_of_other_names_and_no_folder_at_all(two_checkpoints, tmp_path):
    assert sound_checkpoint(tmp_path / "gone") is None
    work = shutil.copytree(two_checkpoints, tmp_path / "work")
    (work / "checkpoint-old").mkdir()
    (work / "checkpoint-12").mkdir()
    shutil.copytree(work / "checkpoint-6", work / "checkpoint-8")  # it says it is step 6
    assert sound_checkpoint(work).name == "checkpoint-6"


def test_resuming_clears_away_what_is_newer_than_the_last_sound_one(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, ("routers", 5))
    run_phase(new_hat("token"), tmp_path)
    work = tmp_path / "work" / "routers"
    (work / "checkpoint-5" / "trainer_state.json").unlink()
    (work / "checkpoint-9").mkdir()
    assert run_phase(new_hat("token"), tmp_path, resume=True).done
    assert sorted(path.name for path in work.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def foreign_state(folder):
    path = folder / "trainer_state.json"
    path.write_text(path.read_text().replace("{", '{"of_another_version": 1,', 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stray, left",
    [
        (lambda folder: (folder / "scaler.pt").write_bytes(b"of fp16 training"), 6),
        (lambda folder: (folder.parent / "checkpoint-9").write_text("a file"), 6),
        (foreign_state, 4),
    ],
)
def test_stray_files_do_not_stop_a_resumed_phase(tmp_path, stray, left):
    """A checkpoint with files meant for a different Trainer, or that cannot be read, is skipped."""
    run_phase(new_hat("token"), tmp_path, steps=8, max_minutes=None, save_steps=2)
    work = tmp_path / "work" / "routers"
    shutil.rmtree(work / "checkpoint-8")
    stray(work / "checkpoint-6")
    assert sound_checkpoint(work) == (work / f"checkpoint-{left}" if left == 6 else None)
    assert run_phase(new_hat("token"), tmp_path, steps=8, resume=True).step == 8


@pytest.mark.slow
def test_an_optimizer_of_another_run_is_one_clear_error(tmp_path):
    for phase in PHASES:
        run_phase(new_hat("token"), tmp_path, phase, steps=6)
    at = [tmp_path / "work" / phase / "checkpoint-4" for phase in PHASES]
    shutil.rmtree(at[0].with_name("checkpoint-6"))
    shutil.copy(at[1] / "optimizer.pt", at[0])
    with pytest.raises(HatError, match="checkpoint-4 is not of this run: move it away"):
        run_phase(new_hat("token"), tmp_path, resume=True)


# A non-finite number


@pytest.mark.parametrize(
    "where, words",
    [
        ("loss", ("the loss is nan", "the head or the loss")),
        ("weight", ("the loss is nan", "layers.2.mlp.up_proj.weight")),
        ("activation", ("the loss is nan", "first in layer 2,")),
        ("gradient", ("the gradient of routers.2_ffn.weight is not finite",)),
    ],
)
def test_a_nan_stops_with_one_line_that_says_where_and_leaves_a_checkpoint(tmp_path, monkeypatch, where, words):
    """From step 5 on; the checkpoint of step 4 is sound, and training resumes from it."""
    hat, forward = new_hat("token"), Objective.forward

    def planted(self, input_ids, attention_mask, index, step, steps):
        if step == 4 and where == "weight":
            hat.lm.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
        elif step == 4 and where == "activation":
            hat.lm.model.layers[2].input_layernorm.weight.data[:] = 3e38
        out = forward(self, input_ids, attention_mask, index, step, steps)
        if step == 4 and where == "gradient":
            hat.routers["2_ffn"].weight.register_hook(lambda gradient: gradient * torch.nan)
        return out | {"loss": out["loss"] * float("nan")} if step == 4 and where == "loss" else out

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "forward", planted)
        with pytest.raises(HatError) as stopped:
            run_phase(hat, tmp_path)
    line = str(stopped.value)
    assert line.startswith("training stopped in step 5: ") and "\n" not in line
    assert "lr 0.000" in line and line.endswith("the checkpoint of step 4 is intact")
    assert all(word in line for word in words), line
    assert all(torch.isfinite(p).all() for p in hat.hat_parameters().values())
    assert sound_checkpoint(tmp_path / "work" / "routers").name == "checkpoint-4"
    if where == "loss":
        outcome = run_phase(new_hat("token"), tmp_path, resume=True)
        assert outcome.done and outcome.step == 6


def test_a_nan_before_anything_was_saved(tmp_path):
    hat = new_hat("token")
    hat.lm.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(HatError, match=r"in step 1: the loss is nan, first in lm.lm_head.weight, .*nothing was saved"):
        run_phase(hat, tmp_path)


def test_collate_pads_on_the_right():
    batch = collate([{"input_ids": [7, 8, 9], "index": 4}, {"input_ids": [5], "index": 2}])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[7, 8, 9], [5, 0, 0]], "attention_mask": [[1, 1, 1], [1, 0, 0]], "index": [4, 2],
    }  # fmt: skip
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
