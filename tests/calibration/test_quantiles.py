"""What of a text is measured, and thresholds as quantiles of scores."""

import numpy as np
import pytest
import torch
from tiny_runs import random_blocks, untrained

from hat_lib.calibration import quantiles as module
from hat_lib.calibration.quantiles import held_out_parts, score_quantiles
from hat_lib.config import HatError

TEXT = [torch.tensor([b]) for b in random_blocks(8, 64)]


@pytest.mark.parametrize(
    ("count", "measured", "checked"),
    [(5, [0, 1, 2, 4], [3]), (9, [0, 1, 2, 4, 5, 6, 8], [3, 7])],
)
def test_every_fourth_block_checks(count, measured, checked):
    blocks = [[n] * (300 + n) for n in range(count)]  # known by what they hold, and of different lengths
    found = held_out_parts(untrained("channel"), blocks)
    assert [[int(b[0, 0]) for b in part] for part in found] == [measured, checked]


@pytest.mark.parametrize("lengths", [[256], [512, 8], [512] + [4] * 7])
def test_of_few_or_uneven_blocks_a_part_of_each_checks(lengths):
    ends = np.cumsum(lengths).tolist()
    text = [list(range(end - n, end)) for n, end in zip(lengths, ends, strict=True)]  # no token occurs twice
    fit, check = ([i for b in part for i in b.flatten().tolist()] for part in held_out_parts(untrained(), text))
    assert sorted(fit + check) == list(range(sum(lengths)))
    assert len(fit) / 8 < len(check) < len(fit)


def test_some_scores_of_all_tokens_say_what_all_scores_say(monkeypatch):
    hat = untrained()
    whole = score_quantiles(hat, TEXT, progress=False)
    monkeypatch.setattr(module, "SAMPLES", 4_000)
    some = score_quantiles(hat, TEXT, progress=False)
    assert some.tokens == whole.tokens == 8 * 62 and 4_000 <= some.scores <= 4_100
    for share in (0.3, 0.5, 0.7):
        a, b = (np.array(list(q.thresholds(share).values())) for q in (whole, some))
        assert np.abs(a / b - 1).max() < 0.12


def test_equal_scores_give_no_thresholds():
    with torch.no_grad(), pytest.raises(HatError):
        score_quantiles(untrained("token"), TEXT[:2], progress=False)
