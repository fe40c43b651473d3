"""A run from nothing to a checkpoint, stopped and killed on the way. For the command, see test_train_command.py."""

import errno
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

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
from hat_lib.training.run import train
from hat_lib.training.trainer import sound_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:token grain")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return page(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text):
    """By grain: the folder of an undisturbed run of both phases, 10 steps each."""
    found = {}
    for grain in GRAINS:
        found[grain] = tmp_path_factory.mktemp("finished") / grain
        train(tiny_run(grain, text), found[grain], progress=False)
    return found


def adapter(folder):
    return (folder / ADAPTER_FILE).read_bytes()


def same_run(found, expected):
    """The adapter's bytes, the tables, and every number in the log except the times."""

    def log(folder):
        times = ("seconds", "tokens_per_second", "eta_seconds")
        return [{k: v for k, v in row.items() if k not in times} for row in table(folder / "log.csv")]

    assert adapter(found) == adapter(expected)
    assert read_checkpoint(found).calibration == read_checkpoint(expected).calibration
    assert log(found) == log(expected)


def raises(*args, **options):
    raise InterruptedError


def fill_disk(monkeypatch, name):
    """The disk is full as soon as a file is written that has ``name`` in its path; its beginning may be written."""

    def full(where, function, error, beginning=b""):
        once = getattr(where, function)

        def attempt(*args, **options):
            path = next((a for a in args if name in str(a)), None)
            if path is None:
                return once(*args, **options)
            if beginning:
                with open(path, "wb") as file:
                    file.write(beginning)
            raise error

        monkeypatch.setattr(where, function, attempt)

    no_space = OSError(errno.ENOSPC, "No space left on device")
    full(Path, "open", no_space)
    full(Path, "write_text", no_space, b"{")
    full(torch, "save", RuntimeError("iostream error"), b"PK")  # torch's wording


# Before and after


