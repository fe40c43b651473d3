"""A wrong input is one line that names it, before a base is loaded unless the base itself is wrong."""

import inspect

import pytest
import torch
from tiny_runs import page

from hat_lib.base import load as base
from hat_lib.base.shapes import byte_tokenizer, random_model
from hat_lib.cli.app import app

TINY = ("--base", "random:tiny")
DENSE = (*TINY, "--capacity", "1.0", "--dtype", "fp32")
GO = ("generate", "x", *DENSE)
EVALUATE = ("evaluate", *DENSE)
CALIBRATE = ("calibrate", "--save", "new")
SWEEP = ("sweep", "--out", "sweep.csv")
TRAIN = ("train", *TINY, "--profile", "quick", "--dtype", "fp32", "--granularity", "token", "--save", "run")
MINE = (*TRAIN, "--text", "mine.txt")


@pytest.fixture
def refuses(run_hat, tmp_path):
    """A command fails with one ``error:`` line that has the word in it, prints nothing else and writes nothing."""

    def run(args, word):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run_hat(*args)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and out == "" and len(errors) == 1 and word in errors[0], (code, out, err)
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.mark.parametrize(
    "args, word",
    [
        (("generate",), 'hat generate "'),
        (("explain", " "), 'hat explain "'),
        (("generate", "a \udcff"), "udcff"),
        ((*GO, "--temperature", "1e-300"), "1e-300"),
        (("generate", "x", "--target-speedup", "fast"), "fast"),
        ((*GO, "--target-speedup", "1.1"), "--capacity"),
        ((*GO, "--refresh-speed"), "--target-speedup"),
        ((*GO, "--lossless", "--steer"), "--steer"),
        (("generate", "x", *TINY), "hat calibrate"),
        (("generate", "x", "--base", "gone.gguf"), "unknown base 'gone.gguf'"),
        (("generate", "x", "--checkpoint", "gone"), "gone"),
        ((*EVALUATE, "--text", "no/such.md"), "no/such.md"),
        ((*EVALUATE, "--tasks-path", "."), "--tasks"),
        ((*EVALUATE, "--tasks", "a", "--documents"), "--documents"),
        ((*CALIBRATE, "--granularity", "block"), "block"),
        ((*CALIBRATE, "--text", "docstrings"), "docstrings"),
        ((*SWEEP, "--seed", "0,abc"), "seed"),
        (("sweep", "--out", "x.png"), "x.png"),
        ((*SWEEP, "--grains", "word"), "word"),
        ((*SWEEP, "--variants", "trained,lucky"), "lucky"),
        ((*SWEEP, "--variants", "random_exits"), "nothing to measure"),
        (("analyze", *DENSE, "--out", __file__), "test_refusals.py"),
        (("train",), "--resume"),
        (("train", "--resume", "gone", "--set", "warmup=1"), "--set"),
        (("train", "--resume", "gone"), "gone"),
        ((*MINE, "--phase", "gates"), "gates"),
        ((*TRAIN, "--text", "poems"), "poems"),
        ((*MINE, "--max-minutes", "nan"), "nan"),
        ((*MINE, "--phase", "exit"), "--checkpoint"),
        ((*MINE, "--checkpoint", "gone"), "gone"),
    ],
)
def test_wrong_options(refuses, args, word, monkeypatch, tmp_path):
    monkeypatch.setattr(base, "fingerprint", lambda *_: pytest.fail("a base was loaded before the arguments checked"))
    monkeypatch.chdir(tmp_path)
    page(tmp_path).rename("mine.txt")
    refuses(args, word)


@pytest.mark.parametrize("option, value", [("capacity", "1.5"), ("exit_rate", "half"), ("dtype", "int3")])
def test_a_wrong_value_is_refused_at_once(run_hat, option, value):
    for command in app.registered_commands:
        if option in inspect.signature(command.callback).parameters:
            name = command.callback.__name__
            args = (f"--{option.replace('_', '-')}", value, *(SWEEP[1:] if name == "sweep" else ()))
            code, out, err = run_hat(name, *args)
            assert (code, out) == (2, "") and err.startswith("error: ") and repr(value) in err


@pytest.mark.parametrize("args", [("generat",), (*GO, "--weights", "int3"), (*EVALUATE, "--max-tokens", "1")])
def test_a_usage_error_starts_nothing(run_hat, args):
    code, out, err = run_hat(*args)
    assert code == 2 and out == "" and "Error" in err and "Traceback" not in err


def test_what_base_and_text_do_not_allow(refuses, calibrated, tmp_path):
    random_model("random:tiny", torch.float32, seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    refuses(("generate", "x", "--checkpoint", calibrated, "--base", tmp_path / "other"), "fingerprint")
    refuses(("generate", "x", "--checkpoint", calibrated, "--exit-rate", "0.2"), "exit rate 0.2")
    refuses(("generate", "x" * 2000, *DENSE, "--max-new-tokens", "49"), "2048")
    mine = tmp_path / "a.txt"
    mine.write_text("only a few words " * 12)
    refuses(("calibrate", *TINY, "--save", tmp_path / "new", "--text", mine), "256")
    refuses(("analyze", *DENSE, "--text", mine, "--max-tokens", 2), "protected")
