"""`hat sweep` on `random:tiny`: rows, resumption, the figure, one error each."""

from pathlib import Path

import pytest
from tiny_runs import adaptive

from hat_lib.experiments.quality import Row
from hat_lib.experiments.rows import read_rows


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for grain in ("channel", "token"):
        hat = adaptive(grain)
        hat.training_summary = {"routers": {"steps": 1}}
        hat.save_pretrained(folder / grain)
        hat.training_summary = None
        hat.save_pretrained(folder / f"{grain}_untrained")
    return folder


@pytest.fixture
def hat(run_hat):
    return run_hat


@pytest.mark.slow
def test_sweep_writes_goes_on_and_draws(checkpoints, hat, tmp_path):
    def sweep(*changes):
        return hat(
            "sweep", "--out", tmp_path / "new" / "sweep.csv", "--grains", "channel", "--texts", "docstrings",
            "--max-tokens", 1024, "--variants", "trained,random,random_exits", "--channel", checkpoints / "channel",
            "--channel-untrained", checkpoints / "channel_untrained", "--dtype", "fp32", *changes,
        )  # fmt: skip

    code, out, err = sweep("--capacity", "0.6,0.9", "--exit-rate", "0,0.3", "--seed", "0,1")
    assert code == 0, err
    rows = read_rows(tmp_path / "new" / "sweep.csv", Row)
    assert len(rows) == 4 + 4 + 4 and (tmp_path / "new" / "sweep.png").stat().st_size > 5000
    lucky = [r for r in rows if r.variant == "random" and r.capacity == 0.6]
    assert {r.seed for r in lucky} == {0, 1} and len({r.ppl for r in lucky}) == 2
    assert "capacity and exit rate as requested, and (realised); they differ, for thresholds" in out
    code, out, _ = sweep("--capacity", "0.6,0.8", "--exit-rate", "0,0.3", "--seed", "0,1")
    assert code == 0 and out.count("channel  docstrings") == 6, "only what was missing"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--capacity", "0.5,abc"), "--capacity takes numbers, comma-separated, got '0.5,abc'"),
        (("--out", "x.png"), "--out must be a .csv file, beside which the figure goes as .png, got x.png"),
        (("--capacity", "1.5"), "capacity must be a number"),
        (("--capacity", ","), "--capacity takes numbers, comma-separated, got ','"),
        (("--seed", "0.5"), "--seed takes numbers"),
        (("--grains", "word"), "grains must be among channel, token, got 'word'"),
        (("--variants", "trained,lucky"), "variants must be among"),
        (("--texts", "nowhere"), "nowhere"),
        (("--max-tokens", "1"), "max tokens must be a whole number of at least 1024"),
    ],
)
def test_a_grid_typo_before_anything_is_loaded(hat, tmp_path, monkeypatch, args, words):
    monkeypatch.setattr("hat_lib.backbone.base.load_base", None)
    code, out, err = hat("sweep", "--out", tmp_path / "sweep.csv", *args)
    assert code == 2 and out == "" and err.count("error: ") == 1 and words in err
    assert not list(tmp_path.iterdir()) and not Path("x.png").exists()


def test_unwritable_results(hat, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = hat("sweep", "--out", tmp_path / "file" / "x.csv")
    assert code == 2 and out == "" and "is not a folder" in err
