"""What a person types: every command end to end on a tiny base."""

import json
import math
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from tiny_runs import adaptive, new_hat, random_blocks
from typer.testing import CliRunner

from hat_lib.base import load as base
from hat_lib.base.shapes import byte_tokenizer, random_model
from hat_lib.calibration.exits import calibrate_exits
from hat_lib.checkpoint import read_checkpoint
from hat_lib.cli import options as shared
from hat_lib.cli.app import app
from hat_lib.config import REPO
from hat_lib.decoding import inference as generate
from hat_lib.decoding import speed
from hat_lib.decoding.generate import WEIGHT_FORMATS
from hat_lib.rows import read_rows
from studies.quality import Row

TINY = ("--base", "random:tiny")
DENSE = (*TINY, "--capacity", "1.0", "--dtype", "fp32")
PROMPT = "The state of our union is"


def test_something_is_said_before_anything_slow_is_imported():
    probe = "import sys, hat_lib.cli.app; from hat_lib.cli import options; options.start(None); "
    probe += "print({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPO, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "loading ...\n")


def test_help_breaks_no_word():
    sizes = {"terminal_width": 80}, {"terminal_width": 9999, "max_content_width": 9999}
    for command in app.registered_commands:
        args = [command.callback.__name__, "--help"]
        shown, whole = (CliRunner().invoke(app, args, **size).output.replace("-", "- ").split() for size in sizes)
        assert "Options:" in shown and set(shown) <= set(whole)


def test_generate_at_capacity_one_is_plain_transformers(run_hat):
    command = ("generate", *DENSE, "--max-new-tokens", 24, "--threads", 1)
    code, out, err = run_hat(*command, PROMPT)
    plain, tokenizer = random_model("random:tiny", torch.float32).eval(), byte_tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = plain.generate(**inputs, max_new_tokens=24, do_sample=False)
    text, _, last = out.rstrip("\n").rpartition("\n")
    assert code == 0 and err == "loading ...\n" and text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert last.startswith("[capacity 1.00 requested, 1.000 realised; exit rate 0.00 requested, 0.000 realised; ")


@pytest.mark.slow
def test_a_target_is_predicted_and_measured_anew(run_hat, calibrated, monkeypatch):
    turns = []
    monkeypatch.setenv("HAT_CACHE", str(calibrated.parent / "cache"))
    monkeypatch.setattr(speed, "timed", lambda hat, *_: turns.append(0) or 2 - hat.capacity)
    monkeypatch.setattr(generate, "timed", lambda *_: 1.25)
    command = ["generate", "--checkpoint", calibrated, PROMPT, "--max-new-tokens", 4, "--target-speedup", "1.3"]
    for options, rounds in (([], 1), ([], 1), (["--refresh-speed"], 2)):
        code, out, err = run_hat(*command, *options)
        assert code == 0 and len(turns) == rounds * len(speed.CAPACITIES) * speed.ROUNDS
        assert "1.3x here means capacity 0." in err and "was not measured" in err and "realised: 1.250x" in out


def test_show_compute_and_lossless(run_hat, calibrated):
    command = ["generate", "--checkpoint", calibrated, "--dtype", "fp32", PROMPT, "--max-new-tokens", 8]
    code, out, _ = run_hat(*command, "--show-compute")
    assert code == 0 and "compute spent predicting the token" in out
    code, out, _ = run_hat(*command, "--lossless", "--capacity", "0.5")
    assert code == 0 and "[drafts alone: capacity 0.50 requested" in out and "with verification" in out


def test_weights_in_fewer_bits(run_hat, calibrated, monkeypatch):
    command = ["generate", "--checkpoint", calibrated, "--dtype", "fp32", PROMPT, "--max-new-tokens", 4]
    for form in WEIGHT_FORMATS:
        code, out, err = run_hat(*command, "--weights", form)
        assert code == 0 and f"; engine ({'float32' if form == 'base' else form}, " in out and "warning" not in err
    monkeypatch.setattr("hat_lib.decoding.generate.UNAVAILABLE", "no numba")
    code, out, err = run_hat(*command, "--weights", "int8")
    assert code == 0 and "warning: --weights int8 changes nothing here" in err


def test_reference_checkpoint_is_used_for_the_bundled_base(calibrated, monkeypatch, run_hat):
    assert read_checkpoint(shared.DEFAULT).training["routers"]
    monkeypatch.setattr(shared, "DEFAULT", calibrated)  # one that names random:tiny as its base
    code, out, _ = run_hat("generate", PROMPT, "--max-new-tokens", 2)
    assert code == 0 and "capacity 0.75 requested" in out


@pytest.mark.slow
def test_calibrate_then_evaluate(run_hat, calibrated, text):
    evaluate = ("evaluate", "--checkpoint", calibrated, "--dtype", "fp32", "--text", text, "--capacity", "0.6")
    evaluate += ("--max-tokens", 1000, "--split", "train")
    code, out, err = run_hat(*evaluate, "--json")
    row = json.loads(out)  # nothing else on stdout
    assert code == 0 and row["requested_capacity"] == 0.6 and abs(row["capacity"] - 0.6) < 0.05
    assert row["increase"] == pytest.approx(row["perplexity"] / row["base_perplexity"] - 1)
    assert row["increase_low"] is None and (row["blocks"], row["tokens"]) == (2, 998)
    assert row["bits_per_byte"] == pytest.approx(math.log2(row["perplexity"]))  # a token of the tiny base is a byte
    (document,) = row["documents"]
    assert document["document"] == text.name and document["increase"] == pytest.approx(row["increase"])
    code, out, _ = run_hat(*evaluate, "--batch-size", 2, "--documents")
    assert code == 0 and f"{row['increase']:+.2%}" in out and row["text_hash"] in out and text.name in out
    assert "split test" in run_hat(*evaluate[:-2])[1]  # the checkpoint was made with it
    assert "the whole text" in run_hat(*evaluate[:-4], "--split", "all", "--max-tokens", 10**6)[1]


