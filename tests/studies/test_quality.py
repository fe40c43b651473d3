"""Quality rows on `random:tiny`: complete, paired, at equal work, and unchanged by resuming."""

import pandas as pd
import pytest
import torch
from tiny_runs import adaptive, new_hat

from hat_lib.config import DATA, HatError
from hat_lib.evaluation import equal_work as module
from hat_lib.evaluation.controls import EQUAL, OutOfReach
from hat_lib.evaluation.equal_work import Point, Row, grid
from hat_lib.model.checkpoint import read_checkpoint
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.rows import RowWriter, read_rows
from studies import quality as study
from studies import stand_ins
from studies.common import TEXTS, saved
from studies.quality import KEY, plan

TOKENS = 3600
VARIANTS = ("trained", "uncorrected", "untrained", "random", "static", "removal")
POINTS = [Point("channel", "docstrings", TOKENS, 0.7, 0.0, variant) for variant in VARIANTS]
POINTS += [Point("channel", "docstrings", TOKENS, 1.0, 0.5, v) for v in ("trained", "random_exits", "no_exits")]
POINTS += [Point("channel", "docstrings", TOKENS, 1.0, 0.0, "fine_tuned")]


@pytest.fixture(scope="module")
def grain(tmp_path_factory):
    """Checkpoints of `random:tiny`: calibrated, and with other scales and gates standing in for trained ones."""
    folder, trained = tmp_path_factory.mktemp("quality"), adaptive("channel", correction_rank=2)
    new_hat("channel").save_pretrained(folder / "untrained")
    trained.training_summary = {"routers": {"steps": 1}}
    trained.save_pretrained(folder / "trained")
    return {"channel": folder / "trained", "channel_untrained": folder / "untrained"}


def quality(out, grain, **changes):
    how = {"grains": ["channel"], "points": POINTS, "dtype": "fp32"} | grain | changes
    with RowWriter(out, Row, KEY) as writer:
        for row in module.rows(writer.done, **how):
            writer.write(row)
            yield row


@pytest.fixture(scope="module")
def measured(grain, tmp_path_factory):
    out = tmp_path_factory.mktemp("rows") / "quality.csv"
    rows = list(quality(out, grain))
    assert read_rows(out, Row) == rows
    return out, {(r.variant, r.exit_rate): r for r in rows}


@pytest.mark.slow
def test_every_point_once_at_equal_work(measured):
    rows = measured[1]
    exits = {(v, 0.5) for v in ("trained", "random_exits", "no_exits")}
    assert set(rows) == {(v, 0.0) for v in (*VARIANTS, "fine_tuned")} | exits
    trained = rows["trained", 0.0]
    assert trained.realised == pytest.approx(0.7, abs=0.05)
    for variant in VARIANTS:
        row = rows[variant, 0.0]
        assert row.model_share == pytest.approx(trained.model_share, abs=0.003)
        assert row.increase_low <= row.increase <= row.increase_high
        assert row.increase == pytest.approx(row.ppl / row.base_ppl - 1, abs=1e-4)
        assert row.margin == pytest.approx(row.ppl / trained.ppl - 1, abs=1e-4)
        assert row.kl > 0 and 0 < row.top1 <= 1
        assert row.documents >= 6 and row.margin_low <= row.margin <= row.margin_high
    assert trained.margin == trained.margin_low == trained.margin_high == 0
    idle = rows["fine_tuned", 0.0]
    assert idle.realised == 1 and idle.margin == pytest.approx(idle.increase, abs=1e-4) and idle.kl > 0
    gates, drawn, dial = (rows[variant, 0.5] for variant in ("trained", "random_exits", "no_exits"))
    assert dial.realised_exit == 0 and dial.model_share == pytest.approx(gates.model_share, abs=0.003)
    assert dial.margin == pytest.approx(dial.ppl / gates.ppl - 1, abs=1e-4)
    assert gates.realised_exit > 0.2
    assert drawn.realised_exit == pytest.approx(gates.realised_exit, abs=0.04)  # five standard errors of the draw


def test_a_stopped_run_goes_on_and_ends_alike(measured, grain, tmp_path):
    whole, out = measured[0], tmp_path / "quality.csv"
    lines = whole.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]))
    rows = list(quality(out, grain))
    assert len(rows) == len(lines) - 3
    assert out.read_text() == whole.read_text()
    assert list(quality(out, grain)) == []


def test_rows_of_other_gates_are_refused_and_those_without_exits_stay_valid(measured, grain, tmp_path):
    out = tmp_path / "quality.csv"
    pd.read_csv(measured[0]).query("exit_rate == 0").to_csv(out, index=False)
    kept, other = out.read_text(), tmp_path / "again"
    hat = HierarchicalTransformer.from_pretrained(grain["channel"], dtype="fp32")
    with torch.no_grad():
        for gate in hat.gates.values():
            gate.shift.add_(1.0)
    hat.save_pretrained(other)
    run = quality(out, grain, channel=other)
    assert {row.exit_rate for row in run} == {0.5}
    assert out.read_text().startswith(kept)
    before = out.read_text()
    with pytest.raises(HatError, match="rows of another channel checkpoint"):
        list(quality(out, grain))
    assert out.read_text() == before


