"""Decoding a text token by token scores it as one forward does; steered, it comes to the work that was asked for."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from tiny_runs import gating, new_hat, random_blocks, skipping

from hat_lib.evaluation.perplexity import score_each
from hat_lib.model.modes import combined

BLOCKS = [
    {"input_ids": ids, "n_context": context, "doc": "a"}
    for ids, context in zip([*random_blocks(2, 40), *random_blocks(1, 24, seed=1)], (0, 12, 0), strict=True)
]


@pytest.mark.filterwarnings("ignore:token grain")
@pytest.mark.parametrize("make", [partial(skipping, "channel"), partial(skipping, "token"), gating])
def test_without_steering_it_is_the_score_of_one_forward(make):
    hat = make()
    settings = [partial(hat.at, 0.7), hat.dense]
    one = score_each(hat, BLOCKS, settings, progress=False)
    decoded = score_each(hat, BLOCKS, settings, batch_size=3, progress=False, decoded=True)
    for a, b in zip([one[0], *one[1]], [decoded[0], *decoded[1]], strict=True):
        np.testing.assert_allclose(b.nll, a.nll, rtol=1e-4)
        head = 0.01 * (hat.has_shortlist and b.capacity < 1)  # of all tokens, not of the scored ones
        for name in ("capacity", "exit_rate", "model_share", "layer_capacity"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), abs=1e-4 + head)
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.exits, b.exits)
        assert np.array_equal(a.documents, b.documents)
        if a.kl is not None:
            assert (b.top1, b.kl) == pytest.approx((a.top1, a.kl), abs=1e-4)
    assert decoded[1][0].capacity < 0.9 and decoded[1][1].capacity == 1 == decoded[0].capacity


def test_the_engine_decodes_and_steering_brings_it_to_what_was_asked():
    hat, blocks = new_hat("channel"), [{"input_ids": ids, "n_context": 0} for ids in random_blocks(1, 120)]
    table = hat.calibration
    hat.calibration = replace(table, thresholds=(1.5 * np.array(table.thresholds)).tolist())
    at = partial(hat.at, 0.6)
    assert hat.decoding.startswith("engine")
    settings = [at, partial(combined, at, hat.steered)]
    _, (plain, steered) = score_each(hat, blocks, settings, progress=False, decoded=True)
    assert abs(plain.capacity - 0.6) > 0.05 and abs(steered.capacity - 0.6) < 0.03
