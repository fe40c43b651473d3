"""A run from nothing to a checkpoint, stopped and resumed. For kills, see tests/soak; for the command,
test_train_command.py."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import GRAINS, adaptive, interrupt_at, logged_steps, new_hat, page, tiny, tiny_run, untrained

from hat_lib.base.load import exact_hash
from hat_lib.checkpoint import ADAPTER_FILE, CONFIG_FILE, Price, read_checkpoint, write_checkpoint, write_prices
from hat_lib.config import HatError
from hat_lib.hat import HierarchicalTransformer
from hat_lib.text.blocks import load_text
from hat_lib.training import run as module
from hat_lib.training.objective import nominal_thresholds
from hat_lib.training.run import RUN_FILE, start_from, train

pytestmark = pytest.mark.filterwarnings("ignore:token grain")
STEPS, TIMES = 3, ["seconds", "tokens_per_second", "eta_seconds"]


@pytest.fixture(scope="module", autouse=True)
def calibrated_once():
    """One untrained calibration for all runs: it takes longer than all else in them. `test_torchrun` has its own."""

    def calibrate(hat, blocks, **options):
        hat.calibration = new_hat("channel").calibration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "calibrate", calibrate)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return page(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=GRAINS)
def finished(request, tmp_path_factory, text):
    """The grain and folder of an undisturbed run of both phases, with corrections at the channel grain."""
    folder = tmp_path_factory.mktemp("finished")
    train(asked(request.param, text), folder, progress=False)
    return request.param, folder


def asked(grain, text, command="", **changes):
    run = tiny_run(grain, text, steps=STEPS, **changes)
    return replace(run, correction_rank=2 if grain == "channel" else None, command=command)


@pytest.mark.parametrize("grain", GRAINS)
def test_nominal_thresholds_at_capacity_one_keep_everything(grain):
    hat = new_hat(grain)
    with torch.no_grad(), hat.using(hat.threshold_policy(nominal_thresholds(hat)(1.0))):
        hat.lm(torch.arange(5, 25)[None])
    assert hat.trace.capacity == 1.0


def test_a_finished_run(finished, tiny_base):
    grain, folder = finished
    assert {path.name for path in folder.iterdir()} == {"hat_config.json", ADAPTER_FILE, "log.csv", "run.json"}
    assert logged_steps(folder) == [(phase, step + 1) for phase in ("routers", "exit") for step in range(STEPS)]
    checkpoint = read_checkpoint(folder)
    assert checkpoint.base_fingerprint == tiny_base.fingerprint and checkpoint.calibration.method == "learned"
    assert set(checkpoint.training) == {"routers", "exit", "exit_agreement", "recipe", "command", "inputs"}
    assert checkpoint.training["routers"]["steps"] == checkpoint.training["exit"]["steps"] == STEPS
    learned = {n: t for n, t in checkpoint.tensors.items() if n.startswith("corrections.")}
    assert bool(learned) == (grain == "channel")
    assert all(t.any() for n, t in learned.items() if n.endswith((".up", ".shift")))


def test_an_interrupted_run_is_the_undisturbed_one(finished, text, tmp_path, monkeypatch, tiny_base):
    """Ctrl-C in step 2 of the routers and in the last of the gates. The base stays; no global random state counts."""
    (grain, expected), folder, bases, load = finished, tmp_path / "run", [], module.load_base
    monkeypatch.setattr(module, "load_base", lambda *args, **how: bases.append(load(*args, **how)) or bases[-1])
    torch.manual_seed(9)
    interrupt_at(monkeypatch, ("routers", 2), ("exit", 3))
    ended = [[(o.phase, o.step, o.stopped) for o in train(asked(grain, text), folder, resume=resume, progress=False)]
             for resume in (False, True, True)]  # fmt: skip
    assert ended == [[("routers", 2, "interrupt")], [("routers", 3, ""), ("exit", 3, "interrupt")], [("exit", 3, "")]]
    assert (folder / ADAPTER_FILE).read_bytes() == (expected / ADAPTER_FILE).read_bytes()
    assert read_checkpoint(folder).calibration == read_checkpoint(expected).calibration
    found, whole = (pd.read_csv(at / "log.csv").drop(columns=TIMES) for at in (folder, expected))
    pd.testing.assert_frame_equal(found, whole, check_exact=True)
    assert all(exact_hash(base.model) == exact_hash(tiny_base.model) for base in bases)


def test_a_second_training_in_the_folder_is_refused(text, tmp_path, monkeypatch):
    folder, run = tmp_path / "run", replace(asked("token", text), max_steps=1, phase="routers")
    load, refused = module.load_base, []

    def load_base(*args, **options):
        for resume in (False, True):
            with pytest.raises(HatError, match="nothing to resume" if resume else "another process"):
                train(run, folder, resume=resume, progress=False)
            refused.append(resume)
        return load(*args, **options)

    monkeypatch.setattr(module, "load_base", load_base)
    train(run, folder, progress=False)
    assert refused == [False, True] and not (folder / "work").exists()
    with pytest.raises(HatError, match="already holds a run"):
        train(run, folder, progress=False)
    assert not (folder / "work").exists()


def test_new_gates_are_not_calibrated(text, tmp_path):
    adaptive("channel").save_pretrained(tmp_path / "start")
    train(asked("channel", text, phase="routers", start=tmp_path / "start"), tmp_path / "run", progress=False)
    fresh = start_from(read_checkpoint(tmp_path / "start"), tiny(), "start")
    for hat in (fresh, HierarchicalTransformer.from_pretrained(tmp_path / "run")):
        with pytest.raises(HatError, match="needs trained exit gates"):
            hat.exit_rate = 0.3


def test_a_run_goes_on_only_as_it_was_asked_for_and_with_what_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "cache"))
    text, curve, start, folder, old = (tmp_path / f for f in ("page.txt", "curve.txt", "start", "run", "old"))
    shutil.copy(page(tmp_path), curve)
    new_hat("channel").save_pretrained(start)
    run = asked("channel", f"{text}+self", "first", phase="routers", start=start, validation=str(curve))
    train(run, folder, max_minutes=1e-9, progress=False)
    shutil.copytree(folder, old)

    def refused(what, run=run):
        with pytest.raises(HatError, match=f"^[^\n]*{what}[^\n]*$"):
            train(run, folder, resume=True, progress=False)

    (drawn := next(tmp_path.rglob("*.npz"))).unlink()
    for name, file, before, after in (
        ("text .*page.txt", text, b"Line 0:", b"Line 9:"),
        ("held-out .*page.txt", text, b"Line 111", b"Line 911"),
        ("validation .*curve.txt", curve, b"Line 111", b"Line 911"),
        ("start", start / CONFIG_FILE, b'"protected_tokens": 2', b'"protected_tokens": 3'),
    ):
        kept = file.read_bytes()
        file.write_bytes(kept.replace(before, after))
        refused(f": {name} was SHA-256 .*, now SHA-256 ")
        file.write_bytes(kept)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_base", lambda *args, **options: replace(tiny(), fingerprint="0" * 64))
        refused(": base was SHA-256 .*, now SHA-256 0")
    refused("max_steps 3, 9", replace(run, max_steps=9))
    refused("router_lr 0.003, 1.0", replace(run, recipe=replace(run.recipe, router_lr=1.0)))
    adaptive("channel").save_pretrained(folder)
    refused(f"{CONFIG_FILE} is not of the run")
    (folder / CONFIG_FILE).unlink()
    assert not drawn.exists()  # before the base writes its text anew
    np.savez(drawn, input_ids=np.ones((64, 64), int))
    refused("text self was SHA-256 .*, now SHA-256 ")
    drawn.unlink()
    write_prices(start, [Price("any", 0.5, 0.5, 0.1, None, None, 20.0, 100)])  # which train nothing
    assert train(replace(run, command="second"), folder, resume=True, progress=False)[0].done
    assert read_checkpoint(folder).training["command"] == "first"

    meta = json.loads((old / RUN_FILE).read_text())
    del meta["inputs"]  # as an older version wrote it
    (old / RUN_FILE).write_text(json.dumps(meta))
    assert train(run, old, resume=True, progress=False)[0].done and not train(run, old, resume=True, progress=False)


def test_what_an_abandoned_run_left_is_not_taken_over(finished, text, tmp_path, monkeypatch):
    """States and logs, beside which ``run.json`` and the checkpoint were deleted."""
    (grain, alone), folder = finished, tmp_path / "run"
    interrupt_at(monkeypatch, ("exit", 2))
    train(asked(grain, text, seed=1), folder, progress=False)
    for name in (RUN_FILE, CONFIG_FILE, ADAPTER_FILE):
        (folder / name).unlink()
    (folder / "validation.csv").touch()
    for resume in (False, True):
        train(asked(grain, text), folder, resume=resume, max_minutes=None if resume else 1e-9, progress=False)
    assert (folder / ADAPTER_FILE).read_bytes() == (alone / ADAPTER_FILE).read_bytes()
    assert not (folder / "validation.csv").exists()


@pytest.mark.slow
def test_gates_alone_on_trained_routers(finished, text, tmp_path):
    grain, trained = finished
    run = replace(asked(grain, text, phase="exit", start=trained), correction_rank=None)
    (outcome,) = train(run, tmp_path / "run", progress=False)
    assert outcome.phase == "exit" and logged_steps(tmp_path / "run") == [("exit", n + 1) for n in range(STEPS)]
    found, before = read_checkpoint(tmp_path / "run"), read_checkpoint(trained)
    assert set(found.training) == set(before.training)
    same = [name for name, tensor in found.tensors.items() if torch.equal(tensor, before.tensors[name])]
    assert same == list(found.tensors)  # as if it had continued by itself


def test_what_cannot_be_trained_is_refused_before_the_training(text, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("A line of some words. " * 100)  # too short to calibrate on
    monkeypatch.setattr(module, "training_text", lambda *args, **options: pytest.fail("too late"))
    with pytest.raises(HatError, match="short.txt"):
        train(asked("token", tmp_path / "short.txt"), tmp_path / "new" / "short", progress=False)
    assert not (tmp_path / "new").exists()
    untrained("token").save_pretrained(tmp_path / "plain")
    new_hat("channel").save_pretrained(tmp_path / "made")
    made = read_checkpoint(tmp_path / "made")
    write_checkpoint(tmp_path / "untrained", replace(made, training=None))
    write_checkpoint(tmp_path / "trained", replace(made, training={"routers": {"steps": 1}}))
    monkeypatch.setattr(module, "load_base", lambda *args, **options: pytest.fail("a base was loaded"))
    for run in (
        tiny_run("channel", text, start=tmp_path / "plain"),  # of the other grain
        tiny_run("token", text, start=tmp_path / "plain"),  # no calibration
        tiny_run("channel", text, phase="exit", start=tmp_path / "untrained"),  # no trained routers
        asked("channel", text, phase="exit", start=tmp_path / "trained"),  # corrections, which it does not train
    ):
        with pytest.raises(HatError, match="plain|trained"):
            train(run, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


PARTS = {"train_phase": "train", "calibrate": "train"}
PARTS |= {"calibrate_learned": "validation", "calibrate_exits": "validation"}


@pytest.mark.slow
def test_calibration_after_training_reads_what_training_did_not(text, tmp_path, monkeypatch, tiny_base):
    read = {name: [] for name in PARTS}

    def note(name, function, hat, blocks, *args, **options):
        read[name] += map(tuple, blocks["input_ids"] if name == "train_phase" else blocks)
        return function(hat, blocks, *args, **options)

    for name in PARTS:
        monkeypatch.setattr(module, name, partial(note, name, getattr(module, name)))
    train(tiny_run("channel", text, steps=1), tmp_path / "run", progress=False)
    for name, split in PARTS.items():
        blocks = load_text(text, tiny_base.tokenizer, split=split, block_size=64)
        assert read[name] and set(read[name]) <= set(map(tuple, blocks["input_ids"])), name
