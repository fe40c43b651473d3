"""Quality rows on `random:tiny`: complete, paired, at equal work, and unchanged by resuming."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny_runs import adaptive, new_hat

from hat_lib.checkpoint import read_checkpoint, write_checkpoint
from hat_lib.config import HatError
from hat_lib.evaluation import equal_work as module
from hat_lib.evaluation.controls import EQUAL, OutOfReach
from hat_lib.evaluation.equal_work import Point, Row, grid
from hat_lib.hat import HierarchicalTransformer
from hat_lib.rows import RowWriter, read_rows
from studies.common import saved
from studies.quality import KEY, plan

pytestmark = pytest.mark.slow

TOKENS = 3600
VARIANTS = ("trained", "uncorrected", "untrained", "random", "static", "removal")
POINTS = [Point("channel", "docstrings", TOKENS, 0.7, 0.0, variant) for variant in VARIANTS]
POINTS += [Point("channel", "docstrings", TOKENS, 1.0, 0.5, v) for v in ("trained", "random_exits", "no_exits")]
POINTS += [Point("channel", "docstrings", TOKENS, 1.0, 0.0, "fine_tuned")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Checkpoints of `random:tiny`: calibrated, and with other scales and gates standing in for trained ones."""
    folder, trained = tmp_path_factory.mktemp("quality"), adaptive("channel", correction_rank=2)
    new_hat("channel").save_pretrained(folder / "untrained")
    trained.training_summary = {"routers": {"steps": 1}}
    trained.save_pretrained(folder / "trained")
    return folder / "trained", folder / "untrained"


def quality(out, pair, points=POINTS, grain="channel", dtype="fp32"):
    with RowWriter(out, Row, KEY) as writer:
        for row in module.rows(writer.done, {grain: pair}, points, dtype, out):
            writer.write(row)
            yield row


