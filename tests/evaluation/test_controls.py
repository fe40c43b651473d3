"""Controls on a tiny random Llama, both grains: the requested work, chosen by nothing but their own rule."""

import dataclasses
from contextlib import nullcontext
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import GRAINS, random_blocks, tiny, untrained
from transformers import DynamicCache

from hat_lib.calibration.capacity import calibrate
from hat_lib.config import HatError
from hat_lib.evaluation import controls
from hat_lib.evaluation.choices import Random
from hat_lib.evaluation.controls import (
    CONTROLS,
    Cosine,
    Layers,
    OutOfReach,
    RandomExits,
    checkpoint_family,
    exit_shares,
    layer_damage,
    matched,
    static_choice,
    under,
    work_on,
)
from hat_lib.method.trace import Masks, Trace

EXITS = (1, 2, 3)
blocks = partial(random_blocks, n=5, length=64)
pytestmark = pytest.mark.usefixtures("no_grad")


@cache
def calibrated(grain):
    hat = untrained(grain)
    calibrate(hat, blocks(), probe_tokens=128, progress=False)
    return hat


@cache
def at_four_fifths(grain, name):
    return control(calibrated(grain), name, 0.8, seed=4)


@pytest.fixture(params=GRAINS)
def hat(request):
    return calibrated(request.param)


@pytest.fixture
def channels():
    return calibrated("channel")


@pytest.fixture
def tokens():
    return calibrated("token")


@pytest.fixture(params=CONTROLS)
def policy(hat, request):
    return at_four_fifths(hat.config.granularity, request.param)


def control(hat, name, capacity, seed=0, text=None):
    """A member of `CONTROLS` at a capacity."""
    text = text or blocks()
    return matched(hat, CONTROLS[name](hat, text, seed), text, capacity)


def masks(hat, policy, ids, **kwargs):
    with hat.dense(), hat.using(policy), hat.record():
        hat.lm(ids, **kwargs)
    return hat.trace.masks.keep


def equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


IDS = torch.tensor(random_blocks(3, 14, seed=7))


class TestEveryControl:
    @pytest.mark.parametrize("name", CONTROLS)
    @pytest.mark.parametrize("capacity", [0.6, 0.9])
    def test_realises_what_was_asked_for(self, hat, name, capacity):
        if hat.config.granularity == "token" and name == "cosine":
            capacity = max(capacity, 0.8)  # three of four layers always run
        policy = control(hat, name, capacity)
        for text, error in ((blocks(), 0.003), (blocks(seed=5), 0.03)):
            assert abs(work_on(hat, text, under(hat, policy)).shares[0] - capacity) <= error

    def test_protected_tokens_run_in_full(self, hat, policy):
        with hat.using(policy):
            hat.lm(IDS)
        assert (hat.trace.share[:, :, :2] == 1).all() and hat.trace.capacity < 0.95
        assert hat.config.granularity == "channel" or (hat.trace.share[0] == 1).all()

    @pytest.mark.parametrize("name", CONTROLS)
    def test_same_seed_same_choice(self, hat, name):
        first, again, other = (masks(hat, control(hat, name, 0.83, seed), IDS) for seed in (1, 1, 2))
        equal(first, again)
        drawn = name in ("random", "removal") or (name == "static" and hat.config.granularity == "token")
        assert drawn == any(not torch.equal(first[k], other[k]) for k in first)

    def test_decode_equals_parallel(self, hat, policy):
        parallel, trace = masks(hat, policy, IDS), hat.trace
        cache, steps, shares = DynamicCache(config=hat.lm.config), [], []
        for ids in IDS.split(1, dim=1):
            steps.append(masks(hat, policy, ids, cache=cache, use_cache=True))
            shares.append(hat.trace.share)
        equal({k: torch.cat([s[k] for s in steps], 1) for k in parallel}, parallel)
        torch.testing.assert_close(torch.cat(shares, -1), trace.share)

    def test_row_alone_equals_row_in_a_padded_batch(self, hat, policy):
        batch, mask = IDS.clone(), torch.ones_like(IDS)
        batch[1, :5], mask[1, :5] = 3, 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together = masks(hat, policy, batch, attention_mask=mask, position_ids=positions)
        alone = masks(hat, policy, IDS[1:2, 5:])
        equal(alone, {k: m[1:2, 5:] for k, m in together.items()})

    def test_rows_that_left_change_nothing_for_the_others(self, hat, policy):
        """With exits, a policy sees the rows that stay, by index; without compaction, it sees all of them."""
        leave = {e: torch.zeros(3, 14, dtype=torch.bool) for e in EXITS}
        leave[1][0, 4:8], leave[2][1, 6:9], leave[3][2, 2:5] = True, True, True
        found = []
        for rows in (nullcontext, partial(hat.changed, compact=False)):
            with hat.force(Masks({}, leave)), hat.using(policy), hat.record(), rows():
                hat.lm(IDS)
            depth = hat.trace.exit_layer
            assert sorted(set(depth.flatten().tolist())) == [1, 2, 3, 4]
            found.append({k: m[depth > k[0]] for k, m in hat.trace.masks.keep.items()})
        equal(*found)


