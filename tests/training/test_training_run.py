"""A run from nothing to a checkpoint, stopped and killed on the way. For the command, see test_train_command.py."""

import random
import signal
from dataclasses import replace

import pytest
import tiny_runs
import torch
from tiny_runs import GRAINS, interrupt_at, logged_steps, page, table, tiny_run

from hat_lib.backbone.base import exact_hash, load_base
from hat_lib.config import HatConfig, HatError
from hat_lib.model.checkpoint import ADAPTER_FILE, read_checkpoint, write_checkpoint
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import load_text
from hat_lib.training import run as module
from hat_lib.training import trainer
from hat_lib.training.run import train
from hat_lib.training.trainer import last_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:token grain")
STEPS = 4


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return page(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text):
    """By grain: the folder of an undisturbed run of both phases, with corrections at the channel grain."""
    found = {}
    for grain in GRAINS:
        found[grain] = tmp_path_factory.mktemp("finished") / grain
        train(asked(grain, text), found[grain], progress=False)
    return found


def asked(grain, text, **changes):
    run = tiny_run(grain, text, steps=STEPS, **changes)
    return replace(run, correction_rank=2 if grain == "channel" else None)


def same_run(found, expected):
    """The adapter's bytes, the tables, and every number in the log except the times."""

    def log(folder):
        times = ("seconds", "tokens_per_second", "eta_seconds")
        return [{k: v for k, v in row.items() if k not in times} for row in table(folder / "log.csv")]

    assert (found / ADAPTER_FILE).read_bytes() == (expected / ADAPTER_FILE).read_bytes()
    assert read_checkpoint(found).calibration == read_checkpoint(expected).calibration
    assert log(found) == log(expected)


def raises(*args, **options):
    raise InterruptedError


