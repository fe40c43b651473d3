"""Grids and the commands that run them, on `random:tiny`: points, rows, resumption, figures, one error each."""

import math

import pandas as pd
import pytest
import torch
from tiny_runs import adaptive

from hat_lib.config import HatError
from hat_lib.experiments import published_claims as promise_module
from hat_lib.experiments.benchmark import Setting
from hat_lib.experiments.published_claims import PROMISED, SETTINGS, PromiseRow, promise
from hat_lib.experiments.quality import QualityRow
from hat_lib.experiments.rows import RowWriter, read_rows
from hat_lib.experiments.self_speculative import LosslessRow, lossless_rows, parting
from hat_lib.experiments.speed_targets import target_rows
from hat_lib.experiments.sweep import points
from hat_lib.inference.speed import SpeedCurve
from hat_lib.text import prompts as prompts_module
from hat_lib.text.prompts import LENGTH, prompts


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


class TestPoints:
    def test_each_where_it_means_something(self):
        found = points("channel", capacities=[1.0, 0.5], exit_rates=[0.0, 0.2], seeds=[0, 1], texts=["a"])
        assert len(set(found)) == len(found)
        assert [(p.capacity, p.exit_rate) for p in found if p.variant == "trained"] == [
            (1.0, 0.0), (1.0, 0.2), (0.5, 0.0), (0.5, 0.2)
        ]  # fmt: skip
        assert {p.seed for p in found if p.variant == "random"} == {0, 1}
        assert {p.seed for p in found if p.variant in ("trained", "untrained", "cosine")} == {0}
        assert {(p.capacity, p.exit_rate) for p in found if p.variant == "random"} == {(0.5, 0.0)}
        assert {p.exit_rate for p in found if p.variant == "random_exits"} == {0.2}

    @pytest.mark.parametrize(
        ("axis", "values", "words"),
        [
            ("capacities", [0.05], "capacity must be"),
            ("capacities", [], "at least one capacity"),
            ("capacities", [0.5, 0.5], "capacity 0.5 stands twice"),
            ("exit_rates", [1.5], "exit rate must be"),
            ("seeds", [-1], "a seed must be"),
            ("variants", ["lucky"], "variants must be among trained, untrained"),
        ],
    )
    def test_bad_axes(self, axis, values, words):
        with pytest.raises(HatError, match=words):
            points("channel", **{"capacities": [0.5], axis: values})


def test_sweep_writes_goes_on_and_draws(checkpoints, hat, tmp_path):
    def sweep(*changes):
        return hat(
            "sweep", "--out", tmp_path / "new" / "sweep.csv", "--grains", "channel", "--texts", "docstrings",
            "--max-tokens", 1024, "--variants", "trained,random,random_exits", "--channel", checkpoints / "channel",
            "--channel-untrained", checkpoints / "channel_untrained", "--dtype", "fp32", *changes,
        )  # fmt: skip

    code, out, err = sweep("--capacity", "0.6,0.9", "--exit-rate", "0,0.3", "--seed", "0,1")
    assert code == 0, err
    rows = read_rows(tmp_path / "new" / "sweep.csv", QualityRow)
    assert len(rows) == 4 + 4 + 4 and (tmp_path / "new" / "sweep.png").stat().st_size > 5000
    lucky = [r for r in rows if r.variant == "random" and r.capacity == 0.6]
    assert {r.seed for r in lucky} == {0, 1} and len({r.ppl for r in lucky}) == 2
    code, out, _ = sweep("--capacity", "0.6,0.8", "--exit-rate", "0,0.3", "--seed", "0,1")
    assert code == 0 and out.count("channel  docstrings") == 6, "only what was missing"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--capacity", "0.5,abc"), "--capacity takes numbers, comma-separated, got '0.5,abc'"),
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
    assert not list(tmp_path.iterdir())


def test_unwritable_results(hat, tmp_path):
    (tmp_path / "file").write_text("")
    for command in (("sweep",), ("promise",), ("targets",), ("lossless",)):
        code, out, err = hat(*command, "--out", tmp_path / "file" / "x.csv")
        assert code == 2 and out == "" and "is not a folder" in err


class TestPrompts:
    def test_two_hundred_of_five_kinds(self, tiny_base):
        found = prompts(tiny_base.tokenizer, 200)
        assert len({p.text for p in found}) == 200 and found == prompts(tiny_base.tokenizer, 200)
        assert [p.kind for p in found[:5]] == ["address", "docstring", "code", "topic", "list"]
        assert all(p.text.strip() for p in found)
        cut = [p.text for p in found if p.kind in ("address", "docstring")]
        assert all(len(tiny_base.tokenizer(t).input_ids) <= LENGTH + 1 for t in cut)

    @pytest.mark.parametrize("count", [0, 201])
    def test_there_are_no_others(self, tiny_base, count):
        with pytest.raises(HatError, match="prompts must be a whole number of at least 1, at most 200"):
            prompts(tiny_base.tokenizer, count)


