"""Corrections: no effect until trained, never in the dense model, the same definition on both paths."""

import copy

import pytest
import torch
from test_transformer import apart, base_within, close, stepwise
from tiny_runs import new_hat, random_blocks, run_phase, same_after_saving, skipping, tiny, untrained

from hat_lib.backbone.shapes import LINEARS
from hat_lib.config import HatError
from hat_lib.model.checkpoint import read_checkpoint
from hat_lib.model.cost import state_cost


def corrected(rank=2, size=0.2, base=None):
    """Calibrated, with random corrections."""
    torch.manual_seed(0)
    hat = untrained("channel", base, correction_rank=rank)
    hat.calibration = new_hat("channel").calibration
    with torch.no_grad():
        for correction in hat.corrections.values():
            correction.up.normal_(0, size), correction.shift.normal_(0, size)
    return hat


def merged(hat, strength=1.0):
    """A plain base with the corrections merged into its linear layers."""
    lm = tiny().model
    with torch.no_grad():
        for i, layer in enumerate(lm.model.layers):
            for site, names in LINEARS.items():
                correction = hat.corrections[f"{i}_{site}"]
                sizes = correction.outputs
                parts = (correction.up @ correction.down).split(sizes), correction.shift.split(sizes)
                for name, update, shift in zip(names, *parts, strict=True):
                    linear = layer.get_submodule(name)
                    linear.weight += strength * update
                    linear.bias = torch.nn.Parameter(strength * shift)
    return lm


@torch.no_grad()
def test_untrained_they_change_nothing(ids):
    plain, hat = new_hat("channel"), untrained(correction_rank=3)
    hat.calibration = plain.calibration
    for capacity in (1.0, 0.5):
        with plain.at(capacity), hat.at(capacity):
            assert torch.equal(hat.lm(ids).logits, plain.lm(ids).logits)


@torch.no_grad()
def test_the_dense_model_is_the_base(ids):
    base = tiny()
    expected, before = base.model(ids).logits, base.fingerprint
    hat = corrected(base=base)
    assert torch.equal(hat.lm(ids).logits, expected)
    base_within(hat, ids, expected)
    back = hat.unload()
    assert back.fingerprint == before and torch.equal(back.model(ids).logits, expected)


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@torch.no_grad()
def test_they_are_an_update_of_the_weights_and_a_bias(rank, ids):
    hat = corrected(rank)
    expected = merged(hat)(ids).logits
    with hat.correcting():
        close(hat.lm(ids).logits, expected)
        close(stepwise(hat.lm, ids), expected)
        assert hat.lm(ids[:1]).logits.shape == hat.lm(ids[:1], use_cache=False).logits.shape
    assert apart(expected, tiny().model(ids).logits)


@torch.no_grad()
def test_their_strength_grows_with_what_is_dropped(ids):
    hat = corrected()
    assert [hat.correction_strength(c) for c in (1.0, 0.89, 0.725, 0.45, 0.4)] == pytest.approx([0, 0.04, 0.25, 1, 1])
    assert new_hat("channel").correction_strength(0.5) == 0
    for strength in (0.3, 0.6):
        with hat.correcting(strength):
            close(hat.lm(ids).logits, merged(hat, strength)(ids).logits)
            close(stepwise(hat.lm, ids), hat.lm(ids).logits)
    size = hat.packed_bytes
    with hat.at(0.75):
        stepwise(hat.lm, ids)
        assert hat._context.mode.corrected == hat.correction_strength(0.75)
        assert hat.packed_bytes == size  # one corrected copy
    for odd in (-0.1, 1.5, True, "much"):
        with pytest.raises(HatError, match=r"strength must be a number in \[0.0, 1.0\]"):
            hat.correcting(odd)


@torch.no_grad()
def test_the_engine_decodes_as_the_reference_path_does(ids):
    hat = corrected()
    with hat.at(0.5):
        assert hat.decoding.startswith("engine")
        with hat.collect() as states:
            found = stepwise(hat.lm, ids)
        assert all(state.executed is not None for state in states)
        with hat.reference():
            close(found, stepwise(hat.lm, ids))
        # A row alone, and one that padding moves to the right.
        close(stepwise(hat.lm, ids[1:2]), found[1:2])
        padded = torch.nn.functional.pad(ids, (4, 0))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
        close(hat.lm(padded, attention_mask=mask).logits[:, 4:], found)


@torch.no_grad()
def test_the_engine_takes_new_ones(ids):
    hat = corrected()
    with hat.at(0.5):
        before = stepwise(hat.lm, ids)
        hat.corrections["1_down"].shift += 1
        after = stepwise(hat.lm, ids)
        assert apart(after, before)
        with hat.reference():
            close(after, stepwise(hat.lm, ids))


