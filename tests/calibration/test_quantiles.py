"""What of a text is measured, and thresholds as quantiles of scores."""

import numpy as np
import pytest
import torch
from tiny_runs import random_blocks, untrained

from hat_lib.calibration import quantiles as module
from hat_lib.calibration.quantiles import held_out_parts, score_quantiles

TEXT = [torch.tensor([b]) for b in random_blocks(8, 64)]


@pytest.mark.parametrize(
    ("count", "measured", "checked"),
    [(5, [0, 1, 2, 4], [3]), (9, [0, 1, 2, 4, 5, 6, 8], [3, 7])],
)
def test_every_fourth_block_checks(count, measured, checked):
    blocks = [[n] * (300 + n) for n in range(count)]  # known by what they hold, and of different lengths
    found = held_out_parts(untrained("channel"), blocks)
    assert [[int(b[0, 0]) for b in part] for part in found] == [measured, checked]


def test_some_scores_of_all_tokens_say_what_all_scores_say(monkeypatch):
    hat = untrained()
    whole = score_quantiles(hat, TEXT, progress=False)
    monkeypatch.setattr(module, "SAMPLES", 4_000)
    some = score_quantiles(hat, TEXT, progress=False)
    assert some.tokens == whole.tokens == 8 * 62 and 4_000 <= some.scores <= 4_100
    for share in (0.3, 0.5, 0.7):
        a, b = (np.array(list(q.thresholds(share).values())) for q in (whole, some))
        assert np.abs(a / b - 1).max() < 0.12
