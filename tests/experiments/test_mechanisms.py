"""Mechanisms: the ways differ in what they are named after, blocks are spread out, a stopped run resumes."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny_runs import new_hat, untrained

from hat_lib.config import HatError
from hat_lib.experiments import mechanisms
from hat_lib.plotting import frontier, style


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name, hat in (("untrained", new_hat("channel")), ("trained", untrained(correction_rank=2))):
        with torch.no_grad():
            for correction in hat.corrections.values():
                correction.up.normal_(0, 0.2)
        hat.calibration = new_hat("channel").calibration
        n = len(hat.calibration.capacities)
        tables = {"head_thresholds": [0.9] * n, "head_margins": [0.5] * n, "head_shares": [0.5] * n}
        hat.calibration = replace(hat.calibration, **tables)
        hat.save_pretrained(folder / name)
        found[name] = folder / name
    return found


HOW = {"texts": ("addresses", "docstrings"), "capacities": (0.6,), "tokens": 1024, "dtype": "fp32"}


@pytest.fixture(scope="module")
def rows(checkpoints):
    return list(mechanisms.rows(**checkpoints, **HOW))


def test_one_row_for_each_way_and_text(rows, checkpoints):
    found = {(r.way, r.text): r for r in rows}
    assert set(found) == {(way, text) for way in mechanisms.WAYS for text in HOW["texts"]}
    layers, head = found["layers", "addresses"], found["head", "addresses"]
    assert layers.realised == layers.layer_capacity == head.layer_capacity < 1
    assert head.model_share != layers.model_share and head.kl != layers.kl
    assert found["fine_tuned", "addresses"].model_share == 1 and found["fine_tuned", "addresses"].kl > 0
    assert found["fine_tuned", "addresses"].capacity == 1
    assert {r.blocks for r in rows} == {2} and {r.documents for r in rows} == {2}
    assert found["head", "addresses"].adapter == layers.adapter != found["trained", "addresses"].adapter
    again = {tuple(getattr(r, k) for k in mechanisms.KEY): r for r in rows[1:]}
    assert list(mechanisms.rows(again, **checkpoints, **HOW)) == rows[:1]


def test_what_cannot_be_measured(checkpoints, tmp_path):
    with pytest.raises(HatError, match="ways must be among layers, head, trained, fine_tuned, got 'fast'"):
        next(mechanisms.rows(ways=["fast"]))
    with pytest.raises(HatError, match="capacity must be"):
        next(mechanisms.rows(capacities=[7.0]))
    with pytest.raises(HatError, match="trained and fine_tuned need a checkpoint with corrections: pass trained=DIR"):
        next(mechanisms.rows(trained=None, ways=["layers", "fine_tuned"]))
    new_hat("channel").save_pretrained(tmp_path / "full")
    with pytest.raises(HatError, match="reads its head in full: make it anew"):
        next(mechanisms.rows(untrained=tmp_path / "full", dtype="fp32"))


def test_the_figure_has_a_panel_for_each_text(rows):
    fig = frontier.mechanisms(pd.DataFrame([vars(r) for r in rows]))
    assert [ax.get_title("left") for ax in fig.axes] == list(HOW["texts"])
    assert all(len(ax.lines) == len(frontier.WAYS) for ax in fig.axes)


def test_controls_and_exits_stand_beside_where_they_were_measured(rows):
    points = [("trained", 0.0), ("trained", 0.1), ("random_exits", 0.1), ("static", 0.0), ("random", 0.0)]
    columns = {"granularity": "channel", "text": "docstrings", "model_share": 0.5, "kl": 2.0}
    controls = pd.DataFrame([columns | {"variant": variant, "exit_rate": rate} for variant, rate in points])
    fig = frontier.mechanisms(pd.DataFrame([vars(r) for r in rows]), controls)
    drawn = [{look: 0 for look in (style.BROWN, style.PURPLE)} for _ in fig.axes]
    for ax, points in zip(fig.axes, drawn, strict=True):
        for line in ax.lines:
            if line.get_color() in points:
                points[line.get_color()] += len(line.get_xdata())
    addresses, docstrings = drawn
    assert docstrings == {style.BROWN: 1, style.PURPLE: 2} and not any(addresses.values())