def test_refusals(tokens):
    for text, capacity in ((blocks(n=1), 0.8), (blocks(), 0.05)):
        with pytest.raises(HatError):
            matched(tokens, Random, text, capacity)
    with pytest.raises(OutOfReach):
        control(tokens, "cosine", 0.5)


class TestStatic:
    def test_keeps_the_channels_of_the_largest_root_mean_square_by_the_allocation(self, channels):
        seen = {}
        put = lambda layer, site, x, _: seen.setdefault((layer, site), []).append(x[0, 2:])  # noqa: E731
        with channels.dense(), channels.watching(put):
            for block in blocks():
                channels.lm(torch.tensor([block]))
        policy = control(channels, "static", 0.5)
        for (layer, site), keep in policy.keep.items():
            norm = channels.routers[f"{layer}_{site}"].column_norm
            rms = torch.cat(seen[layer, site]).double().square().mean(0).sqrt() * norm
            assert float(rms[keep].min()) >= float(rms[~keep].max()) * (1 - 1e-6)
        shares = np.array([[float(policy.keep[i, s].float().mean()) for s in channels.grain.sites] for i in range(4)])
        assert np.abs(shares - channels.calibration.shares_at(0.5)).max() < 0.06
        with pytest.raises(HatError):
            static_choice(untrained("channel"), blocks())

    def test_token_grain_drops_the_cheapest_ffns(self, tokens, monkeypatch):
        monkeypatch.setattr(controls, "layer_damage", lambda *_: {1: 0.3, 2: 0.1, 3: 0.2})
        quarter = 62 / 64 / 4  # the share of one FFN, without protected tokens
        policy = control(tokens, "static", 1 - 1.5 * quarter, seed=3)
        with tokens.using(policy):
            tokens.lm(torch.tensor(blocks()))
        share = tokens.trace.share[:, :, 2:].mean((1, 2)).tolist()
        assert share[:3] == [1, 1, 0] and share[3] == pytest.approx(0.5, abs=0.05)


class TestRemoval:
    def test_damage_is_the_kl_of_a_base_without_that_ffn(self, tokens):
        text = torch.tensor(blocks())
        reference = tiny().model
        p = reference(text).logits[:, :-1].log_softmax(-1)
        mlp = reference.model.layers[2].mlp
        run, protected = mlp.forward, torch.arange(64).view(1, 64, 1) < 2
        mlp.forward = lambda x: run(x) * protected
        q = reference(text).logits[:, :-1].log_softmax(-1)
        found = layer_damage(tokens, blocks())
        assert set(found) == {1, 2, 3}
        assert found[2] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)

    def test_a_token_runs_all_sites_of_a_layer_or_none(self, channels):
        found = masks(channels, Layers({1: 0.4}, seed=1), IDS)
        whole = found[1, "qkv"][..., :1]
        assert 0.2 < float(whole[:, 2:].float().mean()) < 0.7
        assert all(torch.equal(found[1, s], whole.expand_as(found[1, s])) for s in channels.grain.sites)


def three_tokens():
    real = torch.ones(1, 3, dtype=torch.bool)
    return Trace(real, torch.arange(3)[None], ~real, [1.0], 4, mask_shapes={"qkv": (64,)})


