"""Beginnings of texts: every pattern can be filled, kinds are equally frequent, same numbers give same texts."""

import numpy as np

from hat_lib.text.openings import PATTERNS, openings


def test_every_pattern_is_filled():
    found = openings(4000, np.random.default_rng(0))
    kinds = [kind for kind, _ in found]
    assert set(kinds) == set(PATTERNS)
    expected = len(found) / len(PATTERNS)
    assert all(abs(kinds.count(kind) - expected) < 5 * expected**0.5 for kind in PATTERNS)
    for kind, text in found:
        assert text and len(text) < 200
        assert "{" not in text or kind in ("code", "python"), text
    assert len({text for _, text in found}) > 2000


def test_the_same_again():
    first, again, other = (openings(50, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other
