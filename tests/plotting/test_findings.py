"""Findings: verdicts from intervals, and sentences that name the machine."""

import pandas as pd
import pytest
from figure_tables import claims, quality

from hat_lib.plotting.style import COST
from studies.plotting import findings


def test_the_whole_interval_has_to_lie_on_one_side_and_one_failure_or_doubt_is_enough():
    cases = [(-0.01, 0.03, "kept"), (0.031, 0.05, "missed"), (0.02, 0.04, "open"), (0.03, 0.04, "open")]
    assert [findings.verdict(low, high, 0.03) for low, high, _ in cases] == [said for *_, said in cases]
    assert [findings.reached(-high, -low, -0.03) for low, high, _ in cases] == [said for *_, said in cases]
    assert findings.joint(["kept", "kept"]) == "kept"
    assert findings.joint(["kept", "open"]) == findings.joint([]) == "open"
    assert findings.joint(["kept", "open", "missed"]) == "missed"


def test_a_rival_does_the_same_work_at_the_same_point_and_is_beaten_by_its_paired_margin():
    table = quality().query("text == 'addresses' and granularity == 'channel' and capacity == 0.9")
    table = table.assign(max_tokens=4000, margin_low=0.01, margin_high=0.02)
    table = pd.concat([table[table["variant"] == "trained"].head(1)] * 4)
    table = table.assign(variant=["trained", "static", "random", "cosine"], model_share=[0.9, 0.897, 0.903, 0.904])
    found = findings.rivals(table)
    assert found["variant"].tolist() == ["static", "random"], "cosine ran too much"
    assert findings.beaten(found) == ("kept", "better 2, worse 0 of 2")
    found.loc[found["variant"] == "random", "margin_low"] = -0.01
    assert findings.beaten(found) == ("open", "better 1, worse 0 of 2")
    found.loc[found["variant"] == "random", "margin_high"] = -0.005
    assert findings.beaten(found) == ("missed", "better 1, worse 1 of 2")


def test_each_trained_row_meets_the_claim_of_its_capacity_and_the_one_on_more_tokens_counts():
    kept = findings.kept(quality(), claims()).set_index(["granularity", "text", "capacity"])
    assert set(kept.index.get_level_values("capacity")) == {0.4, 0.65, 0.9}, "0.2 and exits have no claim"
    channel = kept.loc["channel", "addresses"]
    assert channel["promised"].tolist() == pytest.approx([0.12, (0.12 + 0.01) / 2, 0.01])
    assert channel["kept"].tolist() == ["missed", "kept", "kept"]
    assert (kept.loc["token", "kept"] == "missed").all()
    more = quality().query("capacity == 0.9 and variant == 'trained'").assign(tokens=20_000, increase_high=0.5)
    again = findings.kept(pd.concat([more, quality()]), claims())
    assert again.query("capacity == 0.9 and granularity == 'channel'")["kept"].tolist() == ["open", "open"]
    assert len(again) == len(kept)


@pytest.mark.parametrize(
    "ends, said",
    [
        ((0.024, -0.001, 0.05), "+2.4% (-0.1% to +5.0%)"),
        ((0.9, 0.8, 1.04), "+90.0% (+80.0% to +104.0%)"),
        ((1.1, 0.94, 1.4), "x2.1 (x1.9 to x2.4)"),
        ((0.001, -0.0002, 0.002), "+0.1% (+0.0% to +0.2%)"),
        ((24.0, 6.5, 5000.0), "x25 (x7.5 to over x1000)"),
    ],
)
def test_an_increase_is_said_with_its_interval(ends, said):
    assert findings.increase_text(pd.Series(dict(zip(COST, ends, strict=True)))) == said


def test_a_machine_is_what_the_rows_say_of_it():
    rows = pd.DataFrame({"threads": [2, 2], "dtype": ["bfloat16", "float32"], "device": ["cpu", "cpu"]})
    assert findings.machine(rows) == "cpu, bfloat16/float32, threads 2"
    assert findings.machine(rows[["dtype"]].iloc[:1]) == "bfloat16"