class TestCosine:
    def test_it_is_the_cosine_of_the_residual_stream(self, hat):
        """Against the streams of plain transformers, where each enters a layer or its FFN."""
        reference = tiny().model
        name = "post_attention_layernorm" if hat.config.granularity == "token" else "input_layernorm"
        streams, found, nothing = [], {}, np.zeros(4)
        rule = Cosine(hat, nothing, nothing, threshold=1.0)
        for layer in reference.model.layers:
            getattr(layer, name).register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        reference(IDS)

        def watch(layer, site, x, rows, trace):
            if site == hat.grain.sites[0]:
                found[layer] = rule.turned(layer, x, rows, trace)

        with hat.dense(), hat.using(watch):
            hat.lm(IDS)
        first = 1 if hat.config.granularity == "token" else 0
        assert found.pop(first) is None and set(found) == set(range(first + 1, 4))
        for layer, cosine in found.items():
            expected = F.cosine_similarity(streams[layer - 1], streams[layer], dim=-1)
            torch.testing.assert_close(cosine.view(3, 14), expected, rtol=0, atol=1e-5)

    def test_by_hand(self, channels):
        """Three tokens whose streams turn by known angles; layers 1 and 2 decide, 0 and 3 always run."""
        slope, intercept = np.array([0.0, 1.0, -0.25, 0.0]), np.array([-np.inf, -0.1, 0.9, -np.inf])
        policy, st = Cosine(channels, slope, intercept, threshold=0.75), three_tokens()
        weights = [layer.input_layernorm.weight for layer in channels.lm.model.layers]
        # Cosines across layer 0 and across layer 1, by token.
        across = torch.tensor([[1.0, 0.6, 0.9], [0.5, 0.9, 0.5]], dtype=torch.float64)
        angles = torch.cat((torch.zeros(1, 3), across.acos().cumsum(0).float()))

        def at(layer):
            stream = torch.zeros(3, 64)
            stream[:, 0], stream[:, 1] = angles[layer].cos(), angles[layer].sin()
            return 7.0 * stream * weights[layer]

        keep = [policy(layer, "qkv", at(min(layer, 2)), None, st)[:, 0].tolist() for layer in range(4)]
        # Layer 1: 1, .6 and .9 less .1. Layer 2: only token 1 ran layer 1, where its cosine is .9. For the others .9
        # and .8 were predicted there. So .9 - .25 * (.9, .9, .8) = .675, .675, .7: all run.
        assert keep == [[True] * 3, [False, True, False], [True] * 3, [True] * 3]
        # The cosine of .5 across layer 1 says nothing about tokens 0 and 2, which skipped it.
        policy.threshold = 0.69
        st = three_tokens()
        assert [policy(i, "qkv", at(i), None, st)[:, 0].tolist() for i in range(3)][2] == [True, True, False]


class TestCheckpointFamily:
    def test_is_the_calibrated_start(self, hat, tmp_path):
        hat.save_pretrained(tmp_path)
        start = masks(hat, hat.threshold_policy(hat.calibration.thresholds_at(0.7)), IDS)
        trained = untrained(hat.config.granularity)
        for parameter in trained.hat_parameters().values():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
        before = {k: v.clone() for k, v in trained.hat_parameters().items()}
        equal(masks(trained, checkpoint_family(trained, tmp_path)(0.7), IDS), start)
        assert all(torch.equal(v, before[k]) for k, v in trained.hat_parameters().items())

    def test_refusals(self, channels, tokens, tmp_path):
        other = SimpleNamespace(base=dataclasses.replace(channels.base, fingerprint="0" * 64))
        for hat, saved in ((channels, tokens), (channels, untrained("channel")), (other, channels)):
            saved.save_pretrained(tmp_path)
            with pytest.raises(HatError):
                checkpoint_family(hat, tmp_path)


def test_random_exits_leave_at_their_rates(channels):
    rates = {1: 0.25, 2: 0.5, 3: 0.1}

    def run(ids):
        with channels.using(exits=RandomExits(rates)):
            channels.lm(ids, use_cache=False)
        return channels.trace

    trace = run(torch.tensor(random_blocks(8, 512, seed=2)))
    assert exit_shares([trace], EXITS) == pytest.approx(rates, abs=0.03)  # four standard errors of the second
    assert not (trace.exit_layer < len(channels.layers))[trace.protected].any()
    assert torch.equal(run(IDS[:1]).exit_layer, run(IDS).exit_layer[:1])


def test_draws_differ_between_blocks_after_a_shared_beginning(hat):
    ids = torch.tensor(random_blocks(2, 48, seed=3))
    ids[1, :10] = ids[0, :10]
    for policy in (Random(0.5), Layers({2: 0.5})):
        for (layer, _), keep in masks(hat, policy, ids).items():
            if layer == 2:
                one, other = keep
                assert torch.equal(one[:10], other[:10])
                agree = float((one[10:] == other[10:]).float().mean())
                assert abs(agree - 0.5) < 0.4, "as two draws would"
