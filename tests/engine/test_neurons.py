"""FFNs of chosen neurons: a preview is a product of integers, exactly, and its neurons are those of the reference."""

import numpy as np
import pytest
import torch
from test_decoder import FORMS, llama

from hat_lib.engine.compiling import compiled
from hat_lib.engine.four_bits import has_avx2
from hat_lib.engine.neurons import _four_rows, four_rows, preview
from hat_lib.engine.weights import pack
from hat_lib.model.routers import NeuronRouter, four_bits

pytestmark = pytest.mark.usefixtures("no_grad")
plain_rows = _four_rows(avx2=False)


@compiled()
def product(w, at, width, codes, total, out):
    four_rows(w, at, width, codes, total, out, 0)


@compiled()
def plain_product(w, at, width, codes, total, out):
    plain_rows(w, at, width, codes, total, out, 0)


@compiled()
def previewed(base, layer, x, codes, f0, f1, buffer, out):
    preview(base, layer, x, codes, f0, f1, buffer, out)


@pytest.mark.parametrize("chunks", [1, 4, 9])
def test_four_rows_are_sums_of_integers(chunks):
    drawn = np.random.default_rng(0)
    q, codes = drawn.integers(-8, 8, (4, 64 * chunks)), drawn.integers(-127, 128, 64 * chunks)
    q[0], codes[:64] = 7, 127  # the largest sums
    bytes_ = (q + 8).reshape(4, chunks, 2, 32)
    w = (bytes_[:, :, 0] | bytes_[:, :, 1] << 4).astype(np.uint8).reshape(-1)
    for function in (product, plain_product) if has_avx2() else (plain_product,):
        out = np.zeros(4, np.float32)
        function(w, 0, 32 * chunks, codes.astype(np.int8), np.int32(codes.sum()), out)
        assert np.array_equal(out, q @ codes)


@pytest.mark.parametrize("form", ["many heads", "odd sizes"])
def test_a_preview_is_that_of_the_reference_path(form):
    lm = llama(**FORMS[form])
    routers = [NeuronRouter(layer.mlp) for layer in lm.model.layers]
    base = pack(lm, neurons=[(router.codes, router.code_scale) for router in routers])
    d, f = lm.config.hidden_size, lm.config.intermediate_size
    x = torch.randn(d, generator=torch.Generator().manual_seed(1))
    codes, out = np.zeros(2 * base.neuron_codes.shape[2], np.int8), np.zeros(f, np.float32)
    for f0, f1 in ((0, f // 4), (f // 4, f)):
        previewed(base, 1, x.numpy(), codes, f0, f1, np.zeros(2 * f + 8, np.float32), out)
    np.testing.assert_allclose(out, routers[1].preview(x[None])[0].numpy(), rtol=2e-6, atol=1e-9)


def test_four_bits_are_near():
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    codes, scale = four_bits(weight)
    assert codes.min() >= -8 and codes.max() <= 7
    assert float((codes * scale[:, None] - weight).abs().max() / scale.max()) < 0.51
