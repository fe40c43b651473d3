"""The cost model against torch's FLOP counter, which sees the rows that linear layers really get, and by hand."""

from contextlib import contextmanager

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import GRAINS, peaked, tiny, untrained
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hat_lib.base.shapes import random_config
from hat_lib.config import HatConfig, HatError
from hat_lib.evaluation.choices import Random
from hat_lib.method.cost import WorkTally, ideal_speedup, state_cost, work
from hat_lib.method.trace import Masks, Trace

EXITS = (1, 2, 3)
B, T = 3, 14
LINEAR = ("attention", "ffn", "exited_kv", "head")
# What is really skipped, not multiplied by zero: whole FFNs, and everything of a token that has left.
SHARES = {"channel": 1.0, "token": 0.6}

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=GRAINS)
def hat(request):
    return untrained(request.param)


@contextmanager
def skipping(hat, share=0.6, rows=B):
    """Tokens leave at random depths and, with a share below 1, units are skipped at random."""
    draws = np.random.default_rng(2)
    exits = Masks({}, {e: torch.from_numpy(draws.random((B, T)) < 0.15)[:rows] for e in EXITS})
    with hat.force(exits), hat.using(Random(share) if share < 1 else hat.threshold_policy({})):
        yield


def counted(forward, *args, **kwargs):
    """What torch's counter, extended to the CPU's own attention, sees of a forward: FLOPs of linear layers and of the
    attention core. Exit gates are sums of products, which it does not count."""

    def attention(q, k, v, *rest, **kwargs):  # shapes [B, H, n, h]; scores and mixing
        return 2 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]

    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        forward(*args, **kwargs)
    counts = counter.get_flop_counts().get("Global", {})
    core = sum(n for op, n in counts.items() if "attention" in str(op) or "bmm" in str(op))
    return sum(counts.values()) - core, core


def linear_flops(hat, state):
    """Of the cost model, with the products of the translators, which it counts among the exits."""
    flops, left = state_cost(hat, state).flops, int(state.exited.sum())
    translators = left * 2 * 2 * hat.config.translator_rank * hat.lm.config.hidden_size
    return round(float(sum(flops[p].sum() for p in LINEAR))) + translators


@pytest.mark.parametrize("grain", GRAINS)
def test_decode_equals_the_flop_counter(grain, ids):
    """To the last FLOP, step by step, including the attention core."""
    hat, depths = untrained(grain, tiny(torch.bfloat16)), set()
    cache = DynamicCache(config=hat.lm.config)
    with skipping(hat, SHARES[grain], rows=1):
        hat.lm(ids[:1, :5], cache=cache, use_cache=True)
        for step in ids[:1, 5:].split(1, dim=1):
            linear, core = counted(hat.lm, step, cache=cache, use_cache=True)
            state, depth = hat.trace, int(hat.trace.exit_layer)
            assert linear == linear_flops(hat, state)
            assert core == float(state_cost(hat, state).flops["core"]) == 4 * 64 * depth * (state.start + 1)
            depths.add(depth)
    assert len(depths) >= 3, "the steps must leave at several depths"


def test_a_batch_equals_the_flop_counter(hat, ids):
    """Rows are compacted, so a batch costs what its tokens cost."""
    with skipping(hat, SHARES[hat.grain.name]):
        linear, _ = counted(hat.lm, ids)
    assert hat.trace.exit_rate > 0.2 and linear == linear_flops(hat, hat.trace)


TINYLLAMA = random_config("random:tinyllama")  # 22 layers, D 2048, F 5632, 32 heads of 64, 4 K/V heads


