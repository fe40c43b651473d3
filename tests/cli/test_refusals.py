"""Every wrong input gives one line that names it, before a base is loaded unless the base itself is what is wrong."""

import json
import os
import sys

import pytest
import torch
from tiny_runs import page, tiny_run

from hat_lib.backbone.shapes import byte_tokenizer, random_model
from hat_lib.cli import options as shared
from hat_lib.model.checkpoint import CONFIG_FILE

TINY = ("--base", "random:tiny")
DENSE = (*TINY, "--capacity", "1.0", "--dtype", "fp32")
GO = ("generate", *DENSE, "--prompt", "x")
TARGET = ("generate", "--prompt", "x", "--target-speedup")
EVALUATE = ("evaluate", *DENSE)
CALIBRATE = ("calibrate", "--save", "new")
SWEEP = ("sweep", "--out", "sweep.csv")
ANALYZE = ("analyze", *DENSE)
TRAIN = ("train", *TINY, "--profile", "quick", "--dtype", "fp32", "--granularity", "token", "--save", "run")
MINE = (*TRAIN, "--text", "mine.txt")
WHERE = "pass either --save DIR for a new run or --resume DIR for one that was stopped"


@pytest.mark.parametrize(
    "args, words",
    [
        *(((*command, "--capacity", value), f"capacity must be a number in [0.1, 1.0], got {value!r}")
          for command, value in ((("generate", "--prompt", "x"), "0.05"), (("evaluate",), "nan"), (CALIBRATE, ""),
                                 (("analyze",), "70%"))),
        *(((*command, "--exit-rate", value), f"exit rate must be a number in [0.0, 1.0], got {value!r}")
          for command, value in ((("generate", "--prompt", "x"), "2"), (("evaluate",), "nan"), (("analyze",), "half"))),
        (("generate", "--prompt", " \n\t"), "the prompt is empty: expected text to continue"),
        (("generate", "--prompt", "caf\udce9"), "the prompt is not UTF-8 text"),
        ((*GO, "--max-new-tokens", "0"), "at least 1, got 0"),
        ((*GO, "--temperature", "1e-300"), "or a number of at least 0.001, got 1e-300"),
        ((*GO, "--seed", str(2**64)), "at most 18446744073709551615, got 18446744073709551616"),
        ((*TARGET, "fast"), "target speedup must be a number above 0, at most 10"),
        ((*GO, "--target-speedup", "1.1"), "--target-speedup chooses the capacity: leave out --capacity"),
        ((*TARGET, "1.1", "--lossless"), "leave out --lossless"),
        ((*GO, "--refresh-speed"), "--refresh-speed measures for a target: add --target-speedup"),
        ((*GO, "--lossless", "--show-compute"), "with --lossless the base decides on every token"),
        ((*GO, "--lossless", "--steer"), "--steer holds a text to a capacity; with --lossless"),
        ((*GO, "--versus", "gpu"), "versus must be one of dense, hf, got 'gpu'"),
        ((*GO, "--weights", "int3"), "--weights must be one of base, int8"),
        ((*GO, "--dtype", "int3"), "dtype must be one of"),
        (("generate", *TINY, "--prompt", "x"), "no checkpoint for random:tiny: make one with `hat calibrate"),
        (("generate", "--prompt", "x", "--checkpoint", "gone"), "no checkpoint 'gone'"),
        (("evaluate", "--capacity", "1.0", "--base", "random:huge"), "unknown base 'random:huge': expected bundled"),
        ((*EVALUATE, "--max-tokens", "1"), "max tokens must be a whole number of at least 2, got 1"),
        ((*EVALUATE, "--split", "dev"), "split must be one of train, validation, test, all, got 'dev'"),
        ((*EVALUATE, "--text", "wikitext"), "unknown corpus 'wikitext': expected bundled, addresses"),
        ((*EVALUATE, "--text", "no/such.txt"), "no/such.txt: no such file"),
        ((*EVALUATE, "--batch-size", "0"), "batch size must be a whole number of at least 1, got 0"),
        ((*EVALUATE, "--tasks-path", "."), "--tasks-path needs --tasks NAME[,NAME]"),
        ((*EVALUATE, "--tasks", ","), "--tasks takes NAME[,NAME], got ','"),
        ((*EVALUATE, "--tasks", "a", "--text", "docstrings"), "--tasks brings its own text"),
        ((*EVALUATE, "--tasks", "a", "--documents"), "leave out --text, --split, --max-tokens and --documents"),
        ((*CALIBRATE, "--granularity", "head"), "granularity must be among channel, token"),
        ((*CALIBRATE, "--dtype", "int3"), "dtype must be one of"),
        ((*CALIBRATE, "--tokens", "100"), "tokens must be a whole number of at least 256, got 100"),
        ((*CALIBRATE, "--probe-tokens", "-1"), "probe tokens must be a whole number of at least 16"),
        ((*CALIBRATE, "--text", "docstrings"), "docstrings has no 'validation' split"),
        ((*SWEEP, "--capacity", "0.5,abc"), "--capacity takes numbers, comma-separated, got '0.5,abc'"),
        (("sweep", "--out", "x.png"), "--out must be a .csv file, beside which the figure goes as .png, got x.png"),
        ((*SWEEP, "--seed", "0.5"), "--seed takes numbers"),
        ((*SWEEP, "--grains", "word"), "grains must be among channel, token, got 'word'"),
        ((*SWEEP, "--variants", "trained,lucky"), "variants must be among"),
        ((*SWEEP, "--variants", "random_exits"), "nothing to measure at these settings"),
        ((*SWEEP, "--grains", "token", "--variants", "static"), "static, uncorrected and no_exits the channel grain"),
        ((*SWEEP, "--texts", "nowhere"), "nowhere"),
        ((*SWEEP, "--max-tokens", "1"), "max tokens must be a whole number of at least 1024"),
        ((*SWEEP, "--dtype", "int8"), "int8"),
        ((*ANALYZE, "--out", __file__), "is not a folder"),
        (("train",), WHERE),
        (("train", "--save", "a", "--resume", "b"), WHERE),
        (("train", "--resume", "gone", "--set", "warmup=1"), "--resume goes on as the run was asked for: leave out"),
        (("train", "--resume", "gone"), "nothing to resume in gone: run.json is missing"),
        ((*MINE, "--phase", "gates"), "phase must be one of routers, exit, full, got 'gates'"),
        ((*MINE, "--granularity", "block"), "granularity must be one of channel, token, got 'block'"),
        ((*MINE, "--dtype", "int8"), "dtype must be one of "),
        ((*TRAIN, "--text", "poems"), "unknown corpus 'poems'"),
        ((*TRAIN, "--text", "self+self"), "distinct sources joined by +, got 'self+self'"),
        ((*TRAIN, "--text", "docstrings"), "it is never trained or calibrated on"),
        ((*TRAIN, "--set", "validation=docstrings"), "docstrings has no 'validation' split"),
        ((*MINE, "--max-minutes", "nan"), "max minutes must be above 0, got nan"),
        ((*MINE, "--set", "speed=3"), "a recipe has no 'speed'; it has text, tokens, "),
        ((*MINE, "--set", "router_lr"), "--set takes NAME=VALUE, got 'router_lr'"),
        ((*MINE, "--set", "tokens=1e5"), "tokens must be a whole number of at least 2, got 100000.0"),
        ((*MINE, "--phase", "exit"), "phase exit needs trained routers: pass --checkpoint DIR of a run with --phase"),
        ((*MINE, "--checkpoint", "gone"), "no checkpoint 'gone'"),
    ],
)  # fmt: skip
def test_wrong_options(refuses, no_base, args, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page(tmp_path).rename("mine.txt")
    refuses(args, words)


@pytest.mark.parametrize("command", [EVALUATE, (*CALIBRATE, *TINY)])
def test_a_wrong_text_file(refuses, no_base, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a text.txt").write_bytes(b"abc\0def")
    refuses((*command, "--text", "a text.txt"), "a text.txt is not text: NUL at byte 3")


def test_a_folder_that_cannot_be_written(refuses, no_base, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    for save in (file, file / "sub"):
        refuses((*CALIBRATE[:1], *TINY, "--save", save), f"cannot write a checkpoint to {save}", "is not a folder")
    refuses(("sweep", "--out", file / "x.csv"), "is not a folder")
    refuses((*TRAIN, "--save", file), "is not a folder")
    (tmp_path / "run.json").write_text("{}")
    refuses((*MINE, "--text", page(tmp_path), "--save", tmp_path), "already holds a run or a checkpoint: resume it, or")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refuses, no_base, tmp_path):
    tmp_path.chmod(0o500)
    refuses((*CALIBRATE[:1], *TINY, "--save", tmp_path / "new"), "cannot write a checkpoint", "Permission denied")


def test_checkpoints_that_are_missing_or_damaged(refuses, no_base, monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "DEFAULT", tmp_path / "gone")
    refuses(("generate", "--prompt", "x"), str(tmp_path / "gone"), "calibrated")
    (tmp_path / CONFIG_FILE).write_text("{")
    refuses(("evaluate", "--text", "docstrings", "--checkpoint", tmp_path), CONFIG_FILE)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda run: "not JSON", "Expecting value"),
        (lambda run: "[]", "run.json is not what `hat train` wrote"),
        (lambda run: json.dumps({k: v for k, v in run.items() if k != "dtype"}), "missing or unknown fields ['dtype']"),
        (lambda run: json.dumps(run | {"phase": 3}), "phase must be one of"),
        (lambda run: json.dumps(run | {"recipe": run["recipe"] | {"tokens": "many"}}), "tokens must be a whole number"),
        (lambda run: json.dumps(run | {"max_steps": "few"}), "max_steps must be"),
    ],
)
def test_a_damaged_run_file(refuses, no_base, tmp_path, change, words):
    tiny_run("token", page(tmp_path)).write(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(change(json.loads(path.read_text())))
    refuses(("train", "--resume", tmp_path), words)


@pytest.mark.parametrize("name", ["address_cloze", "no_such_task"])
def test_tasks_without_lm_eval(refuses, no_base, monkeypatch, name):
    for module in [module for module in sys.modules if module.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refuses((*EVALUATE, "--tasks", name), 'tasks need lm-evaluation-harness: pip install -e ".[eval]"')


def test_wrong_tasks(refuses, no_base, tmp_path):
    pytest.importorskip("lm_eval")
    refuses((*EVALUATE, "--tasks", "arc"), "unknown task 'arc': ", " has address_cloze, address_perplexity")
    gone = tmp_path / "gone"
    refuses((*EVALUATE, "--tasks", "arc", "--tasks-path", gone), f"no folder of tasks at {gone}")


# What can only be known from the base


def test_a_checkpoint_for_another_base(refuses, calibrated, tmp_path):
    random_model("random:tiny", torch.float32, seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    options = ("--checkpoint", calibrated[0], "--base", tmp_path / "other")
    words = "was made for random:tiny with fingerprint 137fe20082f6", f"{tmp_path / 'other'} has "
    refuses(("generate", "--prompt", "x", *options), *words)


def test_what_base_and_text_do_not_allow(refuses, calibrated, tmp_path):
    exits = ("generate", "--prompt", "x", "--checkpoint", calibrated[0], "--exit-rate", "0.2")
    refuses(exits, "exit rate 0.2 needs trained exit gates")
    long = ("generate", *DENSE, "--prompt", "x" * 2000, "--max-new-tokens", "49")
    refuses(long, "2000 prompt tokens + 49 new ones", "context of random:tiny: 2048")
    mine = tmp_path / "a.txt"
    mine.write_text("x")
    refuses((*EVALUATE, "--text", mine), str(mine), "fewer than two tokens")
    options = ("calibrate", *TINY, "--save", tmp_path / "new", "--text", mine)
    refuses(options, "fewer than two tokens")
    mine.write_text("only a few words " * 12)
    refuses(options, "calibration needs at least 256 tokens of text")
    refuses((*ANALYZE, "--text", mine, "--max-tokens", 2), "all 2 tokens are protected; use longer text")
