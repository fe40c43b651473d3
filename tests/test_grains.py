"""FusedLinear: one storage, exact products, and the base's weights back bit for bit."""

import pytest
import torch
from torch import nn

from hat_lib.grains import FusedLinear, RowLinear

pytestmark = pytest.mark.usefixtures("no_grad")


def linears(widths, channels=48, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Linear(channels, w, bias=bias).to(dtype) for w in widths]


CASES = {
    "fused": ([40, 24, 24], 48, False),
    "bias": ([40, 24], 48, True),
    "one tile": ([64], 48, False),
    "wide": ([1024], 48, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("layout", ["rows", "tile"])
def test_products(case, share, layout, monkeypatch):
    widths, channels, bias = CASES[case]
    modules = linears(widths, channels, bias)
    weight = torch.cat([m.weight for m in modules]).clone()
    offset = torch.cat([m.bias for m in modules]) if bias else 0
    fused = FusedLinear(modules)
    getattr(fused, layout)()
    x = torch.randn(5, channels)
    keep = None if share is None else torch.rand(5, channels) < share
    expected = (x if keep is None else x * keep) @ weight.T + offset
    torch.testing.assert_close(fused(x, keep), expected)
    assert (fused.tiles is None) == (layout == "rows"), "several rows leave the layout as it is"
    fused.tile()
    for break_even in (0.0, 1.0):  # in order and gathered
        monkeypatch.setattr(fused, "break_even", break_even, raising=False)
        rows = [fused(x[i : i + 1], None if keep is None else keep[i : i + 1]) for i in range(5)]
        torch.testing.assert_close(torch.cat(rows), expected)
    assert fused.tiles is not None


@pytest.mark.parametrize("case", CASES)
def test_one_storage_and_release(case):
    widths, channels, bias = CASES[case]
    modules = linears(widths, channels, bias)
    before = [m.weight.clone() for m in modules]
    fused = FusedLinear(modules)
    for layout in ("rows", "tile", "tile", "rows", "tile"):
        getattr(fused, layout)()
        storage = fused.storage.untyped_storage()
        assert {m.weight.untyped_storage().data_ptr() for m in modules} == {storage.data_ptr()}
        assert storage.nbytes() == sum(w.numel() * 4 for w in before)
        for m, w in zip(modules, before, strict=True):
            assert torch.equal(m.weight.reshape(w.shape), w)
    torch.testing.assert_close(fused.column_norm(), torch.cat(before).norm(dim=0))
    fused.release()
    for m, w in zip(modules, before, strict=True):
        assert torch.equal(m.weight, w) and m.weight.is_contiguous()
        assert m.weight.untyped_storage().nbytes() == w.numel() * 4, "nothing else is kept alive by it"


@pytest.mark.parametrize("layout", ["rows", "tile"])
def test_columns(layout):
    modules = linears([40, 24, 24], bias=True)
    expected = torch.cat([m(torch.ones(3, 48)) for m in modules[1:]], 1)
    fused = FusedLinear(modules)
    getattr(fused, layout)()
    torch.testing.assert_close(fused.columns(torch.ones(3, 48), 40, 88), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_row_linear_is_the_same_layer(dtype, bias):
    (module,) = linears([64], bias=bias, dtype=dtype)
    x = torch.randn(2, 3, 48, dtype=dtype)
    expected = [module(x), module(x[:1, :1])]
    row = RowLinear(module)
    for found, want in zip([module(x), module(x[:1, :1])], expected, strict=True):
        assert found.shape == want.shape
        torch.testing.assert_close(found, want)
    row.release()
    assert "forward" not in vars(module)
