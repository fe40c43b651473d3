"""Quality rows on `random:tiny`: complete, paired, at equal work, and resumed without a change."""

import pytest
import torch

from hat_lib.backbone.base import load_base
from hat_lib.calibration.capacity import calibrate
from hat_lib.calibration.exits import calibrate_exits
from hat_lib.config import HatConfig, HatError
from hat_lib.experiments import quality as module
from hat_lib.experiments.quality import Grain, Point, QualityRow, plan, quality
from hat_lib.experiments.rows import read_rows
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import load_text

TOKENS = 600
VARIANTS = ("trained", "untrained", "random", "static", "removal")


def points(granularity):
    found = [Point(granularity, "docstrings", TOKENS, 0.7, 0.0, variant) for variant in VARIANTS]
    return found + [Point(granularity, "docstrings", TOKENS, 1.0, 0.5, v) for v in ("trained", "random_exits")]


@pytest.fixture(scope="module")
def grain(tmp_path_factory):
    """Checkpoints of `random:tiny`: calibrated, and with other scales and gates in place of trained ones."""
    folder = tmp_path_factory.mktemp("quality")
    base = load_base("random:tiny", dtype=torch.float32, device="cpu")
    hat = HierarchicalTransformer(base, HatConfig.default(base))
    text = load_text("addresses", base.tokenizer, split="train", block_size=128, max_tokens=1024)["input_ids"]
    calibrate(hat, text, probe_tokens=128, progress=False)
    hat.save_pretrained(folder / "untrained")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in hat.hat_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    calibrate(hat, text, probe_tokens=128, progress=False)
    calibrate_exits(hat, text, progress=False)
    hat.training_summary = {"routers": {"steps": 1}}
    hat.save_pretrained(folder / "trained")
    hat.unload()
    return Grain(folder / "trained", folder / "untrained")


@pytest.fixture(scope="module")
def measured(grain, tmp_path_factory):
    out = tmp_path_factory.mktemp("rows") / "quality.csv"
    rows = list(quality(out, {"channel": grain}, dtype="fp32", points=points, progress=False))
    assert read_rows(out, QualityRow) == rows
    return out, {(r.variant, r.exit_rate): r for r in rows}


def test_every_point_once_at_equal_work(measured):
    rows = measured[1]
    assert set(rows) == {(v, 0.0) for v in VARIANTS} | {("trained", 0.5), ("random_exits", 0.5)}
    trained = rows["trained", 0.0]
    assert trained.realised == pytest.approx(0.7, abs=0.05)
    for variant in VARIANTS:
        row = rows[variant, 0.0]
        assert row.realised == pytest.approx(trained.realised, abs=0.02)
        assert row.increase_low <= row.increase <= row.increase_high
        assert row.increase == pytest.approx(row.ppl / row.base_ppl - 1, abs=1e-4)
        assert row.margin == pytest.approx(row.ppl / trained.ppl - 1, abs=1e-4)
        assert row.kl > 0 and 0 < row.top1 <= 1
    assert trained.margin == trained.margin_low == trained.margin_high == 0
    gates, drawn = rows["trained", 0.5], rows["random_exits", 0.5]
    assert gates.realised_exit > 0.2
    assert drawn.realised_exit == pytest.approx(gates.realised_exit, abs=0.08)


def test_a_stopped_run_goes_on_and_ends_alike(measured, grain, tmp_path):
    whole, out = measured[0], tmp_path / "quality.csv"
    lines = whole.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]))
    rows = list(quality(out, {"channel": grain}, dtype="fp32", points=points, progress=False))
    assert len(rows) == len(lines) - 3
    assert out.read_text() == whole.read_text()
    assert list(quality(out, {"channel": grain}, dtype="fp32", points=points, progress=False)) == []


def test_rows_of_another_checkpoint_are_refused_and_kept(measured, grain, tmp_path):
    out = tmp_path / "quality.csv"
    text = measured[0].read_text()
    out.write_text(text.replace(next(iter(measured[1].values())).adapter, "0" * 16))
    before = out.read_text()
    with pytest.raises(HatError, match="holds rows of another channel checkpoint"):
        list(quality(out, {"channel": grain}, points=points))
    assert out.read_text() == before


def test_gates_that_are_trained_again_leave_rows_without_exits_valid(measured, grain, tmp_path):
    out = tmp_path / "quality.csv"
    header, *rows = measured[0].read_text().splitlines(keepends=True)
    out.write_text(header + "".join(row for row in rows if row.split(",")[4] == "0.0"))
    kept, other = out.read_text(), tmp_path / "again"
    hat = HierarchicalTransformer.from_pretrained(grain.trained, dtype="fp32")
    with torch.no_grad():
        for gate in hat.gates.values():
            gate.shift.add_(1.0)
    hat.save_pretrained(other)
    run = quality(out, {"channel": grain._replace(trained=other)}, dtype="fp32", points=points, progress=False)
    assert {row.exit_rate for row in run} == {0.5}
    assert out.read_text().startswith(kept)


def test_refusals(grain, tmp_path):
    with pytest.raises(HatError, match="has the channel grain, expected token"):
        list(quality(tmp_path / "a.csv", {"token": grain}, dtype="fp32", points=points))
    with pytest.raises(HatError, match="was trained: expected a checkpoint as `hat calibrate` writes it"):
        list(quality(tmp_path / "b.csv", {"channel": grain._replace(untrained=grain.trained)}))
    with pytest.raises(HatError, match="make it with `hat train`"):
        list(quality(tmp_path / "b.csv", {"channel": grain._replace(trained=tmp_path / "none")}))


def test_a_control_out_of_reach_costs_no_other_row(grain, tmp_path, monkeypatch):
    def refuse(*_):
        raise HatError("its nearest is 0.9")

    monkeypatch.setitem(module.CONTROLS, "static", refuse)
    run = quality(tmp_path / "quality.csv", {"channel": grain}, dtype="fp32", points=points, progress=False)
    with pytest.warns(UserWarning, match="no row for static at 0.7 on docstrings: its nearest is 0.9"):
        found = list(run)
    assert [r.variant for r in found] == ["trained", "untrained", "random", "removal", "trained", "random_exits"]


def test_the_plan_has_what_the_result_must_show():
    found = set(plan("channel"))
    assert len(found) == len(plan("channel"))
    for text in module.TEXTS:
        for capacity in (0.75, 0.62):
            for variant in ("trained", "untrained"):
                assert Point("channel", text, 20_000, capacity, 0.0, variant) in found
        for variant in ("untrained", "random", "static", "cosine", "removal"):
            assert sum(p.variant == variant and p.text == text and p.max_tokens == 4000 for p in found) >= 3
        assert Point("channel", text, 4000, 1.0, 0.3, "random_exits") in found
