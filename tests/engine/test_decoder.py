"""The engine against transformers: every form of Llama, any number of threads, rows and sequences."""

import numpy as np
import pytest
import torch
from four_bits_read import round_weights
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hat_lib.engine import team
from hat_lib.engine.cache import buffer_for
from hat_lib.engine.decoder import Decoder, Place
from hat_lib.engine.loop import decode
from hat_lib.engine.weights import packed_bytes

pytestmark = pytest.mark.usefixtures("no_grad")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FORMS = {
    "many heads": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "one key head": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "odd sizes": {"hidden_size": 42, "intermediate_size": 70, "num_attention_heads": 3, "head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3, "max_position_embeddings": 128},
}

WIDE = {"hidden_size": 96, "intermediate_size": 416, "num_attention_heads": 6, "num_key_value_heads": 2}
"""widths are multiples of 32, but channels not of 8 times that"""


def llama(dtype=torch.float32, **form):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": None}
    more = {"num_hidden_layers": 3, "vocab_size": 101, "initializer_range": 0.1}
    config = LlamaConfig(**{**sizes, **more, **form})
    config.num_key_value_heads = form.get("num_key_value_heads", config.num_attention_heads)
    lm = LlamaForCausalLM(config).eval()
    for name, p in lm.named_parameters():
        if p.dim() == 1:
            p.copy_(torch.randn(p.shape) * 0.3 + ("norm" in name))
    return lm.to(dtype)


def steps(decoder, ids, cache=None, at_a_time=1, first=None):
    """Logits of ``ids [B, T]``, ``at_a_time`` tokens at a time after a cache."""
    cache = DynamicCache(config=decoder.lm.config) if cache is None else cache
    out, (b, tokens) = [], ids.shape
    for t in range(0, tokens, at_a_time):
        part, start = ids[:, t : t + at_a_time], cache.get_seq_length()
        position = np.broadcast_to(np.arange(start, start + part.shape[1]), part.shape)
        place = Place(position, np.zeros(b, np.int64), np.zeros(part.shape, bool))
        out.append(decoder.step(part.numpy(), cache, decoder.dense, place).logits)
    return torch.cat(out, 1)


@pytest.fixture
def ids():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 101, (2, 24)))


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_llama(form, ids):
    lm = llama(**FORMS[form])
    expected = lm(ids).logits
    assert float((steps(Decoder(lm), ids) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_bfloat16_is_nearer_to_the_truth_than_transformers(ids):
    lm = llama(torch.bfloat16)
    exact, own = llama(torch.bfloat16).float()(ids).logits, lm(ids).logits
    found = steps(Decoder(lm), ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().mean() < (own.float() - exact).abs().mean()


@pytest.mark.parametrize("dtype, form", [(torch.float32, "base"), (torch.bfloat16, "base"), (torch.float32, "q4")])
def test_threads_rows_and_pieces_change_no_bit(dtype, form, ids, monkeypatch):
    decoder = Decoder(llama(dtype, num_hidden_layers=2, **WIDE if form == "q4" else {}), form)
    monkeypatch.setattr(team, "cores", lambda: 16)
    monkeypatch.setattr(team.Pace, "after", lambda pace, took, lost: None)
    monkeypatch.setattr(team, "LATE", 1 << 62)
    expected, before = steps(decoder, ids), torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 8):
            torch.set_num_threads(threads)
            assert torch.equal(steps(decoder, ids[:, :2]), expected[:, :2]), threads
    finally:
        torch.set_num_threads(before)
    compiled = len(decode.signatures)
    assert torch.equal(steps(decoder, ids[:1]), expected[:1])
    assert torch.equal(steps(decoder, ids, at_a_time=4), expected)
    assert len(decode.signatures) == compiled  # otherwise ten more seconds, and different bits


def test_a_table_of_angles_is_long_enough_whatever_other_threads_make_of_it():
    class Raced(Decoder):  # the table of another thread's shorter text has always just taken the place of this one's
        _angles = property(lambda self: np.zeros((2, 4, 4), np.float32), lambda self, table: None)

    assert Raced(llama())._rotary(1000).shape[1] > 1000


def divergence(expected, found):
    """KL divergence, nats per token."""
    expected, found = expected.log_softmax(-1), found.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("form, size, nats", [("int8", 0.3, 1e-3), ("q4", 0.2, 0.2)])
def test_fewer_bits_are_near(form, size, nats, ids):
    lm = llama(**WIDE, attention_bias=True)
    plain, expected = Decoder(lm), lm(ids).logits
    small = Decoder(lm, form)
    assert packed_bytes(small.weights) < size * packed_bytes(plain.weights)
    found = steps(small, ids)
    assert 0 <= divergence(expected, found) < nats
    if form == "q4":  # mostly due to the (normally distributed) weights; inputs in eight bits cost little
        round_weights(lm)
        assert 0 <= divergence(lm(ids).logits, found) < 2e-3


class TestCache:
    """Keys and values in the growing arrays stay equal to those of a `DynamicCache`."""

    CHANGES = {
        "as it is": lambda cache: None,
        "cropped": lambda cache: cache.crop(-5),
        "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "selected": lambda cache: cache.batch_select_indices(torch.tensor([0])),
        "repeated": lambda cache: cache.batch_repeat_interleave(2),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_after_what_transformers_does_to_it(self, change, ids):
        """Views taken before do not change."""
        lm = llama()
        plain, growing = DynamicCache(config=lm.config), DynamicCache(config=lm.config)
        for cache in (plain, growing):
            lm(ids, cache=cache, use_cache=True)
        buffer_for(growing, (len(ids), lm.config.num_key_value_heads, lm.config.head_dim, lm.dtype), 1)
        taken = [t for layer in growing.layers for t in (layer.keys, layer.values)]
        before = [t.clone() for t in taken]
        for cache in (plain, growing):
            self.CHANGES[change](cache)
        assert plain.get_seq_length() == growing.get_seq_length()
        batch = len(plain.layers[0].keys)
        for more in (3, 200, 1):  # in place, beyond the buffer, and outside it
            tokens = ids[:1].repeat(batch, 9)[:, :more]
            expected, found = (lm(tokens, cache=cache, use_cache=True).logits for cache in (plain, growing))
            assert torch.equal(expected, found) and all(map(torch.equal, taken, before))
        found = steps(Decoder(lm), tokens, cache=growing)
        expected = lm(tokens, cache=plain, use_cache=True).logits
        assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
