"""The README's numbers are those in data/results, at the precision they are printed with."""

import re

import pandas as pd
import pytest

from hat_lib.config import DATA, REPO
from hat_lib.evaluation.baselines.controls import CONTROLS


def table(name):
    """Cells of the README table that follows the comment naming the file."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    after = text.split(f"<!-- data/results/{name} -->", 1)[1].strip().split("\n\n", 1)[0]
    rows = [line for line in after.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def increase(row, text):
    """Percents with their interval up to a doubling, then times the base's perplexity."""
    value = row[text]
    if value >= 1:
        return f"x{1 + value:.0f}" if value < 999 else "over x1000"
    return f"{value:+.1%} ({row[f'{text}_low']:+.1%} to {row[f'{text}_high']:+.1%})"


def test_promise():
    frame = pd.read_csv(DATA / "results" / "promise.csv")
    frame = frame[frame.exit_rate == 0]
    key = ["granularity", "capacity"]
    shape = frame[frame.base == "random:tinyllama"].set_index(key).to_dict("index")
    expected = [
        [
            r["granularity"],
            f"{r['capacity']:.2f} / {r['realised']:.2f}",
            f"{r['promised_speedup']:.1f}x, {'<' if r['promised_increase'] == 0.01 else '~'}"
            f"{' ' * (r['promised_increase'] == 0.01)}{r['promised_increase']:.0%}".replace("%", " %"),
            increase(r, "addresses"),
            increase(r, "docstrings"),
            *(
                f"{shape[r['granularity'], r['capacity']][c]:.2f}x"
                for c in ("ideal_decode", "decode_dense", "decode_hf")
            ),
            *(f"{r[c]:.2f}x" for c in ("decode_dense", "decode_hf")),
        ]
        for r in frame[frame.base == "bundled"].to_dict("records")
    ]
    assert table("promise.csv") == expected


def test_token_grain():
    names = ("quality", "published")
    ours, published = (pd.read_csv(DATA / "results" / f"{name}.csv").query("granularity == 'token'") for name in names)

    def said(value):
        return f"{value:+.0%}" if value < 1 else f"x{1 + value:.0f}" if value < 999 else "over x1000"

    def trained(frame, **at):
        (row,) = frame[(frame[list(at)] == pd.Series(at)).all(axis=1) & (frame.variant == "trained")].itertuples()
        return row

    missed = []
    for cells in table("published.csv"):
        capacity, found = float(cells[0]), iter(cells[1:])
        for text in ("addresses", "docstrings"):
            at = {"text": text, "capacity": capacity, "exit_rate": 0.0, "max_tokens": 4000}
            for frame in (ours, published):
                row = trained(frame, **at)
                assert next(found) == f"{said(row.increase)} at {row.realised:.2f}"
            rivals = ours[(ours.text == text) & (ours.capacity == capacity) & ours.variant.isin(CONTROLS)]
            assert len(rivals) == 4
            best = rivals.loc[rivals.increase.idxmin()]
            assert (
                next(found) == f"{said(best.increase)} ({best.variant})"
                and best.increase > trained(ours, **at).increase
            )
            missed += [(text, capacity, r.variant) for r in rivals.itertuples() if r.margin_low <= 0]
    assert missed == [("addresses", 0.9, "cosine")]


def test_targets_come_true():
    frame = pd.read_csv(DATA / "results" / "target_speedup.csv")
    reached = frame[frame.reachable]
    assert set(reached.granularity) == {"channel", "token"} and len(frame) == 8
    assert ((reached.measured / reached.requested - 1).abs() < 0.05).all()
    out_of_reach = frame[~frame.reachable]
    assert set(out_of_reach.granularity) == {"channel"} and list(out_of_reach.requested) == [1.05, 1.1, 1.2]


