"""Weights that fewer bits cannot hold are refused by name; NaN among the inputs is NaN in what follows."""

import re
from itertools import product

import numpy as np
import pytest
import torch
from test_decoder import WIDE, llama
from transformers import DynamicCache

from hat_lib.engine.arrays import BLOCK
from hat_lib.engine.compiling import compiled
from hat_lib.engine.decoder import Decoder, Place
from hat_lib.engine.integers import encode
from hat_lib.engine.weights import pack

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.parametrize("form", ["int8", "q4"])]


def test_refused_with_layer_linear_row_and_value(form):
    lm = llama(**WIDE, num_hidden_layers=2)
    places = [("layer 1, k_proj", lm.model.layers[1].self_attn.k_proj, 13), ("the head", lm.lm_head, 42),
              ("layer 0, up_proj", lm.model.layers[0].mlp.up_proj, 415)]  # fmt: skip
    for name, linear, row in places:
        for value in (torch.nan, -torch.inf, *[1e9, -8.4e6] * (name == "the head")):
            before, linear.weight[row, 5] = linear.weight[row, 5].clone(), value
            with pytest.raises(ValueError, match=re.escape(f"{name}, row {row}: {value:g} cannot be kept in {form}")):
                pack(lm, form)
            linear.weight[row, 5] = before


def test_tiny_weights_of_the_head(form):
    """To half a unit of float16, unless that is coarse even for the largest; then refused."""
    lm = llama(**WIDE, num_hidden_layers=1)
    for size in (1e-3, 1e-4, 1e-5, 1e-6, 1e-12):
        lm.lm_head.weight[7, 32:64] = tiny = torch.linspace(-size, 0.9 * size, 32)
        head = pack(lm, form)
        unit = float(head.head_scale.view(np.float16)[7, 1])
        assert np.abs(head.head[7, 32:64] * np.float32(unit) - tiny.numpy()).max() <= 0.6 * unit
        assert unit <= max(size / 100, 2.0**-23)
    lm.lm_head.weight.fill_(0)
    pack(lm, form)
    lm.lm_head.weight[9, 3] = 1e-9
    with pytest.raises(ValueError, match=f"the head, row 9: 1e-09 cannot be kept in {form}"):
        pack(lm, form)


@compiled()
def encoded(values):
    return encode(values, 0, len(values), np.empty(BLOCK, np.int8))


def test_nan_among_the_channels(form):
    """Wherever it is, with a shortlist or without, it and infinity make NaN of its own token's logits."""
    lm, place = llama(**WIDE), Place(np.zeros((3, 1), int), np.zeros(3, int), np.zeros((3, 1), bool))
    for at, value in product((0, 15, 16, 40, 95), (np.nan, np.inf)):
        values = np.linspace(-3, 2, 96, dtype=np.float32)
        values[at] = value
        assert [np.isnan(encoded(block)[0]) for block in values.reshape(-1, BLOCK)] == [
            at // BLOCK == i for i in range(6)
        ]
        lm.model.embed_tokens.weight[7] = torch.from_numpy(values)
        decoder = Decoder(lm, form, head_norm=torch.ones(96))
        for head in (-np.inf, 0.01):
            thresholds = decoder.dense._replace(head=np.float32(head), margin=np.float32(1))
            ids, cache = np.array([[5], [7], [9]]), DynamicCache(config=lm.config)
            out = decoder.step(ids, cache, thresholds, place).logits
            assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
