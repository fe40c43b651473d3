"""What the tests of the model share."""

import numpy as np
import pytest
import torch
from tiny_runs import KINDS, active, tiny


@pytest.fixture
def ids():
    """Three rows of random tokens."""
    return torch.from_numpy(np.random.default_rng(1).integers(5, 250, (3, 14)))


@pytest.fixture(params=KINDS, ids=" ".join)
def hat(request):
    grain, name = request.param
    return active(grain, tiny(name=name))


@pytest.fixture
def channel_hat():
    return active("channel")