def test_refusals(grain, tmp_path):
    swapped = {"grains": ["token"], "token": grain["channel"], "token_untrained": grain["channel_untrained"]}
    for changes, words in (
        (
            swapped | {"points": [p._replace(granularity="token") for p in POINTS]},
            "has the channel grain, expected token",
        ),
        ({"channel": grain["channel_untrained"]}, "has no trained routers: expected a checkpoint as `hat train`"),
        ({"channel_untrained": grain["channel"]}, "was trained: expected a checkpoint as `hat calibrate` writes it"),
        ({"channel": tmp_path / "none"}, "no checkpoint"),
    ):
        with pytest.raises(HatError, match=words):
            list(quality(tmp_path / "a.csv", grain, **changes))


@pytest.mark.parametrize("failure", [OutOfReach("its nearest is 0.9"), HatError("the text has no tokens")])
def test_only_a_control_out_of_reach_costs_no_other_row(grain, tmp_path, monkeypatch, failure):
    def refuse(*_):
        raise failure

    monkeypatch.setitem(module.CONTROLS, "static", refuse)
    run = quality(tmp_path / "quality.csv", grain)
    if isinstance(failure, OutOfReach):
        with pytest.warns(UserWarning, match="no row for static at 0.7 on docstrings: its nearest is 0.9"):
            found = list(run)
        left = [v for v in VARIANTS if v not in ("trained", "static")]
        assert [r.variant for r in found[:4]] == ["trained", "trained", "random_exits", "fine_tuned"]
        assert {r.variant for r in found[4:]} == {*left, "no_exits"}
    else:
        with pytest.raises(HatError, match="the text has no tokens"):
            list(run)
        done = {r.variant for r in read_rows(tmp_path / "quality.csv", Row)}
        assert done == {"trained", "random_exits", "fine_tuned"}  # controls come together


def test_a_short_text_of_several_documents_is_matched_on_all_of_it(grain, tmp_path):
    text = tmp_path / "mine.jsonl"  # every other block, of about 1,600 tokens, would be too few
    long = "The words of a long one, and more words, go on. " * 10
    both = "A short one, of a few words alone, number ", long
    text.write_text("".join(f'{{"text": "{words}{i}"}}\n' for i in range(3) for words in both))
    points = [Point("channel", str(text), 4096, 0.7, 0.0, variant) for variant in ("trained", "random")]
    trained, drawn = quality(tmp_path / "quality.csv", grain, points=points)
    assert trained.documents == trained.blocks == 6 and 1536 < trained.tokens < 2048
    assert drawn.model_share == pytest.approx(trained.model_share, abs=EQUAL)


def test_the_plan_has_what_the_result_must_show():
    for granularity, controls in (("channel", {*module.CONTROLS}), ("token", {*module.CONTROLS} - {"static"})):
        found = plan(granularity)
        assert len(set(found)) == len(found)
        for text in TEXTS:
            here = {(p.max_tokens, p.capacity, p.variant) for p in found if p.text == text and not p.exit_rate}
            tokens = study.MANY[text] if granularity == "channel" else study.FEW
            beside = ("trained", "untrained") if granularity == "channel" else ("trained",)
            assert here >= {(tokens, c, v) for c in (0.9, 0.7, 0.55, 0.4) for v in beside}
            assert here >= {(4096, c, v) for c in (0.7, 0.55) for v in ("trained", *controls)}
            choice = {c for n, c, v in here if (n, v) == (tokens, "uncorrected")}
            assert choice == ({0.7, 0.55, 0.4} if granularity == "channel" else set())
            leaving = {(p.capacity, p.exit_rate, p.variant, p.seed) for p in found if p.text == text and p.exit_rate}
            assert leaving >= {(1.0, 0.1, "trained", 0), (0.75, 0.1, "trained", 0)}
            draws = {(1.0, 0.3, "random_exits", seed) for seed in range(5)} | {(1.0, 0.3, "no_exits", 0)}
            assert draws <= leaving or granularity == "token"


def test_a_grid_has_each_point_where_it_means_something():
    found = grid("channel", capacities=[1.0, 0.5], exit_rates=[0.0, 0.2], seeds=[0, 1], texts=["a"])
    assert len(set(found)) == len(found)
    assert [(p.capacity, p.exit_rate) for p in found if p.variant == "trained"] == [
        (1.0, 0.0), (1.0, 0.2), (0.5, 0.0), (0.5, 0.2)
    ]  # fmt: skip
    assert {p.seed for p in found if p.variant == "random"} == {0, 1}
    assert {p.seed for p in found if p.variant in ("trained", "untrained", "cosine")} == {0}
    assert {(p.capacity, p.exit_rate) for p in found if p.variant == "random"} == {(0.5, 0.0)}
    assert {p.exit_rate for p in found if p.variant == "random_exits"} == {0.2}


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("capacities", [0.05]),
        ("capacities", []),
        ("capacities", [0.5, 0.5]),
        ("exit_rates", [1.5]),
        ("seeds", [-1]),
        ("variants", ["lucky"]),
    ],
)
def test_bad_axes(axis, values):
    with pytest.raises(HatError):
        grid("channel", **{"capacities": [0.5], axis: values})


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


def test_the_committed_stand_ins_are_of_the_committed_checkpoint():
    read = read_rows(DATA / "results" / "stand_ins.csv", Row)
    done = {tuple(getattr(row, name) for name in KEY): row for row in read}
    with pytest.raises(HatError, match="rows of another token checkpoint"):
        next(stand_ins.rows(done, token=DATA / "checkpoints" / "token"))
    adapter = module.adapter_digest(module.CHECKPOINTS / "token_stand_ins", exits=False)
    assert len(done) == 12 and {row.adapter for row in read} == {adapter}