@pytest.mark.slow
def test_evaluate_counts_where_tokens_left(run_hat, text, tmp_path):
    model = new_hat("channel")
    calibrate_exits(model, random_blocks(8, 64), progress=False)  # untrained gates still give a table
    model.save_pretrained(tmp_path)
    options = ("evaluate", "--checkpoint", tmp_path, "--text", text, "--max-tokens", 1000, "--split", "train")
    options += ("--capacity", "1.0", "--exit-rate", "0.4")
    row = json.loads(run_hat(*options, "--json")[1])
    assert sum(row["exits"].values()) == 1000 and row["exit_rate"] == pytest.approx(1 - row["exits"]["4"] / 1000)
    assert f"{row['exits']['4']:7d} tokens" in run_hat(*options)[1]


@pytest.mark.slow
def test_evaluate_runs_tasks(run_hat, calibrated):
    pytest.importorskip("lm_eval")
    options = ("evaluate", "--checkpoint", calibrated, "--dtype", "fp32", "--capacity", "0.6", "--batch-size", 8)
    row = json.loads(run_hat(*options, "--tasks", "address_perplexity,address_cloze", "--json")[1])
    *cloze, words, bits = sorted(row["tasks"], key=lambda task: task["task"])
    assert [t["metric"] for t in (*cloze, words, bits)] == ["acc", "acc_norm", "word_perplexity", "bits_per_byte"]
    assert bits["value"] != bits["base"] and bits["samples"] == 28 and abs(row["capacity"] - 0.6) < 0.05


def test_token_grain_warns_in_one_line(run_hat, text, tmp_path):
    short = tmp_path / "short.md"
    short.write_text(text.read_text()[:4000])  # a token of the tiny base is a byte
    options = ("--save", tmp_path, "--text", short, "--tokens", 600, "--probe-tokens", 64, "--granularity", "token")
    code, out, err = run_hat("calibrate", *TINY, *options, "--capacity", "0.6")
    assert code == 0 and "by default 0.6" in out
    assert "calibration: about 1 min" in err and "short.md is too short for `hat train`" in err
    code, out, err = run_hat("generate", "--checkpoint", tmp_path, PROMPT, "--max-new-tokens", 4)
    assert code == 0 and "capacity 0.60 requested" in out and err.count("\n") == 2 and "warning: token grain" in err


@pytest.mark.slow
def test_sweep_resumes_and_draws(run_hat, tmp_path):
    model = adaptive("channel")
    model.save_pretrained(tmp_path / "untrained")
    model.training_summary = {"routers": {"steps": 1}}
    model.save_pretrained(tmp_path / "trained")
    out = tmp_path / "new" / "sweep.csv"
    options = ("--max-tokens", 1024, "--dtype", "fp32", "--grains", "channel", "--texts", "docstrings", "--seed", "0,1")
    options += ("--channel", tmp_path / "trained", "--channel-untrained", tmp_path / "untrained", "--write-prices")
    options += ("--variants", "trained,random", "--out", out)
    assert run_hat("sweep", *options, "--capacity", "0.6")[0] == 0
    rows = read_rows(out, Row)
    assert [(r.variant, r.seed) for r in rows] == [("trained", 0), ("random", 0), ("random", 1)]
    assert out.with_suffix(".png").stat().st_size > 5000
    code, printed, _ = run_hat("sweep", *options, "--capacity", "0.6,0.8")
    assert code == 0 and printed.count("channel  docstrings") == 3, "only what was missing"
    prices = read_checkpoint(tmp_path / "trained").prices
    assert {(p.text, p.capacity) for p in prices} == {("docstrings", 0.6), ("docstrings", 0.8)}
    before = out.read_bytes()
    code, printed, err = run_hat("sweep", *options, "--capacity", "0.7", "--dtype", "bf16")
    assert code == 2 and out.read_bytes() == before, "one table in two formats"
    assert "float32" in err and "bfloat16" in err and err.count("error:") == 1


def test_setup_reports_even_if_it_cannot_fetch(run_hat, monkeypatch, tmp_path):
    for name, value in {"HAT_CACHE": tmp_path / "not", "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    assert run_hat("setup", "--no-fetch", "--quiet") == (0, "", "")
    code, out, err = run_hat("setup", "--no-fetch")
    assert code == 0 and err == "" and out.count("not fetched") == 2 and not (tmp_path / "not").exists()
    code, out, err = run_hat("setup")
    assert code == 2 and "versions" in out and err.splitlines()[-1].startswith("error: could not fetch")


def test_ctrl_c_ends_with_130(run_hat, monkeypatch):
    monkeypatch.setattr(base, "load_base", Mock(side_effect=KeyboardInterrupt))
    code, out, err = run_hat("generate", *DENSE, "x")
    assert (code, out) == (130, "") and err.endswith("\ninterrupted\n")