def test_lossless_is():
    frame = pd.read_csv(DATA / "results" / "lossless.csv")
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for dtype, rows in frame.groupby("dtype"):
        assert len(rows) == 200
        assert f"{dtype.replace('float', 'fp').replace('bfp', 'bf')}: {rows.identical.sum()} of 200" in text
        assert 0.75 < rows.accepted.sum() / rows.drafted.sum() < 0.85, "four in five"
        assert 0.7 < (rows.ms_dense / rows.ms_lossless).median() < 0.8
    assert frame[frame.dtype == "float32"].identical.all()
    both = frame[(frame.dtype == "bfloat16") & frame.early_exit_identical.notna()]
    theirs, ours = (~both.early_exit_identical.astype(bool)).sum(), (~both.identical).sum()
    assert f"part from it in {theirs} of {len(both)}, ours in {ours} of those" in text
    parted = frame[(frame.dtype == "bfloat16") & ~frame.identical]
    assert (parted.gap_ulp > 2).sum() == 1 and parted.gap_ulp.max() == 3


def test_foundation():
    rows = pd.read_csv(DATA / "results" / "foundation.csv").to_dict("records")
    expected = [
        [
            r["text"],
            f"{r['capacity']:.2f} / {r['realised']:.3f}",
            f"{r['increase']:+.1%} ({r['increase_low']:+.1%} to {r['increase_high']:+.1%})".replace("-", "−"),
            f"{r['speedup_hf']:.2f}x",
            f"{r['speedup_dense']:.2f}x",
        ]
        for r in rows
    ]
    assert table("foundation.csv") == expected


def test_benchmark():
    frame = pd.read_csv(DATA / "results" / "benchmark.csv")
    frame = frame[(frame.phase == "decode") & (frame.batch == 1)]
    expected = [
        [
            r["granularity"],
            f"{r['realised']:.2f}",
            f"{r['ideal']:.2f}x",
            f"{r['speedup_hf']:.2f}x",
            f"{r['speedup_dense']:.2f}x",
        ]
        for r in frame.to_dict("records")
    ]
    assert table("benchmark.csv") == expected


def test_quality():
    frame = pd.read_csv(DATA / "results" / "quality.csv")
    frame = frame[(frame.granularity == "channel") & (frame.exit_rate == 0)]
    rows = {(r["capacity"], r["text"], r["variant"]): r for r in frame.to_dict("records")}
    for cells in table("quality.csv"):
        capacity, found = float(cells[0]), iter(cells[2:])
        for text in ("addresses", "docstrings"):
            rows_of = {variant: rows.pop((capacity, text, variant)) for variant in ("trained", "untrained")}
            for r in rows_of.values():
                assert next(found) == f"{r['increase']:+.1%} ({r['increase_low']:+.1%} to {r['increase_high']:+.1%})"
                assert -0.0165 < rows_of["trained"]["realised"] - capacity < 0.001
                assert -0.0135 < r["realised"] - rows_of["trained"]["realised"] < 0.006
                assert r["max_tokens"] == (20_000 if capacity in (0.75, 0.62) else 4_000)
    assert not any(variant in ("trained", "untrained") for _, _, variant in rows), "rows that the table lacks"
    controls = [r for r in rows.values() if r["capacity"] == 0.9]
    assert len(controls) == 8 and all(r["increase"] > 0.3 for r in controls)


def test_exits():
    frame = pd.read_csv(DATA / "results" / "quality.csv")
    frame = frame[(frame.granularity == "channel") & (frame.exit_rate == 0.1) & (frame.capacity == 1.0)]
    cost = {(r["text"], r["variant"]): r["increase"] for r in frame.to_dict("records")}
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for variant in ("trained", "random_exits"):
        a, b = (f"{cost[name, variant]:+.0%}".replace("%", " %") for name in ("addresses", "docstrings"))
        assert re.search(rf"cost\s+{re.escape(f'{a} and {b}')}", text)
    assert frame[frame.variant == "trained"].model_share.round(2).between(0.97, 0.98).all()


@pytest.mark.parametrize("name", ["foundation.csv", "benchmark.csv", "promise.csv"])
def test_rows_say_where_they_come_from(name):
    frame = pd.read_csv(DATA / "results" / name)
    for column in ("base", "device", "dtype", "threads", "rounds", "realised", "model_share"):
        assert frame[column].notna().all()
    assert not frame.map(lambda v: bool(re.search(r"/(home|root)/", str(v)))).any().any()
