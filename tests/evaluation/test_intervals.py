"""Intervals: what is drawn together, how wide few units make an interval, and what dependence does to it."""

from math import erfc, isnan, sqrt

import numpy as np
import pytest

from hat_lib.config import HatError
from hat_lib.evaluation.intervals import FEWEST, outcome, resample, tails, units
from hat_lib.evaluation.perplexity import Score, compare


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (5, 2.7764), (40, 2.0227)])
def test_the_tails_of_few_units_are_widened_twice(n, t):
    """By Student's t of 97.5 % at n - 1 degrees of freedom, from a table, and by the bootstrap's own n / (n - 1)."""
    low, high = tails(n)
    assert high == 1 - low and low == pytest.approx(erfc(t * sqrt(n / (n - 1)) / sqrt(2)) / 2, rel=2e-3)


def test_documents_are_drawn_whole():
    found = units(list("aabcccdef"))
    assert found.drawn == 6
    assert [blocks.tolist() for blocks in found.blocks] == [[0, 1], [2], [3, 4, 5], [6], [7], [8]]
    drawn = resample(found, 9, 200)
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 3] == drawn[:, 5]).all()
    assert (drawn[:, [0, 2, 3, 6, 7, 8]].sum(1) == 6).all()


def test_runs_of_neighbours_are_drawn_where_documents_are_few():
    """27 blocks of two documents: runs of three, which stay in their document and have every block equally often."""
    found = units([0] * 12 + [1] * 15)
    assert found.drawn == 9 and len(found.blocks) == 27
    assert [found.blocks[at].tolist() for at in (0, 11, 26)] == [[0, 1, 2], [11, 0, 1], [26, 12, 13]]
    assert (np.bincount(np.concatenate(found.blocks)) == 3).all()
    assert resample(found, 27, 100).sum(1).tolist() == [27] * 100


def scores(added, documents=None):
    tokens = np.full(len(added), 500)
    base = np.linspace(1400.0, 1600.0, len(added))
    return Score(base, tokens), Score(base + added, tokens, documents=documents)


def test_compare_is_paired_and_takes_a_seed():
    """Blocks differ by far more than the models do, but none of that reaches the interval."""
    found = compare(*scores(np.full(40, 500 * np.log1p(0.08))))
    assert found.ppl / found.base_ppl == pytest.approx(1.08) and found.n_blocks == 40
    assert (found.increase, found.low, found.high) == pytest.approx((0.08, 0.08, 0.08))
    pair = scores(np.random.default_rng(0).normal(25, 50, 30))
    assert compare(*pair, seed=1) == compare(*pair, seed=1) != compare(*pair, seed=2)


def test_compare_weighs_by_tokens_of_the_same_blocks():
    base, adaptive = (Score(np.array([first, 1000.0]), np.array([10, 1000])) for first in (10.0, 20.0))
    assert compare(base, adaptive).increase == pytest.approx(np.expm1(10 / 1010))
    with pytest.raises(HatError):
        compare(base, Score(adaptive.nll[1:], adaptive.tokens[1:]))


def test_below_six_blocks_there_is_none():
    for n in (1, FEWEST - 1):
        found = compare(*scores(np.full(n, 10.0)))
        assert isnan(found.low) and isnan(found.high) and found.increase == pytest.approx(np.expm1(0.02))
    assert compare(*scores(np.arange(FEWEST))).low > 0


def test_a_bound_inside_the_interval_is_open():
    cases = [(-0.01, 0.03, "kept"), (0.031, 0.05, "missed"), (0.02, 0.04, "open"), (0.03, 0.04, "open")]
    for low, high, expected in [*cases, (np.nan, np.nan, "open")]:
        assert outcome(low, high, at_most=0.03) == outcome(-high, -low, at_least=-0.03) == expected
