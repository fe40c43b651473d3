"""Rows times a matrix in tiles: two ways with one result, and a measurement that chooses between them."""

import pytest
import torch

from hat_lib.engine import products as tiles
from hat_lib.engine.products import gathered, ordered, tile_width


@pytest.mark.parametrize(
    "widths, width", [([5632, 5632], 352), ([2048, 256, 256], 256), ([576, 192, 192], 192), ([97], 97)]
)
def test_as_wide_as_registers_and_matrices_allow(widths, width):
    assert tile_width(widths) == width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_both_ways_agree_bit_for_bit(dtype, share):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 200, 64, generator=g).to(dtype)
    x, keep = torch.randn(1, 200, generator=g).to(dtype), torch.rand(1, 200, generator=g) < share
    found = gathered(weight, x, keep.view(-1).nonzero().view(-1))
    assert torch.equal(found, ordered(weight, x * keep)) and found.shape == (1, 192)
    exact = torch.einsum("c,tcw->tw", (x * keep).view(-1).double(), weight.double()).view(1, -1)
    torch.testing.assert_close(found.double(), exact, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, tiles.FEW])
def test_each_of_a_few_rows_is_what_it_is_alone_to_the_bit(dtype, rows):
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 200, 64, generator=g).to(dtype), torch.randn(rows, 200, generator=g).to(dtype)
    assert torch.equal(ordered(weight, x), torch.cat([ordered(weight, row) for row in x.split(1)]))


class TestBreakEven:
    @pytest.fixture
    def clock(self, monkeypatch):
        """Time that passes only inside products: ``clock.cost(share)`` a gather, ``clock.dense`` a pass in order."""

        class Clock:
            now, dense = 0.0, 1.0

            def cost(self, share):
                return 0.5 + share

            def gather(self, weight, x, kept):
                self.now += self.cost(len(kept) / weight.shape[1])

            def order(self, weight, x):
                self.now += self.dense

        clock = Clock()
        monkeypatch.setattr(tiles.time, "perf_counter", lambda: clock.now)
        monkeypatch.setattr(tiles, "gathered", clock.gather)
        monkeypatch.setattr(tiles, "ordered", clock.order)
        return clock

    @pytest.fixture
    def measure(self):
        return lambda: tiles.break_even.__wrapped__(2, 1000, 8, torch.float32, 1)

    def test_where_the_lines_cross(self, clock, measure):
        assert measure() == pytest.approx(0.5, abs=1e-6)

    def test_what_comes_between_does_not_count(self, clock, measure, monkeypatch):
        turns = []

        def interrupted(weight, x):
            turns.append(0)
            clock.now += 50.0 if len(turns) < 3 else 1.0

        monkeypatch.setattr(tiles, "ordered", interrupted)
        assert measure() == pytest.approx(0.5, abs=1e-6)

    @pytest.mark.parametrize("dense, expected", [(0.1, 0.0), (9.0, 1.0)])
    def test_never_and_always(self, clock, measure, dense, expected):
        clock.dense = dense
        assert measure() == expected

    @pytest.mark.parametrize("dense, expected", [(0.1, 0.0), (9.0, 1.0)])
    def test_a_share_that_does_not_show(self, clock, measure, dense, expected):
        clock.dense, clock.cost = dense, lambda share: 1.0 - share / 10
        assert measure() == expected

    def test_for_real(self, measure):
        before = torch.get_rng_state()
        assert 0.0 <= measure() <= 1.0
        assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers stay as they were"

    def test_once_for_each_shape(self, monkeypatch):
        tiles.break_even.cache_clear()
        for _ in range(3):
            tiles.break_even(2, 64, 8, torch.bfloat16, 1)
        assert tiles.break_even.cache_info().misses == 1
