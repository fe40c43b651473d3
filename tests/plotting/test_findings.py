"""Findings: verdicts from intervals, at equal work."""

import pandas as pd
import pytest

from hat_lib.plotting.style import COST
from studies.plotting import findings


def quality(**columns):
    row = {"granularity": "channel", "text": "addresses", "capacity": 0.9, "exit_rate": 0.0, "tokens": 4000}
    row |= {"variant": "trained", "realised": 0.89, "model_share": 0.9, "max_tokens": 4000}
    row |= dict(zip(COST, (0.05, 0.04, 0.06), strict=True))
    return pd.DataFrame(row | columns)


def test_verdict():
    cases = [(-0.01, 0.03, "kept"), (0.031, 0.05, "missed"), (0.02, 0.04, "open"), (0.03, 0.04, "open")]
    assert [findings.verdict(low, high, 0.03) for low, high, _ in cases] == [expected for *_, expected in cases]
    assert [findings.reached(-high, -low, -0.03) for low, high, _ in cases] == [expected for *_, expected in cases]


def test_rivals_do_the_same_work():
    variants = ["trained", "static", "random", "cosine"]
    table = quality(variant=variants, model_share=[0.9, 0.897, 0.903, 0.904], margin_low=0.01, margin_high=0.02)
    found = findings.rivals(table)
    assert found["variant"].tolist() == ["static", "random"], "cosine ran too much"


def test_kept_reads_the_claim_between_its_capacities_and_the_row_on_more_tokens():
    claims = pd.DataFrame({"capacity": [0.4, 0.9], "promised_increase": [0.12, 0.02]})
    table = quality(capacity=[0.2, 0.4, 0.65, 0.65], tokens=[4000, 4000, 4000, 20_000])
    table["increase_high"] = [0.1, 0.1, 0.1, 0.06]
    found = findings.kept(table, claims)
    assert found["capacity"].tolist() == [0.4, 0.65], "0.2 has no claim"
    assert found["promised"].tolist() == pytest.approx([0.12, 0.07])
    assert found["kept"].tolist() == ["kept", "kept"]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0.024, -0.001, 0.05), "+2.4% (-0.1% to +5.0%)"),
        ((1.1, 0.94, 1.4), "x2.1 (x1.9 to x2.4)"),
        ((0.001, -0.0002, 0.002), "+0.1% (+0.0% to +0.2%)"),
        ((24.0, 6.5, 5000.0), "x25 (x7.5 to over x1000)"),
    ],
)
def test_increase_text(ends, expected):
    assert findings.increase_text(dict(zip(COST, ends, strict=True))) == expected
