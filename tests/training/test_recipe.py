"""Hyperparameters: samples depend on (seed, step) alone, and schedules begin and end where they should."""

import numpy as np
import pytest

from hat_lib.config import HatError
from hat_lib.training.recipe import Recipe

STEPS = 100


def test_sampled_capacity():
    recipe = Recipe(capacity=0.5, anneal=0.4, spread=0.0)
    schedule = [recipe.sampled_capacity(step, STEPS) for step in range(STEPS)]
    assert schedule[0] == 1.0 and schedule[20] == pytest.approx(0.75)
    assert schedule[40:] == [0.5] * 60 and np.all(np.diff(schedule) <= 0)
    wide = Recipe(capacity=0.15, anneal=0.5, spread=0.9)
    drawn = [wide.sampled_capacity(step, STEPS) for step in range(STEPS)]
    assert min(drawn) == 0.1 and max(drawn) == 1.0


def test_samples_depend_on_seed_and_step_alone():
    def draws(seed):
        recipe = Recipe(seed=seed, capacity=0.5, anneal=0.0, spread=0.2, exit_rate=0.3)
        return [(recipe.sampled_capacity(step, 2000), recipe.sampled_exit_rate(step)) for step in range(2000)]

    assert draws(0) == (first := draws(0)) != draws(1)
    capacities, rates = np.transpose(first)
    assert 0.3 <= min(capacities) < 0.31 and 0.69 < max(capacities) <= 0.7 and abs(np.mean(capacities) - 0.5) < 0.01
    assert 0 <= min(rates) < 0.01 and 0.29 < max(rates) <= 0.3 and abs(np.corrcoef(capacities, rates)[0, 1]) < 0.1


def test_named():
    assert Recipe.named("default", "channel") == Recipe.channel()
    assert Recipe.named("default", "token", "quick", seed=3) == Recipe.token("quick", seed=3)
    assert Recipe.named("published", "token") == Recipe.published() == Recipe()
    for name, grain, profile, changes in (
        ("published", "channel", "full", {}),
        ("best", "token", "full", {}),
        ("default", "channel", "fast", {}),
        ("default", "token", "full", {"learning_rate": 1.0}),
    ):
        with pytest.raises(HatError):
            Recipe.named(name, grain, profile, **changes)


@pytest.mark.parametrize(
    "name, value",
    [
        ("tokens", 1), ("block_size", 8.0), ("batch_size", 0), ("seed", -1), ("router_epochs", 0),
        ("exit_lr", float("nan")), ("noise", -1), ("anneal", 1.1), ("capacity", 0.05), ("text", 3),
    ],
)  # fmt: skip
def test_bad_values(name, value):
    with pytest.raises(HatError, match=name):
        Recipe.channel(**{name: value})
