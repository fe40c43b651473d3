"""Sparse products: their bits do not depend on what is skipped, on the other rows, or on the number of threads."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from four_bits_read import four_bits, places, unpacked

from hat_lib.engine import kernels
from hat_lib.engine.arrays import BLOCK, PARTIALS, SECTION, Gathered, Inputs, Thread
from hat_lib.engine.compiling import compiled
from hat_lib.engine.head import as_inputs, dots, shortlist
from hat_lib.engine.integers import NEEDS, _add_by, add, encode, instructions, tile_order
from hat_lib.engine.kernels import keep
from hat_lib.engine.weights import as_numpy

CHANNELS, OUTPUTS = 96, 2144
"""more than `COLUMNS`, and not a multiple of 128"""
Head = namedtuple("Head", ("head", "head_scale"))
UNIT, ENDS = np.ones(CHANNELS, np.float32), np.empty(PARTIALS, np.int64)


def of_each(kernel):
    @compiled()
    def run(values, out):
        for i in range(len(values)):
            out[i] = kernel(values[i])

    return run


widened, exponentials = of_each(kernels.as_float), of_each(kernels.exp)


@compiled()
def shortened(values, out):
    for i in range(len(values)):
        out[i] = kernels.as_stored(values[i], out[i])


@compiled()
def listed(thread, base, x, preview, floor, logits, space):
    return shortlist(thread, base, as_inputs(base.head, x), 0, preview, floor, logits, space)


@compiled()
def add_kept(w, gathered, n, y):
    add(w, gathered, 0, n, n, y, 0, y.shape[1])


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
    odd = np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF], np.uint32).view(np.float32)
    shortened(odd, short[:4])
    assert torch.from_numpy(short[:4]).view(torch.bfloat16).isnan().all()


def test_exp():
    edges = [-np.inf, -1e4, -87.5, -87, -86, 0, 88, 88.5, 88.7, 88.8, 100, 1e38, np.inf, np.nan]
    x = np.concatenate([edges, np.linspace(-86, 88.7, 20_000)]).astype(np.float32)
    out = np.empty_like(x)
    exponentials(x, out)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(out, np.exp(x), rtol=3e-7, atol=2e-38)


def gathering(index, values):
    return Gathered(index, values, ENDS, np.zeros(2 * len(index) + 64, np.uint64))


def product(w, x, unit, *, bar=1.0, runs=True):
    """Kept channels of ``x [R, C]`` times ``w [C, O]``: outputs ``[R, O]`` and how many channels each row kept."""
    rows, channels = x.shape
    gathered = gathering(np.zeros(channels + 8, np.uint64), np.zeros((rows, channels + 16), np.float32))
    kept, y = np.zeros(rows, np.int32), np.full((rows, OUTPUTS), np.nan, np.float32)
    bars, running = (np.broadcast_to(np.asarray(v, d), rows).copy() for v, d in ((bar, "f4"), (runs, "?")))
    n = keep(Inputs(x, bars, running), unit, 0, channels, gathered, kept)
    assert n % 8 == 0
    add_kept(w, gathered, n, y)
    return y, kept


@pytest.fixture(params=["float32", "bfloat16", "int8", "q4"])
def weights(request):
    drawn = torch.from_numpy(np.random.default_rng(0).normal(size=(CHANNELS, OUTPUTS)).astype("f4"))
    if request.param == "q4":
        return four_bits(drawn.T)[0]
    if request.param == "int8":
        eight = (50 * drawn).clamp(-127, 127).to(torch.int8).numpy()
        return np.ascontiguousarray(eight[:, tile_order(OUTPUTS, 8)[:, 0]])
    return as_numpy(drawn.to(getattr(torch, request.param)))


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(5, CHANNELS)).astype(np.float32)


@pytest.mark.parametrize("threshold", [-1, 0.1, 0.7, 2.0, 1e9], ids=str)
def test_skipped_and_zero_channels_give_the_same_bits(weights, x, threshold):
    for row in x:
        found, kept = product(weights, row[None], UNIT, bar=threshold)
        masked = np.where(np.abs(row) > threshold, row, 0).astype(np.float32)
        assert kept[0] == np.count_nonzero(masked)
        assert np.array_equal(found, product(weights, masked[None], UNIT, bar=-np.inf)[0])


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def head(request):
    """A head ``[O, C]``, its scales, and the same in float64."""
    drawn = torch.from_numpy(np.random.default_rng(0).normal(size=(OUTPUTS, CHANNELS)).astype("f4"))
    if request.param != "int8":
        drawn = drawn.to(getattr(torch, request.param))
        return as_numpy(drawn), np.zeros((OUTPUTS, 0), np.int16), drawn.double().numpy()
    codes, scale = (50 * drawn).to(torch.int8).numpy(), np.geomspace(1e-7, 1e4, OUTPUTS * 3).astype(np.float16)
    scale = scale.reshape(OUTPUTS, 3)
    return codes, scale.view(np.int16), codes * scale.astype("f8").repeat(32, 1)


def test_shortlist(head, x):
    weights, scale, _ = head
    preview = np.random.default_rng(2).normal(size=OUTPUTS).astype(np.float32)
    dots(weights, scale, x[:1], full := np.empty((1, OUTPUTS), np.float32), 0, OUTPUTS)
    for floor in (-0.5, 1.0, 9.0):
        likely = preview >= floor
        for team in (1, 3):
            logits, found = np.full(OUTPUTS, np.nan, np.float32), 0
            for t in range(team):
                thread, space = Thread(t, team, np.zeros(1, np.int64)), np.zeros(OUTPUTS, np.int64)
                found += listed(thread, Head(weights, scale), x[:1], preview, np.float32(floor), logits, space)
            assert found == likely.sum() and (floor > 0 or likely.sum() > 3 * SECTION)
            assert np.array_equal(logits, np.where(likely, full[0], preview))


def test_head(head, x):
    weights, scale, wide = head
    dots(weights, scale, x, found := np.empty((5, OUTPUTS), np.float32), 0, OUTPUTS)
    if weights.dtype == np.int8:  # relative to inputs in sixteen bits
        x = np.rint(x / (unit := np.abs(x).max(1, keepdims=True) / 32767)) * unit
    expected = x.astype("f8") @ wide.T
    size = np.abs(x.astype("f8")) @ np.abs(wide).T
    assert (np.abs(found - expected) < 1e-6 * size).all()


def test_nan_is_kept(weights, x):
    """As in the definition, where a skipped one is multiplied by zero; other rows are not touched."""
    broken = x.copy()
    broken[1, 5] = np.nan
    found, expected = product(weights, broken, UNIT)[0], product(weights, x, UNIT)[0]
    assert np.isnan(found[1]).all() and np.isnan(product(weights, broken[1:2], UNIT)[0]).all()
    assert np.array_equal(np.delete(found, 1, 0), np.delete(expected, 1, 0))


@compiled()
def encoded(values, codes):
    return encode(values, 0, len(values), codes)


def test_part_of_a_block_is_filled_with_zeros():
    codes = np.full(BLOCK, 7, np.int8)
    scale, total = encoded(np.float32([3, -6, 1e9])[:2], codes)
    assert scale == np.float32(6 / 127) and total == -63 and codes.tolist() == [64, -127] + [0] * 14


def test_tiles_hold_each_output_once():
    for outputs, bits in ((2144, 4), (96, 4), (576, 8), (2096, 8)):
        assert sorted(tile_order(outputs, bits).ravel()) == [*range(outputs)]
    assert np.array_equal(tile_order(2144, 4), places(2144))


def test_four_bits_at_extremes():
    """The largest codes, all weights at either extreme, far from zero, tiny, zero; inputs that are tiny or zero."""
    ends = torch.tensor([0.0, 15.0]).repeat(16)[:, None].expand(32, 32).clone()
    for weight in (ends, -1e-6 * ends, ends - 7, ends + 100, torch.full((32, 32), 3.0), torch.zeros(32, 32)):
        w, scale = four_bits(weight.T)
        read = unpacked(w, scale)
        assert np.abs(read - weight.numpy()).max() <= 0.05 * float(weight.abs().max())
        for x in (np.ones((1, 32)), np.sign(np.arange(32) % 2 - 0.5)[None], np.zeros((1, 32)), np.full((1, 32), 1e-35)):
            y, values = np.full((1, 32), np.nan, np.float32), np.zeros((1, 64), np.float32)
            values[:, :32] = x
            add_kept(w, gathering(np.arange(32, dtype=np.uint64), values), 32, y)
            assert np.allclose(y * scale, x @ read.astype("f8"), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bits", [4, 8])
def test_all_instructions_give_the_same_bits_and_those_of_plain_integers(bits):
    """Of weights that are any bytes; to the last bit for one block, whose sum is rounded once."""
    random, found = np.random.default_rng(0), []
    outputs = 15 * 128 // bits  # of every size of tile
    if bits == 8:
        w = random.integers(-127, 128, (BLOCK, outputs), dtype=np.int8)
    else:
        w = random.integers(0, 256, (38, outputs // 2), dtype=np.uint8)
    index = np.sort(random.choice(BLOCK, 13, replace=False)).astype(np.uint64)
    x = random.normal(size=(1, 32)).astype(np.float32)
    for how in [*NEEDS][[*NEEDS].index(instructions()) :]:  # AVX-512 has what the others need
        kernel = _add_by(bits, how)

        @compiled()
        def run(w, gathered, y):
            kernel(w, gathered, 0, 13, 13, y, 0, y.shape[1])  # noqa: B023

        found.append(np.zeros((1, outputs), np.float32))
        run(w, gathering(index, x), found[-1])
    assert all(np.array_equal(other, found[0]) for other in found[1:])
    scale, _ = encoded(x[0, :13], codes := np.empty(BLOCK, np.int8))
    whole = unpacked(w, np.ones(outputs, np.float32)) if bits == 4 else plain_eight(w)
    sums = codes[:13].astype("i8") @ whole[index].astype("i8")
    assert np.allclose(found[0][0], sums * float(scale), rtol=1e-6, atol=0 if bits == 8 else 1e-6 * 2**18 * scale)


def plain_eight(w):
    made = np.empty(w.shape, np.float32)
    made[:, tile_order(w.shape[1], 8)[:, 0]] = w
    return made
