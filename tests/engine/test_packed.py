"""Linears: one storage, exact products in either layout, and the base's weights back bit for bit."""

import pytest
import torch
from torch import nn

from hat_lib.engine import packed as linears_module
from hat_lib.engine.packed import LOOK_AGAIN, FusedLinear, TiedEmbedding, TiledLinear

pytestmark = pytest.mark.usefixtures("no_grad")


def linears(widths, channels=48, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Linear(channels, w, bias=bias).to(dtype) for w in widths]


CASES = {
    "fused": ([96, 32, 32], 48, False),
    "bias": ([96, 32], 48, True),
    "one tile": ([64], 48, False),
    "wide": ([1024], 48, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("layout", ["rows", "tile"])
def test_products(case, share, layout):
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
    assert fused.tiles is not None
    for break_even in (0.0, 1.0):  # in order and gathered
        fused.break_even, fused._ordered_rows = break_even, 0
        rows = [fused(x[i : i + 1], None if keep is None else keep[i : i + 1]) for i in range(5)]
        torch.testing.assert_close(torch.cat(rows), expected)


def test_kept_channels_are_counted_again_after_a_while(monkeypatch):
    """A row that is multiplied in order stands for the next ones, until channels are counted again."""
    fused, taken = FusedLinear(linears([64])), []
    monkeypatch.setattr(linears_module, "gathered", lambda *args: taken.append("gathered") or torch.zeros(1, 64))
    monkeypatch.setattr(linears_module, "ordered", lambda *args: taken.append("ordered") or torch.zeros(1, 64))
    fused.tile()
    x, many, few = torch.ones(1, 48), torch.ones(1, 48, dtype=torch.bool), torch.arange(48)[None] < 4
    for keep in (few, many, *[few] * LOOK_AGAIN):
        fused(x, keep)
    assert taken == ["gathered", *["ordered"] * LOOK_AGAIN, "gathered"]


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
def test_tiled_linear_is_the_same_layer(dtype, bias):
    (module,) = linears([64], bias=bias, dtype=dtype)
    weight, x = module.weight.clone(), torch.randn(2, 3, 48, dtype=dtype)
    inputs = [x, x[:1, :1], x[0, 0]]
    expected = [module(i) for i in inputs]
    tiled = TiledLinear(module)
    for layout in ("rows", "tile"):
        getattr(tiled.fused, layout)()
        for given, want in zip(inputs, expected, strict=True):
            found = module(given)
            assert found.shape == want.shape
            torch.testing.assert_close(found, want, atol=1e-6 if dtype == torch.float32 else 2e-3, rtol=0.02)
    assert tiled.fused.tiles is not None
    tiled.release()
    assert "forward" not in vars(module) and torch.equal(module.weight, weight)


@pytest.mark.parametrize("out, width, tiled", [(3 * 177, 177, True), (3 * 509, 3, False)])
def test_a_matrix_without_wide_tiles_stays_in_rows(out, width, tiled):
    (module,) = linears([out])
    expected = module(torch.ones(1, 48))
    fused = TiledLinear(module).fused
    fused.tile()
    torch.testing.assert_close(module(torch.ones(1, 48)), expected)
    assert fused.width == width and (fused.tiles is not None) == tiled


def test_a_tied_embedding_reads_either_layout():
    (head,) = linears([96])
    embedding = nn.Embedding(96, 48)
    embedding.weight = head.weight
    ids = torch.tensor([[0, 95, 31], [32, 64, 1]])
    expected = embedding(ids)
    tiled = TiledLinear(head)
    tied = TiedEmbedding(embedding, tiled.fused)
    assert torch.equal(embedding(ids), expected)
    tiled.fused.tile()
    assert torch.equal(embedding(ids), expected) and embedding.weight is head.weight
    tied.release()
    tiled.release()
    assert torch.equal(embedding(ids), expected) and "forward" not in vars(embedding)
