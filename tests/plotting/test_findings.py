"""Findings: verdicts by interval, words with their machine, figures whose points stand where the tables say."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hat_lib.config import HatError
from hat_lib.plotting import findings
from hat_lib.plotting import style as plots
from hat_lib.plotting.style import BLUE, GREY, MOST, ORANGE


def costs(rows, spread=0.1):
    """A table of increases with an interval of ``spread`` of each on both sides."""
    table = pd.DataFrame(rows)
    low, high = ((1 + sign * spread) * table["increase"] for sign in (-1, 1))
    return table.assign(increase_low=low, increase_high=high)


def quality(grains=("channel", "token")):
    rows = []
    for grain in grains:
        for text in ("addresses", "docstrings"):
            base = {"granularity": grain, "text": text, "exit_rate": 0.0, "tokens": 4000}
            for capacity, increase in ((0.9, 0.005), (0.65, 0.055), (0.4, 0.5), (0.2, 2.0)):
                increase *= 1 if grain == "channel" else 100
                for variant, times in (("trained", 1), ("untrained", 2), ("random", 9)):
                    at = {"variant": variant, "capacity": capacity, "realised": capacity - 0.01}
                    rows.append(base | at | {"increase": times * increase, "model_share": capacity + 0.05})
            for variant, increase in (("trained", 0.3), ("random_exits", 0.6)):
                at = {"variant": variant, "capacity": 1.0, "realised": 1.0, "exit_rate": 0.1, "model_share": 0.97}
                rows.append(base | at | {"increase": increase})
    return costs(rows)


def published():
    return quality(["token"]).query("capacity in (0.9, 0.4)").assign(increase=0.8, increase_low=0.7, increase_high=0.9)


def promise():
    rows = []
    for base in ("bundled", "random:tinyllama"):
        for grain, dense in (("channel", 0.9), ("token", 1.2)):
            for capacity, speed, increase in ((0.9, 1.1, 0.01), (0.4, 1.8, 0.12), (1.0, np.nan, np.nan)):
                row = {"base": base, "granularity": grain, "capacity": capacity, "realised": capacity - 0.02}
                row |= {"exit_rate": 0.1 if capacity == 1 else 0.0, "promised_speedup": speed}
                row |= {"promised_increase": increase, "ideal_decode": 1 / capacity}
                rows.append(row | {"decode_dense": dense, "decode_hf": 2 * dense})
    return pd.DataFrame(rows)


def ablations():
    rows = []
    for grain, names in (("channel", ("start", "default", "wide, start", "wide")), ("token", ("published", "x", "y"))):
        for change in names:
            for text in ("addresses", "docstrings"):
                increase = {"wide": 0.14, "wide, start": 0.08, "published": 5.0, "x": 5.5, "y": 1.0}.get(change, 0.08)
                at = {"granularity": grain, "change": change, "text": text, "capacity": 0.62}
                rows.append(at | {"steps": 0 if "start" in change else 40, "increase": increase})
    return costs(rows)


MADE = {
    "promised": (quality, published, promise),
    "speeds": (promise,),
    "exits": (quality,),
    "choices": (ablations,),
}


def drawn(name):
    return getattr(findings, name)(*(make() for make in MADE[name]))


def points(container):
    """What an errorbar marks: its points, and the ends of its whiskers, ``[n, 2]`` each."""
    line, _, bars = container
    return line.get_xydata(), [np.array(s) for s in bars[0].get_segments()]


# --- verdicts and words ---


def test_the_whole_interval_has_to_lie_on_one_side():
    cases = [(-0.01, 0.03, "yes"), (0.031, 0.05, "no"), (0.02, 0.04, "open"), (0.03, 0.04, "open")]
    assert [findings.verdict(low, high, 0.03) for low, high, _ in cases] == [said for *_, said in cases]


def test_one_failure_is_enough_and_one_doubt_too():
    assert findings.joint(["yes", "yes"]) == "yes"
    assert findings.joint(["yes", "open"]) == findings.joint([]) == "open"
    assert findings.joint(["yes", "open", "no"]) == "no"


def test_each_trained_row_meets_the_promise_of_its_capacity():
    kept = findings.kept(quality(), promise()).set_index(["granularity", "text", "capacity"])
    assert set(kept.index.get_level_values("capacity")) == {0.4, 0.65, 0.9}, "0.2 and exits have no promise"
    channel = kept.loc["channel", "addresses"]
    assert channel["promised"].tolist() == pytest.approx([0.12, (0.12 + 0.01) / 2, 0.01])
    assert channel["kept"].tolist() == ["no", "yes", "yes"]
    assert (kept.loc["token", "kept"] == "no").all()


def test_a_speed_above_its_ideal_is_noise_and_never_kept():
    rows = pd.DataFrame({"promised_speedup": 1.1, "ideal_decode": 1.2, "decode_hf": 2.0},
                        index=range(4)).assign(decode_dense=[1.0, 1.1, 1.2, 1.21])  # fmt: skip
    assert findings.fast(rows) == ["no", "yes", "yes", "open"]
    assert findings.fast(rows, "decode_hf") == ["yes"] * 4, "another program: no ideal bounds it"


def test_of_two_rows_for_one_point_the_one_on_more_tokens_counts():
    again = quality().query("capacity == 0.9 and variant == 'trained'").assign(tokens=20_000, increase_high=0.5)
    kept = findings.kept(pd.concat([again, quality()]), promise())
    assert kept.loc[(kept["capacity"] == 0.9) & (kept["granularity"] == "channel"), "kept"].tolist() == ["open", "open"]
    assert len(kept) == len(findings.kept(quality(), promise()))


def test_a_change_is_held_against_the_first_of_as_many_steps_on_the_same_text():
    table = findings.apart(ablations())
    assert sorted(set(table.loc[table["apart"], "change"])) == ["wide", "y"]
    only = ablations()
    only.loc[(only["change"] == "y") & (only["text"] == "docstrings"), "increase_high"] = 4.5  # as low as the reference
    table = findings.apart(only).query("change == 'y'").set_index("text")
    assert table["apart"].to_dict() == {"addresses": True, "docstrings": False}


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
    assert findings.said(pd.Series(dict(zip(findings.COST, ends, strict=True)))) == said


def test_a_machine_is_what_the_rows_say_of_it():
    rows = pd.DataFrame({"threads": [2, 2], "dtype": ["bfloat16", "float32"], "device": ["cpu", "cpu"]})
    assert findings.machine(rows) == "cpu, bfloat16/float32, threads 2"
    assert findings.machine(rows[["dtype"]].iloc[:1]) == "bfloat16"


# --- figures ---


@pytest.mark.parametrize("name", MADE)
def test_each_figure_is_drawn_the_same_twice_and_warns_of_nothing(name):
    tables = [make() for make in MADE[name]]
    before = [table.copy() for table in tables]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = getattr(findings, name)(*tables)
        assert isinstance(figure, Figure) and plt.get_fignums() == []
        assert plots.png(figure) == plots.png(drawn(name))
    for table, copy in zip(tables, before, strict=True):
        pd.testing.assert_frame_equal(table, copy)
    assert all(ax.get_xlabel() and ax.get_title(loc="left") for ax in figure.axes)


@pytest.mark.parametrize("name", MADE)
def test_a_missing_column_or_an_empty_table_is_named(name):
    draw, first, *others = getattr(findings, name), *(make() for make in MADE[name])
    with pytest.raises(HatError, match="granularity"):
        draw(first.drop(columns="granularity"), *others)
    with pytest.raises(HatError, match="any row"):
        draw(first.iloc[:0], *others)


@pytest.mark.parametrize("name", ["promised", "exits", "choices"])
def test_texts_that_nobody_named_are_not_drawn(name):
    draw, first, *others = getattr(findings, name), *(make() for make in MADE[name])
    more = pd.concat([first, first.assign(text="mine")], ignore_index=True)
    assert plots.png(draw(more, *others)) == plots.png(drawn(name))
    with pytest.raises(HatError, match="any row"):
        draw(first.assign(text="mine"), *others)


def test_a_promise_without_numbers_is_refused():
    with pytest.raises(HatError, match="promised_increase"):
        findings.kept(quality(), promise().assign(promised_increase=np.nan))


def test_prices_stand_at_realised_capacities_and_the_promise_is_hollow():
    for ax in drawn("promised").axes:
        hollow = next(line for line in ax.lines if line.get_markerfacecolor() == "none")
        np.testing.assert_allclose(hollow.get_xydata(), [[0.4, 12], [0.9, 1]])
        trained, untrained, published, ours = (points(c) for c in ax.containers)
        np.testing.assert_allclose(trained[0], [[0.39, 50], [0.64, 5.5], [0.89, 0.5]])
        np.testing.assert_allclose(trained[1][0][:, 1], [45, 55])
        np.testing.assert_allclose(untrained[0][:, 1], [400, 100, 11, 1])
        np.testing.assert_allclose(published[0], [[0.39, 80], [0.89, 80]])
        beyond = [line for line in ax.lines if line.get_marker() == "^" and len(line.get_xdata())]
        assert [line.get_xydata().tolist() for line in beyond] == [[[0.39, MOST]]]
        np.testing.assert_allclose(ours[0], [[0.64, 550], [0.89, 50]])
    assert "beyond" in drawn("promised").axes[0].get_ylabel()


def test_a_speedup_is_split_at_our_own_dense_path():
    bundled, shape = drawn("speeds").axes
    assert [ax.get_title(loc="left") for ax in (bundled, shape)] == ["bundled", "random:tinyllama"]
    names = [t.get_text() for t in bundled.get_yticklabels()]
    assert names == [
        "channel 0.90 (ran 0.88)",
        "channel 0.40 (ran 0.38)",
        "token 0.90 (ran 0.88)",
        "token 0.40 (ran 0.38)",
    ]
    thick = {line.get_color(): line.get_xdata() for line in bundled.lines if line.get_linewidth() == 6}
    assert {colour: list(x) for colour, x in thick.items()} == {BLUE: [1, 0.9], ORANGE: [1, 1.2]}
    grey = [list(line.get_xdata()) for line in bundled.lines if line.get_color() == GREY]
    assert grey[:-1] == [[0.9, 1.8], [1.8]] * 2 + [[1.2, 2.4], [2.4]] * 2
    ideal = [float(line.get_xdata()[0]) for line in bundled.lines if line.get_marker() == "|"]
    assert ideal == pytest.approx([1 / 0.9, 1 / 0.4] * 2)


def test_exits_stand_beside_the_line_of_capacities_with_their_rate():
    for ax in drawn("exits").axes:
        dial, chosen, lot = (points(c)[0] for c in ax.containers)
        np.testing.assert_allclose(dial, [[0.25, 200], [0.45, 50], [0.7, 5.5], [0.95, 0.5]])
        np.testing.assert_allclose(chosen, [[0.97, 30]])
        np.testing.assert_allclose(lot, [[0.97, 60]])
        assert [t.get_text() for t in ax.texts] == ["0.1"]
        assert ax.get_ylim()[1] == pytest.approx(1.4 * 220)
    without = quality().query("exit_rate == 0")
    assert [len(ax.texts) for ax in findings.exits(without).axes] == [0, 0]


def test_a_change_is_filled_where_it_stands_apart():
    channel, token = drawn("choices").axes
    assert [t.get_text() for t in token.get_yticklabels()] == ["published", "x", "y"]
    found = [(float(c[0].get_xdata()[0]), c[0].get_markerfacecolor()) for c in token.containers]
    assert found == [(6, "white"), (6, "white"), (6.5, "white"), (6.5, "white"), (2, BLUE), (2, ORANGE)]
    ends = points(token.containers[0])[1][0]
    np.testing.assert_allclose(ends[:, 0], [5.5, 6.5])
    assert channel.get_xlim()[1] < 1.3 < token.get_xlim()[1]
