"""`hat analyze`: findings, tables on request, and files in which no text is interpreted."""

import json

import pandas as pd
import pytest
import tiny_runs

from hat_lib.evaluation import routing

TEXT = "In 2025 Ada met 3 of the Kings, and they didn’t say a naïve word 🦙.\nThe quick brown fox jumps. " * 5
HOSTILE = "\x1b[31m red \x1b]0;title\x07 \u202eback =1+1 @SUM -2 \r"


@pytest.fixture
def run(run_hat, monkeypatch, tmp_path):
    monkeypatch.setattr(routing, "RESAMPLES", 50)
    tiny_runs.new_hat("channel").save_pretrained(tmp_path / "tiny")
    path = tmp_path / "page.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT}{HOSTILE}"}) + "\n" for i in range(40)))
    options = ("--checkpoint", tmp_path / "tiny", "--text", path, "--dtype", "fp32")
    return lambda *more: run_hat("analyze", *options, *more)


@pytest.mark.slow
def test_findings_tables_and_files(run, tmp_path):
    out = tmp_path / "new" / "analysis"
    code, printed, err = run("--capacity", 0.6, "--max-tokens", 600, "--tables", "--out", out)
    assert code == 0, err
    title, *findings = printed.splitlines()[:6]
    assert "600 tokens in 3 blocks" in title
    assert [line.split()[0] for line in findings] == ["measured", "work", "classes", "layers", "difficulty"]
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    figures = {name for name in files if name.endswith(".png")}
    assert set(files) - figures == {f"{n}.csv" for n in ("tokens", *routing.TABLES)} | {"text.html"} and figures
    tokens = pd.read_csv(out / "tokens.csv", keep_default_na=False)
    assert len(tokens) == 600 and not tokens["text"].str.match("[=+@-]").any()
    for written in (printed, err, *(files[name].decode() for name in set(files) - figures)):
        assert not {"\x1b", "\x07", "\u202e"} & set(written)


def test_one_block_has_no_interval(run):
    code, printed, err = run("--max-tokens", "60", "--capacity", "1.0")
    assert code == 0 and "60 tokens in 1 blocks" in printed and "no interval" in err
