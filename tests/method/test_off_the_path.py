"""No silent wrong number off the beaten path: traces, contexts, interrupts, hooks, policies of one's own."""

import copy
import threading
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from soak.paths import Curious
from test_transformer import GREEDY, apart, close, stepwise
from tiny_runs import GRAINS, active, skipping, tiny, untrained
from torch.nn.modules.module import register_module_forward_hook

from hat_lib.checkpoint import Price
from hat_lib.config import HatError
from hat_lib.evaluation.choices import Random
from hat_lib.evaluation.controls import RandomExits
from hat_lib.method.trace import Trace

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:token grain", "ignore:weights of the base were changed"),
]


@pytest.fixture(scope="module")
def whole():
    """Everything that a model may have: exits, corrections, a shortlist that leaves much out."""
    hat = skipping("channel", correction_rank=2)
    head = {"head_thresholds": [1.0, 0.0], "head_margins": [0.1, 9.0], "head_shares": [0.5, 1.0]}
    hat.calibration = replace(hat.calibration, **head)
    hat.capacity, hat.exit_rate = 0.5, 0.2
    return hat


PATHS = {
    "engine": {},
    "streamer": {"streamer": Curious(int)},
    "transformers' loop": {"logits_processor": [Curious(int)]},
    "reference": {"use_cache": True},
    "hook": {},
}


class TestTraceOfGenerate:
    @pytest.mark.parametrize("path", PATHS)
    def test_covers_all_new_tokens_on_every_path(self, ids, path):
        hat = active("channel")
        if path == "hook":
            hat.lm.model.layers[1].register_forward_hook(lambda *args: None)
        with hat.changed(engine=False if path == "reference" else None), hat.collect() as states:
            hat.lm.generate(ids, **GREEDY | PATHS[path])
        new = Trace.cat([state for state in states if state.start + state.tokens > ids.shape[1]])
        assert new.tokens == hat.trace.tokens == 7 and hat.trace.covers == "new tokens"
        assert torch.equal(hat.trace.site_share, new.site_share) and 0.3 < hat.trace.capacity < 0.95

    def test_says_what_it_covers(self, ids, channel_hat):
        channel_hat.lm.generate(ids, **GREEDY | {"max_new_tokens": 1})
        assert channel_hat.trace.covers == "prompt" and channel_hat.trace.capacity == 1.0
        channel_hat.lm.generate(ids, **GREEDY | {"num_beams": 2})
        assert channel_hat.trace.covers == "last step of generate" and channel_hat.trace.tokens == 1
        assert "last step of generate" in repr(channel_hat.trace)

    @pytest.mark.parametrize("path", ["engine", "transformers' loop"])
    def test_prompt_in_chunks_runs_in_full(self, channel_hat, ids, path):
        expected = channel_hat.lm.generate(ids, **GREEDY | PATHS[path])
        with channel_hat.collect() as states:
            found = channel_hat.lm.generate(ids, prefill_chunk_size=4, **GREEDY | PATHS[path])
        assert torch.equal(found, expected)
        assert {s.capacity for s in states if s.start + s.tokens <= ids.shape[1]} == {1.0}

    @pytest.mark.parametrize("asked", [{"dola_layers": "low"}, {"synced_gpus": True}], ids=str)
    def test_what_transformers_refuses(self, channel_hat, ids, asked):
        for lm in (tiny().model, channel_hat.lm):
            with pytest.raises(ValueError, match="dola|process group"):
                lm.generate(ids, **GREEDY | asked)


@pytest.mark.parametrize("place", ["model.layers.1", "lm_head"])
def test_interrupted_forward_leaves_the_thread_as_it_was(channel_hat, ids, place):
    expected, before = channel_hat.lm(ids[:1]).logits, channel_hat.trace

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = channel_hat.lm.get_submodule(place).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        channel_hat.lm(ids)
    hook.remove()
    assert channel_hat.trace is before
    assert torch.equal(channel_hat.lm(ids[:1]).logits, expected) and channel_hat.trace is not before


MODULES = [name for name, _ in tiny().model.model.layers[1].named_modules()]