@pytest.mark.parametrize("grain", GRAINS)
def test_before_the_first_step_the_model_is_the_base(grain, text, tmp_path, monkeypatch, tiny_base):
    seen = {}

    def inspect(hat, blocks, recipe, phase, thresholds, folder, **options):
        ids = torch.tensor(blocks["input_ids"][:2])
        with torch.no_grad():
            seen.update(logits=hat.lm(ids).logits, base=tiny_base.model(ids).logits, capacity=hat.trace.capacity)
            with hat.using(hat.threshold_policy(thresholds(1.0))):  # nominal thresholds keep everything, too
                seen.update(routed=hat.lm(ids).logits, routed_capacity=hat.trace.capacity)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_phase", inspect)
    with pytest.raises(KeyboardInterrupt):
        train(asked(grain, text), tmp_path / "run", progress=False)
    assert seen["capacity"] == seen["routed_capacity"] == 1.0
    for logits in (seen["logits"], seen["routed"]):
        torch.testing.assert_close(logits, seen["base"], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("grain", GRAINS)
def test_a_finished_run_and_the_same_again(grain, finished, text, tmp_path, monkeypatch, tiny_base):
    """The same bytes, whatever the global random state, and an unchanged base."""
    folder = finished[grain]
    assert {path.name for path in folder.iterdir()} == {"hat_config.json", ADAPTER_FILE, "log.csv", "run.json"}
    assert logged_steps(folder) == [(phase, step + 1) for phase in ("routers", "exit") for step in range(STEPS)]
    checkpoint = read_checkpoint(folder)
    assert checkpoint.base_fingerprint == tiny_base.fingerprint and checkpoint.calibration.method == "learned"
    assert set(checkpoint.training) == {"routers", "exit", "exit_agreement", "recipe", "command"}
    assert checkpoint.training["routers"]["steps"] == checkpoint.training["exit"]["steps"] == STEPS
    learned = {n: t for n, t in checkpoint.tensors.items() if n.startswith("corrections.")}
    assert bool(learned) == (grain == "channel")
    assert all(t.any() for n, t in learned.items() if n.endswith((".up", ".shift")))
    base = load_base("random:tiny", dtype="fp32", device="cpu")
    monkeypatch.setattr(module, "load_base", lambda *args, **options: base)
    torch.manual_seed(9)  # translators are initialised from the recipe's seed alone
    train(asked(grain, text), tmp_path / "again", progress=False)
    same_run(tmp_path / "again", folder)
    assert exact_hash(base.model) == exact_hash(tiny_base.model)


# Stopped


@pytest.mark.slow
@pytest.mark.parametrize("grain", GRAINS)
def test_an_interrupted_run_is_the_undisturbed_one(grain, finished, text, tmp_path, monkeypatch):
    """Ctrl-C in step 3 of each phase."""
    folder, run = tmp_path / "run", asked(grain, text)
    interrupt_at(monkeypatch, ("routers", 3), ("exit", 3))
    ended = [[(o.phase, o.step, o.stopped) for o in train(run, folder, resume=resume, progress=False)]
             for resume in (False, True, True)]  # fmt: skip
    assert ended == [[("routers", 3, "interrupt")], [("routers", 4, ""), ("exit", 3, "interrupt")], [("exit", 4, "")]]
    same_run(folder, finished[grain])


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_takes_no_further_one(finished, text, tmp_path, monkeypatch):
    folder, run = tmp_path / "run", asked("token", text)
    with monkeypatch.context() as patch, pytest.raises(HatError):
        patch.setattr(module, "calibrate_learned", raises)
        train(run, folder, progress=False)
    routers, _ = train(run, folder, resume=True, progress=False)
    assert routers.step == STEPS
    same_run(folder, finished["token"])


@pytest.mark.slow
def test_kill_9_at_any_point_leaves_a_run_that_goes_on(finished, text, tmp_path):
    """Killed while it touches a file, usually one of a checkpoint; then run to the end."""
    folder, run = tmp_path / "run", asked("token", text, save_steps=1)
    points, died = random.Random(0), 0
    for _ in range(5):
        process = tiny_runs.start(tiny_runs.train_and_die, run, folder, points.randrange(1, 70))
        process.join()
        died += process.exitcode == -signal.SIGKILL
    assert died >= 3
    train(run, folder, resume=(folder / "run.json").exists(), progress=False)
    same_run(folder, finished["token"])


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_in_the_folder_is_refused(text, tmp_path, monkeypatch, resume):
    folder, run = tmp_path / "run", asked("token", text)
    load, refused = module.load_base, []

    def load_base(*args, **options):
        with pytest.raises(HatError, match="another process"):
            train(run, folder, resume=resume, progress=False)
        refused.append(True)
        return load(*args, **options)

    monkeypatch.setattr(module, "load_base", load_base)
    train(replace(run, max_steps=1), folder, resume=resume, progress=False)
    assert refused == [True] and not (folder / "work").exists()
    with pytest.raises(HatError, match="already holds a run"):
        train(run, folder, progress=False)


@pytest.mark.parametrize("has_notes", [True, False])
def test_a_run_that_fails_before_its_first_state_leaves_the_folder_as_it_was(text, tmp_path, monkeypatch, has_notes):
    folder = tmp_path / "run"
    if has_notes:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(trainer.torch, "save", lambda *_: raises())
    with pytest.raises(HatError, match="cannot write"):
        train(asked("token", text), folder, progress=False)
    assert set(tmp_path.rglob("*")) == before


def test_a_disk_that_is_full_later_leaves_a_run_that_goes_on(text, tmp_path, monkeypatch):
    folder, run, save = tmp_path / "run", asked("token", text, save_steps=2), torch.save

    def full(state, path):
        if state["step"] > 2:
            raise RuntimeError("iostream error")  # torch's wording
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(HatError, match="cannot write a checkpoint"):
        patch.setattr(trainer.torch, "save", full)
        train(run, folder, progress=False)
    assert last_checkpoint(folder / "work" / "routers").name == "checkpoint-2"
    assert [outcome.done for outcome in train(run, folder, resume=True, progress=False)] == [True, True]


# What a run can start from


@pytest.mark.slow
def test_gates_alone_on_trained_routers(finished, text, tmp_path):
    run = replace(asked("channel", text, phase="exit", start=finished["channel"]), correction_rank=None)
    (outcome,) = train(run, tmp_path / "run", progress=False)
    assert outcome.phase == "exit" and logged_steps(tmp_path / "run") == [("exit", n + 1) for n in range(STEPS)]
    found, before = (read_checkpoint(folder) for folder in (tmp_path / "run", finished["channel"]))
    assert set(found.training) == set(before.training) and found.config.correction_rank == 2
    same = [name for name, tensor in found.tensors.items() if torch.equal(tensor, before.tensors[name])]
    assert same == list(found.tensors)  # as if it had continued by itself
    again = replace(asked("channel", text, phase="routers", start=finished["channel"]), correction_rank=1)
    train(again, tmp_path / "again", progress=False)
    assert read_checkpoint(tmp_path / "again").tensors["corrections.0_down.up"].shape[1] == 1


def test_a_start_that_cannot_be(text, tmp_path, monkeypatch):
    base = load_base("random:tiny", dtype="fp32")
    hat = HierarchicalTransformer(base, HatConfig.published(base))
    hat.save_pretrained(tmp_path / "plain")
    made = tiny_runs.new_hat("channel")
    write_checkpoint(tmp_path / "untrained", replace(plain_checkpoint(made, tmp_path), training=None))
    monkeypatch.setattr(module, "load_base", lambda *args, **options: pytest.fail("a base was loaded"))
    for run in (
        tiny_run("channel", text, start=tmp_path / "plain"),  # of the other grain
        tiny_run("token", text, start=tmp_path / "plain"),  # no calibration
        tiny_run("channel", text, phase="exit", start=tmp_path / "untrained"),  # no trained routers
    ):
        with pytest.raises(HatError, match="plain|untrained"):
            train(run, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


def plain_checkpoint(hat, folder):
    hat.save_pretrained(folder / "made")
    return read_checkpoint(folder / "made")


@pytest.mark.parametrize("grain", GRAINS)
def test_a_text_too_short_to_calibrate_on_is_refused_before_the_training(grain, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("A line of some words. " * 100)
    for name in ("training_text", "train_phase"):
        monkeypatch.setattr(module, name, lambda *args, **options: pytest.fail("too late"))
    with pytest.raises(HatError, match="short.txt"):
        train(asked(grain, tmp_path / "short.txt"), tmp_path / grain, progress=False)
    assert not (tmp_path / grain).exists()


@pytest.mark.parametrize("grain", GRAINS)
def test_calibration_after_training_reads_what_training_did_not(grain, text, tmp_path, monkeypatch, tiny_base):
    read = {}

    def see(name):
        function = getattr(module, name)

        def seen(hat, blocks, *args, **options):
            rows = blocks["input_ids"] if name == "train_phase" else blocks
            read.setdefault(name, []).extend(map(tuple, rows))
            return function(hat, blocks, *args, **options)

        monkeypatch.setattr(module, name, seen)

    before, after = ("train_phase", "calibrate"), ("calibrate_learned", "calibrate_exits")
    for name in before + after:
        see(name)
    train(tiny_run(grain, text, steps=1), tmp_path / "run", progress=False)
    part = {}
    for split in ("train", "validation"):
        part[split] = set(map(tuple, load_text(text, tiny_base.tokenizer, split=split, block_size=64)["input_ids"]))
    assert read.keys() == {*before, *after} - ({"calibrate"} if grain == "token" else set())
    for name, rows in read.items():
        assert set(rows) <= part["validation" if name in after else "train"], name
