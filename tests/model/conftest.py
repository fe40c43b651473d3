"""What the tests of the model share."""

import numpy as np
import pytest
import torch


@pytest.fixture
def ids():
    """Three rows of random tokens."""
    return torch.from_numpy(np.random.default_rng(1).integers(5, 250, (3, 14)))