@pytest.mark.parametrize("put", ["on all modules", *MODULES])
def test_hooks_put_on_before_attaching_fire_in_decode(ids, put):
    base, seen = tiny(), []
    module = base.model.model.layers[1].get_submodule(put if put in MODULES else "mlp")
    register = module.register_forward_hook if put in MODULES else register_module_forward_hook
    hook = register(lambda m, *args: seen.append(m) if m is module else None)
    try:
        hat = untrained("channel", base)
        stepwise(hat, ids)
        assert hat.decoding.startswith("reference path (there are hooks") and len(seen) == ids.shape[1]
    finally:
        hook.remove()
    assert hat.decoding.startswith("engine")


EVERYTHING = {"capacity", "exit rate", "decisions", "exits", "corrections", "head", "steering"}
CONTEXTS = {
    "at": (lambda hat: hat.at(0.7), {"capacity"}),
    "at exits": (lambda hat: hat.at(exit_rate=0.4), {"exit rate"}),
    "dense": (lambda hat: hat.dense(), EVERYTHING),
    "correcting": (lambda hat: hat.correcting(0.9), {"corrections"}),
    "full head": (lambda hat: hat.changed(shortlist=None), {"head"}),
    "steered": (lambda hat: hat.steered(), {"steering"}),
    "using": (lambda hat: hat.using(Random(0.6)), {"decisions"}),
    "exiting": (lambda hat: hat.using(exits=RandomExits(dict.fromkeys(hat.config.exit_layers, 0.3))), {"exits"}),
    "masked": (lambda hat: hat.changed(compact=False), {"compact"}),
    "record": (lambda hat: hat.record(), {"record"}),
    "reference": (lambda hat: hat.reference(), {"reference"}),
    "collect": (lambda hat: hat.collect(), {"states"}),
}
"""contexts of a model, and what each of them names"""
PAIRS = list(combinations(CONTEXTS, 2))


def check_pair(hat, ids, pair, tolerance: float = 1e-5) -> None:
    """Contexts that name different things do the same in either order; of two that name the same, the inner wins."""

    def seen(*names):
        first, second = ([CONTEXTS[name][0](hat) for name in names] * 2)[:2]
        with first, second if len(names) > 1 else hat.changed():
            logits = stepwise(hat, ids)
            what = hat.capacity, hat.exit_rate, hat.decoding, hat.trace.capacity, hat.trace.masks is None
            return logits, what

    def same(a, b):
        assert float((a[0] - b[0]).abs().max()) <= tolerance * max(1.0, float(b[0].abs().max())), pair
        assert a[1] == b[1], pair

    (a, one), (b, other) = ((name, CONTEXTS[name][1]) for name in pair)
    if not one & other:
        same(seen(a, b), seen(b, a))
    if one <= other:
        same(seen(a, b), seen(b))
    if other <= one:
        same(seen(b, a), seen(a))


class TestContexts:
    @pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
    def test_change_what_they_name_and_nothing_else(self, whole, ids, pair):
        check_pair(whole, ids[:1, :6], pair)
        if not {"correcting", "steered"} & {*pair}:  # which the token grain lacks
            check_pair(active("token"), ids[:1, :6], pair)

    def test_closed_early(self, channel_hat):
        def holding():
            with channel_hat.at(0.9):
                yield

        generator = holding()
        next(generator)
        with channel_hat.at(0.6):
            generator.close()
            assert channel_hat.capacity == 0.6
        assert channel_hat.capacity == 0.7

    def test_collect_inside_collect(self, channel_hat, ids):
        with channel_hat.collect() as outer, channel_hat.collect() as inner:
            channel_hat.lm(ids)
        assert outer == inner == [channel_hat.trace]

    def test_forward_decides_by_the_setting_that_it_began_with(self, whole, ids):
        def from_another_thread(*args):
            thread = threading.Thread(target=lambda: setattr(whole, "capacity", 1.5 - whole.capacity))
            thread.start()
            thread.join()

        for capacity in (0.5, 1.0):
            whole.capacity = capacity
            expected = whole.lm(ids).logits
            hook = whole.lm.model.layers[2].register_forward_hook(from_another_thread)
            found = whole.lm(ids).logits
            hook.remove()
            assert torch.equal(found, expected) and whole.capacity == 1.5 - capacity
        whole.capacity = 0.5