@pytest.fixture(scope="module")
def measured(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("rows") / "quality.csv"
    rows = list(quality(out, pair))
    assert read_rows(out, Row) == rows
    return out, {(r.variant, r.exit_rate): r for r in rows}


def test_every_point_once_at_equal_work(measured):
    rows = measured[1]
    exits = {(v, 0.5) for v in ("trained", "random_exits", "no_exits")}
    assert set(rows) == {(v, 0.0) for v in (*VARIANTS, "fine_tuned")} | exits
    trained, gates = rows["trained", 0.0], rows["trained", 0.5]
    for (variant, rate), row in rows.items():
        partner = gates if rate else rows["fine_tuned", 0.0] if variant == "fine_tuned" else trained
        if variant != "random_exits":
            assert row.model_share == pytest.approx(partner.model_share, abs=EQUAL + 1e-5)
        assert row.increase == pytest.approx(row.ppl / row.base_ppl - 1, abs=1e-4)
        assert row.increase_low <= row.increase <= row.increase_high and row.margin_low <= row.margin <= row.margin_high
        if variant != "fine_tuned":
            assert row.margin == pytest.approx(row.ppl / partner.ppl - 1, abs=1e-4)
    assert rows["fine_tuned", 0.0].realised == 1 and rows["no_exits", 0.5].realised_exit == 0
    drawn = rows["random_exits", 0.5]
    assert drawn.realised_exit == pytest.approx(gates.realised_exit, abs=0.04)  # five standard errors of the draw


def test_rows_of_other_gates_are_refused_and_those_without_exits_stay_valid(measured, pair, tmp_path):
    out = tmp_path / "quality.csv"
    pd.read_csv(measured[0]).query("exit_rate == 0").to_csv(out, index=False)
    hat = HierarchicalTransformer.from_pretrained(pair[0], dtype="fp32")
    with torch.no_grad():
        for gate in hat.gates.values():
            gate.shift.add_(1.0)
    hat.save_pretrained(tmp_path / "again")
    assert {row.exit_rate for row in quality(out, (tmp_path / "again", pair[1]))} == {0.5}
    with pytest.raises(HatError):
        list(quality(out, pair))


def test_rows_of_an_edited_text_or_another_dtype_are_refused_before_anything_is_measured(pair, tmp_path, monkeypatch):
    path, out = tmp_path / "mine.txt", tmp_path / "rows.csv"
    path.write_text("A text of one's own, which is long enough to be measured. " * 20)
    at = Point("channel", str(path), 1024, 0.123456, 0.0, "trained")
    (first,) = quality(out, pair, [at])
    assert first.capacity == at.capacity and not list(quality(out, pair, [at])), "measured again"
    monkeypatch.setattr(module, "score_each", None)
    with pytest.raises(HatError, match="float32.*bfloat16"):
        list(quality(out, pair, [at], dtype="bf16"))
    path.write_text(path.read_text().replace("own", "sister's"))
    for points in ([POINTS[0], at], [at], [at._replace(capacity=0.5)], [at._replace(max_tokens=1025)]):
        with pytest.raises(HatError, match=f"rows.csv.*mine.txt.*{first.text_hash}"):
            list(quality(out, pair, points))
    moved = replace(read_checkpoint(pair[0]), base="random:tiny-qwen3")
    with pytest.raises(HatError, match="base random:tiny, now it is random:tiny-qwen3"):
        list(quality(out, (write_checkpoint(tmp_path / "moved", moved), pair[1]), [POINTS[0]]))
    with pytest.raises(HatError, match="bfloat16, float32"):
        module.prices(pd.DataFrame([first, replace(first, dtype="bfloat16")]), "channel")


def test_refusals(pair, tmp_path):
    trained, untrained = pair
    for grain, checkpoints in (
        ("token", pair),
        ("channel", (untrained, untrained)),
        ("channel", (trained, trained)),
        ("channel", (tmp_path / "none", untrained)),
    ):
        with pytest.raises(HatError):
            list(quality(tmp_path / "a.csv", checkpoints, grain=grain))


def test_a_control_out_of_reach_costs_no_other_row(pair, tmp_path, monkeypatch):
    def refuse(*_):
        raise OutOfReach("its nearest is 0.9")

    monkeypatch.setitem(module.CONTROLS, "static", refuse)
    points = [p for p in POINTS if p.variant in ("trained", "static", "random") and p.exit_rate == 0]
    with pytest.warns(UserWarning, match="static"):
        assert {row.variant for row in quality(tmp_path / "a.csv", pair, points)} == {"trained", "random"}


def test_a_grid_has_each_point_where_it_means_something():
    found = grid(["channel"], capacities=[1.0, 0.5], exit_rates=[0.0, 0.2], seeds=[0, 1], texts=["a"])
    assert len(set(found)) == len(found)
    trained = [(p.capacity, p.exit_rate) for p in found if p.variant == "trained"]
    assert trained == [(1.0, 0.0), (1.0, 0.2), (0.5, 0.0), (0.5, 0.2)]
    assert {p.seed for p in found if p.variant == "random"} == {0, 1}
    assert {p.seed for p in found if p.variant in ("trained", "untrained", "cosine")} == {0}
    assert {(p.capacity, p.exit_rate) for p in found if p.variant == "random"} == {(0.5, 0.0)}
    assert {p.exit_rate for p in found if p.variant == "random_exits"} == {0.2}
    for bad in ({"capacities": [0.05]}, {"exit_rates": [1.5]}, {"variants": ["lucky"]}):
        with pytest.raises(HatError):
            grid(["channel"], **{"capacities": [0.5], **bad})


def test_prices_of_the_committed_checkpoints_are_those_of_the_results():
    table = saved("quality")
    for name, grain, variant in (("default", "channel", "trained"), ("calibrated", "channel", "untrained"),
                                 ("token", "token", "trained")):  # fmt: skip
        assert read_checkpoint(name).prices == module.prices(table, grain, variant)
    assert read_checkpoint("published").prices == module.prices(saved("published"), "token")
    assert read_checkpoint("token_stand_ins").prices == module.prices(saved("stand_ins"), "token")


def test_price_texts():
    known = [module.Price("news", capacity, capacity, cost, None, None, 20.0, 4000)
             for capacity, cost in ((0.5, 0.21), (0.7, 0.1))]  # fmt: skip
    assert module.price_texts(known, 0.7) == {"news": "+10%"} and module.price_texts(known, 1.0) == {"news": "+0%"}
    assert module.price_texts(known, 0.6) == {"news": "+15%"}, "half way in the logarithm"
    assert module.price_texts(known, 0.4) == {"news": "more than +21%"} and module.price_texts([], 0.5) == {}


@pytest.mark.parametrize(("grain", "name"), [("channel", "default"), ("token", "token")])
def test_the_committed_rows_are_as_planned_and_of_the_committed_checkpoints(grain, name):
    found = read_checkpoint(name)
    rows = saved("quality").query("granularity == @grain")
    assert sorted(rows[list(KEY)].itertuples(index=False, name=None)) == sorted(plan(grain))
    assert set(rows["adapter"]) == {module.adapter_digest(found, exits) for exits in (False, True)}