@pytest.mark.parametrize("grain", GRAINS)
def test_before_the_first_step_the_model_is_the_base(grain, text, tmp_path, monkeypatch, tiny_base):
    seen = {}

    def look(hat, blocks, recipe, phase, thresholds, folder, **options):
        ids = torch.tensor(blocks["input_ids"][:2])
        with torch.no_grad():
            seen.update(logits=hat.lm(ids).logits, base=tiny_base.model(ids).logits, capacity=hat.trace.capacity)
            with hat.using(hat.threshold_policy(thresholds(1.0))):  # nominal thresholds keep everything, too
                seen.update(routed=hat.lm(ids).logits, routed_capacity=hat.trace.capacity)
        raise InterruptedError

    monkeypatch.setattr(module, "train_phase", look)
    with pytest.raises(InterruptedError):
        train(tiny_run(grain, text), tmp_path / "run", progress=False)
    assert seen["capacity"] == seen["routed_capacity"] == 1.0
    for logits in (seen["logits"], seen["routed"]):
        torch.testing.assert_close(logits, seen["base"], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("grain", GRAINS)
def test_a_finished_run_and_the_same_again(grain, finished, text, tmp_path, monkeypatch, tiny_base):
    """The same bytes, whatever the global random state, and an unchanged base."""
    folder = finished[grain]
    assert {path.name for path in folder.iterdir()} == {"hat_config.json", ADAPTER_FILE, "log.csv", "run.json"}
    assert logged_steps(folder) == [(phase, step) for phase in ("routers", "exit") for step in range(1, 11)]
    checkpoint = read_checkpoint(folder)
    assert checkpoint.base_fingerprint == tiny_base.fingerprint
    assert checkpoint.calibration.method == "learned" and [r[0] for r in checkpoint.calibration.exit_rates] == [0.0] * 4
    summary = checkpoint.training
    assert set(summary) == {"routers", "exit", "exit_agreement", "recipe", "command"}
    assert summary["routers"]["steps"] == summary["exit"]["steps"] == 10
    hat = HierarchicalTransformer.from_pretrained(folder, dtype="fp32")
    hat.capacity, hat.exit_rate = 0.6, 0.5
    hat.lm(torch.arange(5, 105)[None])
    assert hat.trace.capacity < 1 and hat.trace.exit_rate > 0
    base = load_base("random:tiny", dtype="fp32", device="cpu")
    monkeypatch.setattr(module, "load_base", lambda *args, **options: base)
    torch.manual_seed(9)  # translators are initialised from the recipe's seed alone
    train(tiny_run(grain, text), tmp_path / "again", progress=False)
    same_run(tmp_path / "again", folder)
    assert exact_hash(base.model) == exact_hash(tiny_base.model)


# Stopped


@pytest.mark.slow
@pytest.mark.parametrize("grain", GRAINS)
def test_5_steps_and_5_more_are_10(grain, finished, text, tmp_path, monkeypatch):
    """Ctrl-C in step 5 of each phase, and in the middle of an epoch."""
    folder, run = tmp_path / "run", tiny_run(grain, text)
    interrupt_at(monkeypatch, ("routers", 5), ("exit", 5))
    ended = [[(o.phase, o.step, o.stopped) for o in train(run, folder, resume=resume, progress=False)]
             for resume in (False, True, True)]  # fmt: skip
    assert ended == [[("routers", 5, "interrupt")], [("routers", 10, ""), ("exit", 5, "interrupt")], [("exit", 10, "")]]
    assert logged_steps(folder) == logged_steps(finished[grain])  # no step twice
    same_run(folder, finished[grain])


@pytest.mark.slow
def test_corrections_are_trained_with_the_routers_and_kept_by_a_later_run(text, tmp_path, monkeypatch):
    run = replace(tiny_run("channel", text, "routers"), correction_rank=2)
    for folder in ("whole", "parts"):
        if folder == "parts":
            interrupt_at(monkeypatch, ("routers", 5))
            assert train(run, tmp_path / folder, progress=False)[0].stopped == "interrupt"
        train(run, tmp_path / folder, resume=folder == "parts", progress=False)
    same_run(tmp_path / "parts", tmp_path / "whole")
    trained = read_checkpoint(tmp_path / "whole").tensors
    learned = {n: t for n, t in trained.items() if n.startswith("corrections.")}
    assert len(learned) == 3 * 4 * 4 and all(t.any() for n, t in learned.items() if n.endswith((".up", ".shift")))

    train(tiny_run("channel", text, "exit", start=tmp_path / "whole"), tmp_path / "exits", progress=False)
    later = read_checkpoint(tmp_path / "exits")
    assert all(torch.equal(later.tensors[n], t) for n, t in learned.items()) and later.config.correction_rank == 2
    again = replace(tiny_run("channel", text, "routers", start=tmp_path / "whole"), correction_rank=1)
    train(again, tmp_path / "again", progress=False)
    assert read_checkpoint(tmp_path / "again").tensors["corrections.0_down.up"].shape[1] == 1


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_step_takes_no_further_one(finished, text, tmp_path, monkeypatch):
    folder, run = tmp_path / "run", tiny_run("token", text)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(module, "calibrate_learned", raises)
        train(run, folder, progress=False)
    assert sound_checkpoint(folder / "work" / "routers").name == "checkpoint-10"
    routers, _ = train(run, folder, resume=True, progress=False)
    assert routers.step == 10
    same_run(folder, finished["token"])


@pytest.mark.slow
def test_kill_9_at_any_point_leaves_a_run_that_goes_on(finished, text, tmp_path):
    """Killed while it touches a file, usually one of a checkpoint, or at any moment; then run to the end."""
    folder, run = tmp_path / "run", tiny_run("token", text, save_steps=1)
    points, died = random.Random(0), 0
    for attempt in range(9):
        by_file = attempt % 3 < 2
        process = tiny_runs.start(tiny_runs.train_and_die, run, folder, points.randrange(1, 70) if by_file else None)
        process.join(None if by_file else 1 + points.random())
        process.kill()
        process.join()
        died += process.exitcode == -signal.SIGKILL
        for work in folder.glob("work/*/"):
            sound = sound_checkpoint(work)
            assert sound or len(list(work.glob("checkpoint-*"))) <= 1
        if (folder / "hat_config.json").exists():
            read_checkpoint(folder)
        if process.exitcode == 0:
            break
    assert died >= 3
    train(run, folder, resume=(folder / "run.json").exists(), progress=False)
    assert adapter(folder) == adapter(finished["token"]) and logged_steps(folder) == logged_steps(finished["token"])
    assert not (folder / "work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_in_the_folder_is_refused(finished, text, tmp_path, monkeypatch, resume):
    """Started while the first loads its base, before `run.json` exists; or a second ``--resume``."""
    folder, run = tmp_path / "run", tiny_run("token", text)
    if resume:
        interrupt_at(monkeypatch, ("routers", 5))
        train(run, folder, progress=False)
    load, refused = module.load_base, []

    def load_base(*args, **options):
        with pytest.raises(HatError, match=f"another process is training in {folder}: wait for it, or choose another"):
            train(run, folder, resume=resume, progress=False)
        refused.append(True)
        return load(*args, **options)

    monkeypatch.setattr(module, "load_base", load_base)
    train(run, folder, resume=resume, progress=False)
    assert refused == [True] and not (folder / "work").exists()
    same_run(folder, finished["token"])


def test_a_run_that_ended_between_the_look_and_the_lock_is_not_trained_over(finished, text, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def lock(path, lock=module._lock):
        shutil.copytree(finished["token"], folder)
        return lock(path)

    monkeypatch.setattr(module, "_lock", lock)
    with pytest.raises(HatError, match="already holds a run"):
        train(tiny_run("token", text), folder, progress=False)


def test_a_lock_that_cannot_be_taken(text, tmp_path):
    (tmp_path / "work" / ".lock").mkdir(parents=True)
    with pytest.raises(HatError, match="cannot write .*.lock: Is a directory"):
        train(tiny_run("token", text), tmp_path, progress=False)


@pytest.mark.parametrize("name", ["log.csv", "validation.csv", "hat_adapter.safetensors", "work"])
def test_a_folder_with_someone_elses_file_is_refused_and_left_as_it_is(text, tmp_path, name):
    mine = tmp_path / name
    if name == "work":
        mine.mkdir()
        mine /= "thesis.txt"
    mine.write_text("mine")
    with pytest.raises(HatError, match=f"already holds {name}, which training writes: choose another folder"):
        train(tiny_run("token", text), tmp_path, progress=False)
    assert mine.read_text() == "mine" and [p for p in tmp_path.rglob("*") if p.is_file()] == [mine]


@pytest.mark.parametrize("name", [".lock", ".run.json", "log.csv", "checkpoint-4"])
@pytest.mark.parametrize("new", [True, False])
def test_a_disk_that_is_full_before_the_first_checkpoint_leaves_the_folder_as_it_was(
    text, tmp_path, monkeypatch, name, new
):
    folder = tmp_path / "runs" / "run"
    if not new:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    before = set(tmp_path.rglob("*"))
    with monkeypatch.context() as patch, pytest.raises(HatError, match="cannot write .*(No space left|iostream error)"):
        fill_disk(patch, name)
        train(tiny_run("token", text), folder, progress=False)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_disk_that_is_full_later_leaves_a_run_that_goes_on(finished, text, tmp_path, monkeypatch):
    folder, run = tmp_path / "run", tiny_run("token", text)
    with monkeypatch.context() as patch, pytest.raises(HatError, match="cannot write a checkpoint to .*iostream error"):
        fill_disk(patch, "checkpoint-8")
        train(run, folder, progress=False)
    assert sound_checkpoint(folder / "work" / "routers").name == "checkpoint-4"
    train(run, folder, resume=True, progress=False)
    same_run(folder, finished["token"])


# What a run can start from


@pytest.mark.slow
def test_gates_alone_on_trained_routers(finished, text, tmp_path):
    run = tiny_run("token", text, phase="exit", start=finished["token"])
    (outcome,) = train(run, tmp_path / "run", progress=False)
    assert outcome.phase == "exit" and logged_steps(tmp_path / "run") == [("exit", step) for step in range(1, 11)]
    found, before = (read_checkpoint(folder) for folder in (tmp_path / "run", finished["token"]))
    routers = [name for name in found.tensors if name.startswith("routers.")]
    assert all(torch.equal(found.tensors[name], before.tensors[name]) for name in routers)
    assert adapter(tmp_path / "run") == adapter(finished["token"])  # as if it had continued by itself
    assert set(found.training) == set(before.training)


def test_a_start_that_cannot_be(text, finished, tmp_path, tiny_base, monkeypatch):
    monkeypatch.setattr(module, "load_base", lambda *args, **options: pytest.fail("a base was loaded"))

    def refused(run, words):
        with pytest.raises(HatError, match=words):
            train(run, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    refused(tiny_run("channel", text, start=finished["token"]), "has the token grain, channel was asked for")
    base = load_base("random:tiny", dtype="fp32")
    hat = HierarchicalTransformer(base, HatConfig.published(base))
    hat.save_pretrained(tmp_path / "plain")
    refused(tiny_run("token", text, start=tmp_path / "plain"), "plain has no calibration: start from what `hat calib")
    untrained = replace(read_checkpoint(finished["token"]), training=None)
    write_checkpoint(tmp_path / "untrained", untrained)
    run = tiny_run("token", text, phase="exit", start=tmp_path / "untrained")
    refused(run, "untrained has no trained routers: train them first with `hat train --phase routers --save DIR`")


def test_a_text_too_short_to_calibrate_on_is_told_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("A line of some words. " * 100)
    for name in ("training_text", "train_phase"):
        monkeypatch.setattr(module, name, lambda *args, **options: pytest.fail("too late"))
    words = "short.txt: .* validation split, which has 1.. tokens, expected at least 256: bring at least 3 times as"
    for grain in GRAINS:
        with pytest.raises(HatError, match=words):
            train(tiny_run(grain, tmp_path / "short.txt"), tmp_path / grain, progress=False)
        assert not (tmp_path / grain / "run.json").exists()


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
    train(tiny_run(grain, text, steps=2), tmp_path / "run", progress=False)
    part = {}
    for split in ("train", "validation"):
        part[split] = set(map(tuple, load_text(text, tiny_base.tokenizer, split=split, block_size=64)["input_ids"]))
    assert read.keys() == {*before, *after} - ({"calibrate"} if grain == "token" else set())
    for name, rows in read.items():
        assert set(rows) <= part["validation" if name in after else "train"], name
    assert read_checkpoint(tmp_path / "run").calibration.text.startswith(f"{text}, validation split, ")
