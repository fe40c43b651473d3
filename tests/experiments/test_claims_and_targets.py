"""Published claims, speed targets and self-speculative decoding, measured on `random:tiny`."""

import pytest
import torch
from tiny_runs import adaptive

from hat_lib.config import DATA, HatError
from hat_lib.experiments import published_claims, quality, self_speculative, speed_targets
from hat_lib.experiments.published_claims import PROMISED, SETTINGS
from hat_lib.experiments.rows import RowWriter, read_rows
from hat_lib.experiments.self_speculative import parting
from hat_lib.inference.speed import SpeedCurve


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for grain in ("channel", "token"):
        adaptive(grain).save_pretrained(folder / grain)
    return folder


class TestLossless:
    def test_rows_and_resumption(self, checkpoints):
        how = {"checkpoint": checkpoints / "channel", "capacity": 0.5, "dtypes": ["fp32"], "max_new_tokens": 8}
        rows = list(self_speculative.rows(count=5, **how))
        assert [r.prompt for r in rows] == list(range(5)) and all(r.identical for r in rows)
        assert all(r.new_tokens == r.accepted + r.passes for r in rows if r.new_tokens == 8)
        assert all(min(r.ms_hf, r.ms_dense, r.ms_lossless, r.ms_early_exit) > 0 for r in rows)
        done = {tuple(getattr(r, name) for name in self_speculative.KEY) for r in rows}
        more = list(self_speculative.rows(done, count=7, **how))
        assert [(r.prompt, r.ms_early_exit) for r in more] == [(5, None), (6, None)]

    def test_where_two_texts_part(self):
        logits = tuple(torch.tensor([[1.0, top, top - gap]]) for top, gap in [(8.0, 1.0), (3.0, 0.03125), (200.0, 1.0)])
        base = torch.tensor([1, 1, 1])
        assert parting(base, base, logits) == (None, None)
        # Between 2 and 4 a bf16 has steps of 2^-6, between 128 and 256 of 1.
        assert parting(base, torch.tensor([1, 2, 1]), logits) == (1, 2.0)
        assert parting(base, torch.tensor([1, 1, 2]), logits) == (2, 1.0)
        assert parting(base, base[:2], logits) == (2, 1.0), "one ended, the other did not"
        assert parting(base[:2], base, logits) == (2, 1.0)


def test_targets(checkpoints, monkeypatch):
    curve = SpeedCurve("dense", 0.0, [0.1, 1.0], [1.15, 1.0], "cpu")
    monkeypatch.setattr("hat_lib.inference.generate.speed_curve", lambda *_, **__: curve)
    folders = {"channel": checkpoints / "channel", "token": checkpoints / "token"}
    done = {("channel", "dense", target) for target in (1.05, 1.1, 1.15, 1.2)}
    rows = list(speed_targets.rows(done, **folders, dtype="fp32", count=2, max_new_tokens=6))
    assert [(r.requested, r.reachable) for r in rows] == [(1.05, True), (1.1, True), (1.15, True), (1.2, False)]
    assert {r.granularity for r in rows} == {"token"}
    for r in rows:
        if r.reachable:
            assert r.predicted == pytest.approx(r.requested, abs=1e-3) and r.lowest <= r.measured <= r.highest
        else:
            assert r.capacity is None and r.measured is None and r.largest == 1.15


class TestPromise:
    @pytest.fixture
    def results(self, tmp_path):
        """As it would have been measured: increases that say where they belong."""
        template = read_rows(DATA / "results" / "quality.csv", quality.Row)[0]
        with RowWriter(tmp_path / "quality.csv", quality.Row, quality.KEY) as writer:
            for granularity in ("channel", "token"):
                for text in ("addresses", "docstrings"):
                    for s in SETTINGS:
                        n = s.capacity + (10 if text == "docstrings" else 0) + (100 if granularity == "token" else 0)
                        point = quality.Point(granularity, text, 1, *s, "trained")
                        cost = {"increase": n, "increase_low": n - 1, "increase_high": n + 1}
                        writer.write(quality.Row(**vars(template) | point._asdict() | cost))
        return tmp_path

    def test_rows(self, checkpoints, results, monkeypatch):
        monkeypatch.setattr(published_claims, "SHAPE", "random:tiny")
        how = {"channel": checkpoints / "channel", "token": checkpoints / "token", "results": results}
        rows = list(published_claims.rows(**how, dtype="fp32", rounds=1, steps=40))
        assert len(rows) == 4 * len(SETTINGS)
        real, forced = rows[: len(SETTINGS)], rows[len(SETTINGS) : 2 * len(SETTINGS)]
        assert all([(r.capacity, r.exit_rate) for r in rows] == SETTINGS for rows in (real, forced))
        for r, shape in zip(real, forced, strict=True):
            assert r.addresses == r.capacity
            assert (r.docstrings_low, r.docstrings_high) == (r.capacity + 9, r.capacity + 11)
            assert shape.addresses is None, "a shape without weights has no quality"
            assert shape.realised == pytest.approx(r.realised, abs=0.05), "forced to what was realised"
            assert (shape.realised_exit > 0) == (r.exit_rate > 0)
            assert r.promised_speedup == (PROMISED[r.capacity][0] if r.exit_rate == 0 else None)
            assert min(r.decode_dense, r.decode_hf, r.prefill_dense, r.prefill_hf) > 0
        assert rows[-1].granularity == "token" and rows[2 * len(SETTINGS)].addresses == 100.9

    def test_without_its_quality(self, results):
        file = results / "quality.csv"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
        with pytest.raises(HatError, match="run `hat reproduce quality` first"):
            next(published_claims.rows(results=results))
