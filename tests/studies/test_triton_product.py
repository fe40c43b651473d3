"""The GPU kernel, interpreted on the CPU, gives the CPU's product."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

SCRIPT = """
import torch
from studies.gpu.triton_product import gated_product

draw = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for channels, outputs in ((64, 128), (45, 301), (200, 7)):
        x = torch.randn(channels, generator=draw).to(dtype)
        w = torch.randn(channels, outputs, generator=draw).to(dtype)
        cut = torch.rand(channels, generator=draw) - 0.1
        for scale in (1.0, 0.5, 3.0, 1e9):
            kept = torch.where(x.float().abs() > cut * scale, x.float(), 0.0)
            expected = kept.double() @ w.double()
            found = gated_product(x, w, cut, scale)
            assert found.dtype == torch.float32
            assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max()), (dtype, channels, scale)
"""


def test_it_is_the_masked_product():
    # Read when triton is imported, hence a separate process.
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
