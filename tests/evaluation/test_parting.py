"""The first decision that two paths take differently is found: its token, layer, site and channel."""

import pytest
import torch
from tiny_runs import GRAINS, active, random_blocks, skipping

from hat_lib.config import HatError
from hat_lib.evaluation.parting import first_difference

IDS, PROMPT = torch.tensor(random_blocks(1, 24)), 8


@pytest.mark.parametrize("grain", GRAINS)
def test_equal_paths_part_nowhere(grain):
    assert first_difference(active(grain), IDS, PROMPT) is None


@pytest.mark.parametrize("layer, site", [(0, "qkv"), (2, "down"), (3, "gate_up")])
def test_the_channel_that_tips_is_named(layer, site, monkeypatch):
    hat = skipping("channel")
    hat.exit_rate = 0.0  # each token reaches each site
    router, threshold = hat.routers[f"{layer}_{site}"], hat.calibration.thresholds_at(hat.capacity)[layer, site]
    seen, keep = [], router.keep

    def noted(x, cut, scale):
        seen.append(router.score(x, scale)[0])
        return keep(x, cut, scale)

    monkeypatch.setattr(router, "keep", noted)
    assert first_difference(hat, IDS, PROMPT) is None
    away = ((torch.stack(seen) - threshold) / threshold).abs()
    token, channel = divmod(int(away.argmin()), away.shape[1])
    near, second = away.flatten().topk(2, largest=False).values
    moved = threshold + (1 if seen[token][channel] > threshold else -1) * threshold * float(near + second) / 2
    monkeypatch.setattr(router, "keep", lambda x, cut, scale: keep(x, moved, scale))  # of the reference path alone
    found = first_difference(hat, IDS, PROMPT)
    assert (found.token, found.layer, found.site, found.channel) == (token, layer, site, channel)
    assert found.distance == pytest.approx(float(near), rel=1e-3) and f"{site}, channel {channel}" in str(found)


def test_where_there_is_one_path_alone():
    hat = skipping("channel")
    with hat.reference(), pytest.raises(HatError, match="reference path"):
        first_difference(hat, IDS, PROMPT)