@pytest.mark.parametrize(
    "grain, speedups",
    [
        ("token", {0.9: 1.08, 0.7: 1.28, 0.55: 1.50, 0.4: 1.79}),  # FFN skipping alone
        ("channel", {0.9: 1.10, 0.75: 1.30, 0.6: 1.60, 0.525: 1.80}),  # all linear layers
    ],
)
def test_tinyllama_by_hand(grain, speedups):
    config = HatConfig.default(TINYLLAMA, granularity=grain)
    everything = torch.ones(22, 1 if grain == "token" else 4)
    total = 22 * (2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 5632) + 32000 * 2048
    dense = work(TINYLLAMA, config, everything, torch.tensor(22), 100)
    assert sum(map(float, dense.dense_weight_bytes.values())) == 2 * total == float(dense.dense)
    assert float(dense.flops["core"]) == float(dense.dense_flops["core"]) == 22 * 2 * (2 * 32 * 64 * 100)
    assert {c: ideal_speedup(TINYLLAMA, config, c) for c in speedups} == pytest.approx(speedups, abs=6e-3)
    with pytest.raises(HatError, match="capacity"):
        ideal_speedup(TINYLLAMA, config, 0.01)
    for depth, speedup in {8: 2.48, 12: 1.74, 16: 1.34, 19: 1.15}.items():  # every token leaves there
        cost = work(TINYLLAMA, config, everything, torch.tensor(depth), routed=False)
        body = sum(float(cost.flops[p]) for p in ("attention", "ffn", "head"))
        assert float(cost.dense) / body == pytest.approx(speedup, abs=6e-3)
        assert float(cost.flops["exited_kv"]) == 2 * (22 - depth) * 2048 * 2 * 256
        reached = sum(e <= depth for e in (4, 8, 12, 16, 19))
        assert float(cost.flops["exits"]) == 2 * (reached * 2 * 2048 + 2 * 2 * 2048)
        assert float(cost.weight_bytes["exits"]) == 2 * float(cost.flops["exits"])  # fp32


def test_model_share_by_hand(hat, ids):
    """Head, routers, gates and the K/V of exited tokens count: the layers' share alone would promise more."""
    hat.lm(ids)
    assert state_cost(hat, hat.trace).model_share == 1.0
    with skipping(hat):
        hat.lm(ids)
    state, d, n = hat.trace, 64, B * T
    body = (64 * (64 + 2 * 32) + 64 * 64) + 3 * 64 * 160
    routable = body if hat.grain.name == "channel" else 3 * 64 * 160
    depths = state.exit_layer.double()
    ran = float(depths.sum())
    weights = float(state.share.double().sum()) * routable + ran * (body - routable)
    weights += n * 260 * d + (4 * n - ran) * 2 * 32 * d
    exits = sum(int((depths >= e).sum()) for e in EXITS) * 2 * d + int((depths < 4).sum()) * 2 * 2 * d
    routers = {"channel": ran * (5 * 64 + 160), "token": 2 * 64 * (ran - n)}
    expected = (2 * weights + routers[hat.grain.name] + 2 * exits) / (2 * n * (4 * body + 260 * d))
    assert state_cost(hat, state).model_share == pytest.approx(expected, rel=1e-6)


def test_corrections_of_linear_layers_count(ids):
    """Rank times inputs and outputs, in each layer that a token entered; q, k and v share one low-rank input."""
    hat, each = untrained("channel", correction_rank=3), 3 * ((64 + 128) + (64 + 64) + (64 + 320) + (160 + 64))
    for strength in (0.0, 1.0):
        with skipping(hat), hat.correcting(strength):
            hat.lm(ids)
        cost = state_cost(hat, hat.trace)
        assert torch.equal(cost.flops["corrections"], 2 * strength * each * hat.trace.exit_layer.double())
        assert "corrections" not in cost.dense_flops


@pytest.mark.filterwarnings("ignore:token grain")
@pytest.mark.parametrize("grain", GRAINS)
def test_forwards_joined_cost_what_they_cost_apart(grain, ids):
    """A dense prompt and what is decoded after it, with exits, corrections and a shortlist; a text that has ended."""
    hat = tiny_runs.skipping(grain, peaked(), correction_rank=2)
    with hat.changed(shortlist=hat.shortlist(6.0, 10.0)), hat.reference(), hat.record(), hat.collect() as states:
        hat.lm.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    apart, joined, twice = WorkTally(hat), WorkTally(hat), WorkTally(hat)
    for state in states[-2:]:
        state.real[1] = False
    for state in states:
        apart.add(state)
    whole = Trace.cat(states)
    joined.add(whole)
    twice.add(Trace.cat([Trace.cat(states[:3]), Trace.cat(states[3:])]))
    assert 0.1 < joined.shares[1] < 0.5
    for tally in (joined, twice):
        assert (*tally.shares, tally.layer_capacity) == pytest.approx((*apart.shares, apart.layer_capacity), rel=1e-9)
        assert np.array_equal(tally.exits, apart.exits)
    assert whole.capacity == pytest.approx(apart.shares[0], rel=1e-9)
    prompt, steps = state_cost(hat, states[0]).flops, state_cost(hat, whole).flops
    for part, flops in prompt.items():
        assert torch.equal(steps[part][:, :T], flops), part
    assert whole.masks.exits[1].shape == whole.masks.keep[0, hat.grain.sites[0]].shape[:2] == (B, T + 7)
