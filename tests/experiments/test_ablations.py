"""The ablation command on `random:tiny`: every change is a run of its own, and a stopped command goes on."""

from dataclasses import fields

import pytest

from hat_lib.experiments import ablations
from hat_lib.experiments.ablations import CHANGES, MEASURED, Change
from hat_lib.training.recipe import Recipe

FEW = (
    Change("channel", "start", {"text": "addresses"}, trained=False),
    Change("channel", "default", {"text": "addresses"}),
    Change("token", "no z-loss", {"text": "addresses", "z_weight": 0.0}),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:token grain")
def test_rows_and_resuming():
    how = {"base": "random:tiny", "changes": FEW, "steps": 2, "tokens": 1200, "dtype": "fp32"}
    rows = list(ablations.rows(**how))
    assert [(r.change, r.text) for r in rows] == [(c.name, text) for c in FEW for text, _ in MEASURED]
    assert [r.steps for r in rows] == [0, 0, 2, 2, 2, 2]
    assert all(r.realised == pytest.approx(r.capacity, abs=0.011) for r in rows)
    assert rows[0].increase != rows[2].increase
    done = {(r.granularity, r.change, r.text) for r in rows[:3]}
    assert list(ablations.rows(done, **how)) == rows[3:]


def test_each_change_is_one_thing_that_a_recipe_has():
    names = {f.name for f in fields(Recipe)}
    assert len({(c.granularity, c.name) for c in CHANGES}) == len(CHANGES)
    for change in CHANGES:
        assert set(change.recipe) <= names
    wanted = {"uniform split", "text: self", "no protected tokens", "temperature 1", "no z-loss", "no entropy"}
    assert wanted <= {c.name for c in CHANGES}
    assert {f.name for f in fields(ablations.Row)} >= {"increase_low", "increase_high", "kl", "realised"}