def test_a_part_called_by_hand_is_the_bases(whole, ids):
    states = whole.lm.model(ids).last_hidden_state
    before = whole.trace.capacity
    assert torch.equal(whole.lm.lm_head(states), states @ whole.lm.lm_head.weight.T)
    assert whole.trace.capacity == before
    assert torch.equal(whole.logits(states), whole.lm(ids).logits)
    assert apart(whole.logits(states), whole.lm.lm_head(states))


WRONG = {
    "shape": lambda keep: keep[:, :1] if keep.dim() > 1 else keep[:, None],
    "rows": lambda keep: keep[:1],
    "numpy": lambda keep: keep.numpy(),
    "floats": lambda keep: keep * 0.5,
    "integers": lambda keep: keep.int(),
    "number": lambda keep: True,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("grain", GRAINS)
def test_decisions_of_a_policy_are_checked(grain, wrong, ids):
    hat = untrained(grain)

    class Policy:
        def __call__(self, layer, site, x, rows, trace):
            return WRONG[wrong](torch.ones(len(x), *trace.mask_shapes[site], dtype=torch.bool))

    def leave(depth, h, rows, trace):
        return WRONG[wrong](torch.zeros(len(h), dtype=torch.bool))

    with pytest.raises(HatError, match=r"layer \d, site .* bool tensor"), hat.using(Policy()):
        hat.lm(ids)
    with pytest.raises(HatError, match="exit after 1 layers"), hat.using(exits=leave):
        hat.lm(ids)


def test_thresholds_by_hand_are_checked(channel_hat):
    for places in ({(0, "dwon"): 0.1}, {(9, "down"): 0.1}, {"down": 0.1}, {(0, "down"): float("nan")}):
        with pytest.raises(HatError), channel_hat.using(channel_hat.threshold_policy(places)):
            pass


def test_thresholds_of_other_routers(channel_hat, ids):
    other = skipping("channel", vectors=0.6)
    own = channel_hat.calibration.thresholds_at(0.7)
    thresholds = channel_hat.threshold_policy(own)

    def policy(layer, site, x, rows, trace):
        if site == "qkv":
            channel_hat.grain.prepare(other.routers, layer, x, trace, 1.0)
        return channel_hat.grain.keep(other.routers, thresholds, layer, site, x, trace)

    with channel_hat.using(policy):
        close(stepwise(channel_hat, ids), channel_hat.lm(ids).logits)


def test_a_site_that_keeps_everything_leaves_the_others_their_sensitivity(channel_hat, ids):
    """On both paths, and where a policy asks for the method's decision at one site alone."""
    own = {place: t for place, t in channel_hat.calibration.thresholds_at(0.7).items() if place[1] in ("down", "token")}
    with channel_hat.using(channel_hat.threshold_policy(own)):
        close(stepwise(channel_hat, ids), expected := channel_hat.lm(ids).logits)

    def policy(layer, site, x, rows, trace):
        thresholds = channel_hat.threshold_policy(own)
        return channel_hat.grain.keep(channel_hat.routers, thresholds, layer, site, x, trace)

    with channel_hat.using(policy):
        close(channel_hat.lm(ids).logits, expected)
    with pytest.raises(HatError, match="inside a forward"):
        channel_hat.keeps(0, "down", torch.ones(1, 4))


def test_copy_keeps_format_training_and_gradients(channel_hat):
    channel_hat.weight_format = "int8"
    channel_hat.lm.model.layers[1].train()
    channel_hat.gates.requires_grad_(False)
    twin = copy.deepcopy(channel_hat)
    assert twin.weight_format == "int8" and not twin.gates["1"].scale.requires_grad
    assert [m.training for m in twin.modules()] == [m.training for m in channel_hat.modules()]


def test_prices_stay_while_the_base_is_the_same(channel_hat, ids):
    channel_hat.prices = prices = [Price("page", 0.7, 0.7, 0.1, None, None, 9.0, 100)]
    weight = channel_hat.lm.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone()
    channel_hat.lm(ids)
    assert channel_hat.prices == prices
    weight.data = weight.data * 1.1
    channel_hat.lm(ids)
    assert not channel_hat.prices


def test_printed_in_a_few_lines(whole, ids):
    whole.lm(ids)
    assert all(1 <= len(repr(thing).splitlines()) <= 5 for thing in (whole, whole.trace, whole.base))
    with pytest.raises(AttributeError, match=r"\.model\.generate"):
        whole.base.generate(ids)
