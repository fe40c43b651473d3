"""`hat analyze`: five lines of findings, tables on request, and files in which no text is interpreted."""

import json

import numpy as np
import pandas as pd
import pytest
import tiny_runs

from hat_lib.evaluation import routing
from hat_lib.evaluation.tokens import LOSSES, token_table
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import load_text
from hat_lib.text.plain import cell

TEXT = "In 2025 Ada met 3 of the Kings, and they didn’t say a naïve word 🦙.\nThe quick brown fox jumps. " * 5
HOSTILE = "\x1b[31m red \x1b]0;title\x07 \u202eback =1+1 @SUM -2 \r"
HEADINGS = ("classes", "positions", "quantiles", "layers", "rank correlations", "share of the base's work")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_runs.new_hat("channel").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "page.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT}{HOSTILE}"}) + "\n" for i in range(40)))
    return path


@pytest.fixture
def run(run_hat, monkeypatch):
    monkeypatch.setattr(routing, "RESAMPLES", 50)
    return lambda *args: run_hat("analyze", *args)


@pytest.mark.slow
def test_five_lines_of_findings_then_tables_and_files_that_read_back(run, checkpoint, text, tmp_path):
    out = tmp_path / "new" / "analysis"
    options = ("--checkpoint", checkpoint, "--text", text, "--capacity", 0.6, "--max-tokens", 1500, "--dtype", "fp32")
    code, short, err = run(*options)
    assert code == 0, err
    title, *findings = short.splitlines()
    assert title == f"{text}: 1500 tokens in 5 blocks"
    assert [line.split()[0] for line in findings] == ["measured", "work", "classes", "layers", "difficulty"]
    assert "split all; --max-tokens measures more" in findings[0] and "0.60 requested" in findings[1]
    assert "most work: " in findings[2] and "least work: layer " in findings[3] and "surprisal" in findings[4]

    code, printed, err = run(*options, "--tables", "--out", out)
    assert code == 0 and printed.startswith(short) and "error" not in err and "Warning" not in err
    assert all(f"\n{heading}" in printed for heading in HEADINGS)
    figures = {"layer_map.png", "classes.png", "positions.png", "quantiles.png"}
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(files) == figures | {f"{n}.csv" for n in ("tokens", *routing.TABLES)} | {"text.html"}
    assert all(files[name].startswith(b"\x89PNG") for name in figures)

    tokens = pd.read_csv(out / "tokens.csv", keep_default_na=False, na_values={f"{n}_of_token": [""] for n in LOSSES})
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype="fp32")
    hat.capacity = 0.6
    found = token_table(hat, load_text(text, hat.base.tokenizer, split="all", max_tokens=1500), progress=False)
    assert tokens["text"].tolist() == found.tokens["text"].map(cell).tolist()
    np.testing.assert_allclose(tokens["share"], found.tokens["share"], rtol=1e-5)
    np.testing.assert_allclose(tokens["surprisal_of_token"], found.tokens["surprisal_of_token"], rtol=1e-5)
    for name, make in routing.TABLES.items():
        table = pd.read_csv(out / f"{name}.csv", keep_default_na=False, na_values={c: [""] for c in ("low", "high")})
        numbers = table.select_dtypes("number").columns
        assert table.shape == (expected := make(found)).shape and len(numbers) >= 4
        np.testing.assert_allclose(table[numbers], expected[numbers].astype(float), rtol=1e-5, atol=1e-12)
    page = files["text.html"].decode()
    assert page.startswith("<!doctype html>") and page.count("background:#") == 5 + (tokens["text"] != "").sum()

    assert "\x1b" in "".join(found.tokens["text"]) and {"=", "@", "-"} <= set(found.tokens["text"])
    for written in (printed, err, *(files[name].decode() for name in files if name not in figures)):
        assert not {"\x1b", "\x07", "\u202e"} & set(written)
    assert {"'=", "'@", "'-", r"\x1b"} <= set(tokens["text"]) and not tokens["text"].str.match("[=+@-]").any()


def test_command_says_so_where_one_block_has_no_interval(run, checkpoint, text):
    code, printed, err = run("--checkpoint", checkpoint, "--text", text, "--max-tokens", "60", "--capacity", "1.0")
    assert code == 0 and "60 tokens in 1 blocks" in printed and "every class ran 100.0%" in printed
    assert "no interval" in err and "got 1" in err
