"""Gated products: bits that depend on neither what is skipped, nor the rows beside, nor the number of threads."""

import numpy as np
import pytest
import torch

from hat_lib.engine import kernels
from hat_lib.engine.compiling import compiled
from hat_lib.engine.kernels import add_channels, dots, keep
from hat_lib.engine.weights import as_numpy

NO = np.float32(1e9)


@compiled()
def widened(bits, out):
    for i in range(len(bits)):
        out[i] = kernels.as_float(bits[i])


@compiled()
def shortened(values, out):
    for i in range(len(values)):
        out[i] = kernels.as_stored(values[i], out[i])


@compiled()
def exponentials(x, out):
    for i in range(len(x)):
        out[i] = kernels.exp(x[i])


def test_bfloat16_to_float_and_back():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    wide = np.empty(len(every), np.float32)
    widened(as_numpy(every), wide)
    assert np.array_equal(wide, every.float().numpy())
    between = np.concatenate([wide, np.nextafter(wide, np.float32(0)), wide[1:] / 2 + wide[:-1] / 2])
    short = np.empty(len(between), np.uint16)
    shortened(between, short)
    assert np.array_equal(short, as_numpy(torch.from_numpy(between).to(torch.bfloat16)))


def test_exp():
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    found = np.empty_like(x)
    exponentials(x, found)
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 1e-6
    exponentials(np.full(1, -1e30, np.float32), found[:1])
    assert 0 <= found[0] < 1e-37


def product(w, x, cut, *, scale=1.0, whole=False, runs=True):
    """``x [R, C]`` gated, times ``w [C, O]``: outputs ``[R, O]`` and how many channels each row kept."""
    rows, channels = x.shape
    index, values = np.zeros(channels + 8, np.uint64), np.zeros((rows, channels + 8), np.float32)
    kept, y = np.zeros(rows, np.int32), np.full((rows, w.shape[1]), np.nan, np.float32)
    of_row = [np.broadcast_to(np.asarray(v, d), rows).copy() for v, d in ((scale, "f4"), (whole, "?"), (runs, "?"))]
    n = keep(x, 0, channels, cut, *of_row, index, values, kept)
    assert n % 8 == 0
    add_channels(w, index, values, n, y, 0, w.shape[1])
    return y, kept


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def weights(request):
    drawn = torch.from_numpy(np.random.default_rng(0).normal(size=(77, 2100)).astype("f4"))  # more than `COLUMNS`
    return as_numpy((50 * drawn).to(torch.int8) if request.param == "int8" else drawn.to(getattr(torch, request.param)))


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(5, 77)).astype(np.float32)


@pytest.mark.parametrize("cut", [-1, 0.1, 0.7, 2.0, NO], ids="cut {}".format)
def test_what_is_skipped_and_what_is_zero_are_the_same_bits(weights, x, cut):
    cuts = np.full(77, cut, np.float32)
    for row in x:
        found, kept = product(weights, row[None], cuts)
        masked = np.where(np.abs(row) > cut, row, 0).astype(np.float32)
        assert kept[0] == np.count_nonzero(masked)
        assert np.array_equal(found, product(weights, masked[None], np.full(77, -1, np.float32))[0])


def test_a_product_is_a_product(weights, x):
    wide = np.empty(weights.size, np.float32)
    widened(weights.ravel(), wide)
    expected = x.astype("f8") @ wide.reshape(weights.shape)
    found = product(weights, x, np.full(77, -1, np.float32))[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    heads = np.empty((5, 77), np.float32)
    rows = np.ascontiguousarray(weights[:, :77])
    dots(rows, np.zeros(0, np.float32), x, heads, 0, 77)
    assert np.abs(heads - x.astype("f8") @ wide.reshape(weights.shape)[:, :77].T).max() < 1e-5 * np.abs(heads).max()


def test_a_row_among_others_is_as_alone(weights, x):
    cuts = np.linspace(0.1, 1.2, 77, dtype=np.float32)
    scale, whole = np.array([1, 0.5, 2, 1, 1], "f4"), np.array([0, 0, 0, 1, 0], bool)
    runs = np.array([1, 1, 1, 1, 0], bool)
    together, kept = product(weights, x, cuts, scale=scale, whole=whole, runs=runs)
    assert kept[3] == 77 and kept[4] == 0 and not together[4].any()
    for r in range(4):
        alone, own = product(weights, x[r : r + 1], cuts, scale=scale[r], whole=whole[r])
        assert np.array_equal(together[r], alone[0]) and kept[r] == own[0]