class TestLossless:
    def test_rows_and_resumption(self, checkpoints, tmp_path):
        out = tmp_path / "self_speculative.csv"
        how = {"capacity": 0.5, "dtype": "fp32", "max_new_tokens": 8}
        rows = list(lossless_rows(out, checkpoints / "channel", count=5, **how))
        assert [r.prompt for r in rows] == list(range(5)) and all(r.identical for r in rows)
        assert all(r.new_tokens == r.accepted + r.passes for r in rows if r.new_tokens == 8)
        assert all(min(r.ms_hf, r.ms_dense, r.ms_lossless, r.ms_early_exit) > 0 for r in rows)
        assert all(r.early_exit_identical for r in rows), "transformers' own is lossless, too"
        more = list(lossless_rows(out, checkpoints / "channel", count=7, **how))
        assert [(r.prompt, r.ms_early_exit, r.early_exit_identical) for r in more] == [(5, None, None), (6, None, None)]
        assert read_rows(out, LosslessRow) == rows + more

    def test_where_two_texts_part(self):
        logits = tuple(torch.tensor([[1.0, top, top - gap]]) for top, gap in [(8.0, 1.0), (3.0, 0.03125), (200.0, 1.0)])
        base = torch.tensor([1, 1, 1])
        assert parting(base, base, logits) == (None, None)
        # Between 2 and 4 a bf16 has steps of 2^-6, between 128 and 256 of 1.
        assert parting(base, torch.tensor([1, 2, 1]), logits) == (1, 2.0)
        assert parting(base, torch.tensor([1, 1, 2]), logits) == (2, 1.0)
        assert parting(base, base[:2], logits) == (2, 1.0), "one ended, the other did not"
        assert parting(base[:2], base, logits) == (2, 1.0)


def test_targets(checkpoints, monkeypatch, tmp_path):
    curve = SpeedCurve("dense", 0.0, [0.1, 1.0], [1.15, 1.0], "cpu")
    monkeypatch.setattr("hat_lib.inference.generate.speed_curve", lambda *_, **__: curve)
    rows = list(target_rows([checkpoints / "token"], dtype="fp32", count=2, max_new_tokens=6))
    assert [(r.requested, r.reachable) for r in rows] == [(1.05, True), (1.1, True), (1.15, True), (1.2, False)]
    for r in rows:
        if r.reachable:
            assert r.predicted == pytest.approx(r.requested, abs=1e-3) and r.lowest <= r.measured <= r.highest
        else:
            assert r.capacity is None and r.measured is None and r.largest == 1.15


class TestPromise:
    @pytest.fixture
    def quality(self, tmp_path):
        """As `hat quality` would have written it: increases that say where they belong."""
        path = tmp_path / "quality.csv"
        with RowWriter(path, QualityRow, key=("granularity", "text", "capacity", "exit_rate")) as writer:
            for granularity in ("channel", "token"):
                for text in ("addresses", "docstrings"):
                    for s in SETTINGS:
                        n = s.capacity + (10 if text == "docstrings" else 0) + (100 if granularity == "token" else 0)
                        writer.write(QualityRow(granularity, text, 1, *s, "trained", 0, s.capacity, s.exit_rate, 1.0,
                                                1.0, 1.0, n, n - 1, n + 1, 1.0, 0.0, 0.0, 0.0, 0.0, 1, 1, "", "", "",
                                                "cpu", "float32", 1))  # fmt: skip
        return path

    def test_rows(self, checkpoints, quality, monkeypatch):
        monkeypatch.setattr(promise_module, "SHAPE", "random:tiny")
        found = {"channel": checkpoints / "channel", "token": checkpoints / "token"}
        rows = list(promise(found, quality, dtype="fp32", rounds=1, steps=40))
        assert len(rows) == 4 * len(SETTINGS) and all(isinstance(r, PromiseRow) for r in rows)
        real, forced = rows[: len(SETTINGS)], rows[len(SETTINGS) : 2 * len(SETTINGS)]
        assert (
            [Setting(r.capacity, r.exit_rate) for r in real] == SETTINGS == [(r.capacity, r.exit_rate) for r in forced]
        )
        for r, shape in zip(real, forced, strict=True):
            assert r.addresses == r.capacity and (r.docstrings_low, r.docstrings_high) == (
                r.capacity + 9,
                r.capacity + 11,
            )
            assert shape.addresses is None, "a shape without weights has no quality"
            assert shape.realised == pytest.approx(r.realised, abs=0.05), "forced to what was realised"
            assert (shape.realised_exit > 0) == (r.exit_rate > 0)
            assert r.promised_speedup == (PROMISED[r.capacity][0] if r.exit_rate == 0 else None)
            assert min(r.decode_dense, r.decode_hf, r.prefill_dense, r.prefill_hf) > 0
        assert rows[-1].granularity == "token" and rows[2 * len(SETTINGS)].addresses == 100.9

    def test_without_its_quality(self, checkpoints, quality):
        lines = quality.read_text().splitlines(keepends=True)
        quality.write_text("".join(lines[:4]))
        with pytest.raises(HatError, match="run `hat quality` first"):
            next(promise({"channel": checkpoints / "channel"}, quality))


def test_command_lines(checkpoints, hat, tmp_path, monkeypatch):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "cache"))
    code, out, err = hat("lossless", "--checkpoint", checkpoints / "token", "--prompts", 2, "--max-new-tokens", 4,
                         "--dtype", "fp32", "--out", tmp_path / "l.csv")  # fmt: skip
    assert code == 0 and "token 0.5 float32: 2 of 2 identical" in out, err
    curve = SpeedCurve("dense", 0.0, [0.1, 1.0], [1.15, 1.0], "cpu")
    monkeypatch.setattr("hat_lib.inference.generate.speed_curve", lambda *_, **__: curve)
    monkeypatch.setattr(prompts_module, "LENGTH", 8)
    code, out, err = hat("targets", "--channel", checkpoints / "channel", "--token", checkpoints / "token", "--dtype",
                         "fp32", "--prompts", 1, "--out", tmp_path / "t.csv")  # fmt: skip
    assert code == 0 and "token    1.200 over dense: at most 1.150" in out, err
    frame = pd.read_csv(tmp_path / "t.csv")
    assert len(frame) == 8 and math.isnan(frame["measured"].iloc[-1])