@torch.no_grad()
def test_hooks_see_the_values_used_and_send_decoding_to_the_reference_path(ids):
    base, seen = tiny(), {}
    attention = base.model.model.layers[1].self_attn
    early = attention.q_proj.register_forward_hook(lambda m, args, out: seen.update(early=out))
    hat = corrected(base=base)
    with hat.correcting():
        hat.lm(ids)
        late = attention.q_proj.register_forward_hook(lambda m, args, out: seen.update(late=out, x=args[0]))
        hat.lm(ids)
        assert "hooks" in hat.decoding
    late.remove(), early.remove()
    expected = attention.q_proj(seen["x"]) + hat.corrections["1_qkv"].term(seen["x"], 0)
    assert torch.equal(seen["late"], expected) and torch.equal(seen["early"], expected)
    assert hat.decoding.startswith("engine")


@torch.no_grad()
def test_saved_copied_and_loaded(tmp_path, ids):
    same_after_saving(corrected(), tiny(), tmp_path / "c", ids)
    with pytest.raises(HatError, match="unexpected key 'corrections"):
        new_hat("channel").load_adapter(read_checkpoint(tmp_path / "c"))


# -- token grain: what stands in for an FFN ---------------------------------------------------------


def standing_in(rank=2, size=0.2, base=None):
    """Routers that skip about a third of the FFNs, and random corrections."""
    how = {"bar": 0.6, "vectors": 1.0, "translator_rank": 2}
    hat = skipping("token", base, **how, correction_rank=rank)
    with torch.no_grad():
        for correction in hat.corrections.values():
            correction.up.normal_(0, size), correction.shift.normal_(0, size)
    return hat


@pytest.mark.filterwarnings("ignore:token grain")
@torch.no_grad()
def test_a_skipped_ffn_is_replaced_alike_on_every_path(ids):
    hat, plain = standing_in(), skipping("token", bar=0.6, vectors=1.0, translator_rank=2)
    hat.calibration = plain.calibration
    assert list(hat.corrections) == [f"{i}_ffn" for i in range(1, hat.config.n_layers)]
    expected = hat.lm(ids).logits
    assert apart(expected, plain.lm(ids).logits) and 0.3 < hat.trace.capacity < 0.95
    with hat.correcting(0.0):
        close(hat.lm(ids).logits, plain.lm(ids).logits)
    with hat.masked():
        close(hat.lm(ids).logits, expected)
    assert hat.decoding.startswith("engine")
    with hat.collect() as states:
        close(stepwise(hat.lm, ids), expected)
        close(stepwise(hat.lm, ids[1:2]), expected[1:2])
    assert all(state.executed is not None and state.corrected for state in states)
    with hat.dense():
        assert torch.equal(hat.lm(ids).logits, tiny().model(ids).logits)
    hat.corrections["1_ffn"].shift += 1
    close(stepwise(hat.lm, ids), hat.lm(ids).logits)


@pytest.mark.filterwarnings("ignore:token grain")
@torch.no_grad()
def test_the_work_of_what_stands_in_is_counted(ids):
    hat = standing_in(rank=3)
    hat.exit_rate = 0.0
    hat.lm(ids)
    cost, skipped = state_cost(hat, hat.trace), 1 - hat.trace.site_share[:, 0]
    assert torch.allclose(cost.flops["corrections"], skipped.sum(0).double() * 2 * 2 * 3 * hat.lm.config.hidden_size)
    with hat.correcting(0.0):
        hat.lm(ids)
    assert not state_cost(hat, hat.trace).flops["corrections"].any()


def test_training_teaches_what_stands_in(tmp_path):
    hat = untrained("token", correction_rank=2)
    run_phase(hat, tmp_path, steps=2)
    assert all(correction.up.any() and correction.shift.any() for correction in hat.corrections.values())


def test_a_model_without_them():
    with pytest.raises(HatError, match="no corrections"):
        new_hat("channel").correcting()


def test_training_brings_the_gated_model_nearer_to_its_base(tmp_path):
    hat = corrected(size=0.0)
    before, fingerprint = copy.deepcopy(hat.state_dict()), hat.base.fingerprint

    def kl():
        ids = torch.tensor(random_blocks())  # as in training
        with torch.no_grad():
            base = hat.lm(ids).logits.log_softmax(-1)
            with hat.at(0.4):
                return float((base.exp() * (base - hat.lm(ids).logits.log_softmax(-1))).sum(-1).mean())

    untrained_kl = kl()
    run_phase(hat, tmp_path, steps=60, router_lr=1e-9, correction_lr=5e-3, capacity=0.4, spread=0.0, anneal=0.0)
    assert kl() < 0.9 * untrained_kl
    moved = {n for n, t in hat.state_dict().items() if not torch.equal(t, before[n]) and n.startswith("corrections.")}
    assert moved == {n for n in before if n.startswith("corrections.")}
    from hat_lib.backbone.base import fingerprint as now

    assert now(hat.base.model) == fingerprint
