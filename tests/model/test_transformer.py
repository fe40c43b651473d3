"""One equality per feature, on a tiny random Llama, for both grains.

Decisions recorded in one pass are forced on the other, so logits must agree within rounding: sense (a) of
"equal". `test_free_running_*` lets both passes decide for themselves: sense (b).
"""

import copy
import io
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny_runs import GRAINS, skipping, tiny, untrained
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, pipeline

from hat_lib.backbone.base import Base, exact_hash, fingerprint
from hat_lib.config import HatConfig, HatError
from hat_lib.model.checkpoint import is_hat_parameter
from hat_lib.model.policies import KeepAll, Random, Static
from hat_lib.model.routers import ExitGate, MoERouter
from hat_lib.model.token_state import Masks, TokenState
from hat_lib.model.transformer import HierarchicalTransformer

EXITS = (1, 2, 3)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:token grain")]


@pytest.fixture(params=GRAINS)
def hat(request):
    """Random routers and gates, thresholds that skip about a third, exits taken by about a fifth."""
    return active(request.param)


def active(grain, base=None, exits=EXITS):
    vectors = 0.3 if grain == "channel" else 1.0
    return skipping(grain, base, exit_layers=exits, bar=0.6, vectors=vectors, translator_rank=2)


def stepwise(lm, ids, **kwargs):
    cache = DynamicCache(config=lm.config)
    steps = ids.split(1, dim=1)
    return torch.cat([lm(input_ids=step, cache=cache, use_cache=True, **kwargs).logits for step in steps], 1)


def base_within(hat, ids, expected):
    """`dense` gives the base, even inside a capacity at which the model differs."""
    with hat.at(0.5):
        assert apart(hat.lm(ids).logits, expected)
        with hat.dense():
            assert torch.equal(hat.lm(ids).logits, expected)
            close(stepwise(hat.lm, ids), expected)


def recorded(hat, ids, **given):
    """The logits and the decisions of a forward."""
    with hat.record():
        logits = hat.lm(ids, **given).logits
    return logits, hat.trace.masks


def close(a, b, tol=1e-5):
    assert float((a - b).abs().max()) <= tol * max(1.0, float(b.abs().max()))


def apart(a, b, least=0.01):
    return float((a - b).abs().max()) > least


class TestBase:
    """Untrained, at capacity 1.0, and under `dense`, the model is the base."""

    @pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
    @pytest.mark.parametrize("grain", GRAINS)
    def test_untrained_equals_base(self, grain, dtype, tol, ids):
        base = tiny(dtype)
        expected = base.model(ids).logits
        hat = untrained(grain, base)
        close(hat.lm(ids).logits, expected, tol)
        assert hat.capacity == 1.0 and hat.trace.capacity == 1.0 and hat.trace.exit_rate == 0.0
        with hat.reference():  # in bf16 the engine rounds less: tests/engine checks how close it is to fp32
            close(stepwise(hat.lm, ids), expected, tol)

    def test_active_differs_and_dense_and_capacity_one_equal_base(self, hat, ids):
        expected = tiny().model(ids).logits
        assert apart(hat.lm(ids).logits, expected, 0.05)
        assert 0.4 < hat.trace.capacity < 0.95 and 0.05 < hat.trace.exit_rate < 0.95
        with hat.dense():
            close(hat.lm(ids).logits, expected)
            assert hat.trace.capacity == 1.0
        assert apart(hat.lm(ids).logits, expected, 0.05)
        hat.capacity, hat.exit_rate = 1.0, 0.0
        close(hat.lm(ids).logits, expected)

    def test_unload_restores_everything(self, hat, ids):
        fresh = tiny()
        with pytest.raises(HatError, match="unload"):
            HierarchicalTransformer(hat.base, hat.config)
        base = hat.unload()
        assert exact_hash(base.model) == exact_hash(fresh.model)
        assert torch.equal(base.model(ids).logits, fresh.model(ids).logits)
        assert all("forward" not in vars(m) for m in base.model.modules())
        assert not base.model.model._forward_pre_hooks and not base.model.model._forward_hooks
        assert hat.unload() is base  # a second time does nothing
        settings = {"capacity": 0.5, "calibration": None, "weight_format": "base"}
        uses = [partial(setattr, hat, name, value) for name, value in settings.items()]
        uses += [lambda: hat.to(torch.float32), lambda: copy.deepcopy(hat)]
        uses += [make().__enter__ for make in (hat.dense, hat.at, lambda: hat.using(KeepAll()))]
        for use in uses:
            with pytest.raises(HatError, match="was unloaded"):
                use()

    def test_refusals(self, hat, ids):
        overridden = tiny()
        overridden.model.model.layers[1].forward = overridden.model.model.layers[1].forward
        for use in (
            lambda: HierarchicalTransformer(tiny().model, hat.config),
            lambda: HierarchicalTransformer(hat.base, hat.config),
            lambda: HierarchicalTransformer(overridden, hat.config),
            lambda: HierarchicalTransformer(tiny(), HatConfig(4, "tokens")),
            lambda: hat(ids),
        ):
            with pytest.raises(HatError):
                use()


class TestSamePassTwoWays:
    """Decode == parallel, compact == masked, alone == in a batch, the past ignores the future."""

    def test_decode_equals_parallel(self, hat, ids):
        for rows in (ids, ids[1:2]):
            parallel, masks = recorded(hat, rows)
            trace = hat.trace
            assert len(rows) == 1 or len(trace.exit_layer.unique()) >= 3, "the fixture must exit at several depths"
            with hat.force(masks), hat.collect() as states:
                close(stepwise(hat.lm, rows), parallel)
            joined = TokenState.cat(states)
            assert torch.equal(joined.exit_layer, trace.exit_layer)
            close(joined.share, trace.share)

    def test_free_running_decode_equals_parallel(self, hat, ids):
        parallel = hat.lm(ids).logits
        trace = hat.trace
        with hat.collect() as states:
            decoded = stepwise(hat.lm, ids)
        same = (TokenState.cat(states).share - trace.share).abs().amax((0, 2)) < 1e-6
        assert same.any(), "no row decided alike"
        close(decoded[same], parallel[same])

    def test_compact_equals_masked(self, hat, ids):
        compact, masks = recorded(hat, ids)
        with hat.force(masks), hat.masked():
            close(hat.lm(ids).logits, compact)
            close(stepwise(hat.lm, ids), compact)

    def test_chunked_prefill_and_a_cropped_cache(self, hat, ids):
        parallel, masks = recorded(hat, ids)
        cache = DynamicCache(config=hat.lm.config)
        with hat.force(masks):
            chunks = [hat.lm(c, cache=cache, use_cache=True).logits for c in ids.split(5, dim=1)]
            close(torch.cat(chunks, 1), parallel)
            assert {layer.keys.shape[2] for layer in cache.layers} == {ids.shape[1]}, "an exited token has K and V"
            cache.crop(-4)
            close(hat.lm(ids[:, -4:], cache=cache, use_cache=True).logits, parallel[:, -4:])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_row_alone_equals_row_in_batch(self, hat, ids, side):
        lengths = [14, 9, 6]
        batch, mask = torch.full_like(ids, 3), torch.zeros_like(ids)
        spans = [slice(14 - n, 14) if side == "left" else slice(0, n) for n in lengths]
        for row, (n, span) in enumerate(zip(lengths, spans, strict=True)):
            batch[row, span], mask[row, span] = ids[row, :n], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together, masks = recorded(hat, batch, attention_mask=mask, position_ids=positions)
        trace = hat.trace
        for row, (n, span) in enumerate(zip(lengths, spans, strict=True)):
            with hat.force(masks.map(lambda m, row=row, span=span: m[row : row + 1, span])):
                close(hat.lm(ids[row : row + 1, :n]).logits[0], together[row, span])
            assert torch.equal(hat.trace.exit_layer[0], trace.exit_layer[row, span])
            hat.lm(ids[row : row + 1, :n])  # free running: protected tokens are the row's own first two
            assert torch.equal(hat.trace.protected[0], trace.protected[row, span])
        pads = ~mask.bool()
        assert not trace.share[:, pads].any() and (trace.exit_layer[pads] == hat.config.n_layers).all()

    def test_future_never_changes_the_past(self, hat, ids):
        for t in (3, 8, 13):
            changed = ids.clone()
            changed[:, t:] = (changed[:, t:] + 17) % 240 + 5
            a, sa = hat.lm(ids).logits, hat.trace
            b, sb = hat.lm(changed).logits, hat.trace
            close(a[:, :t], b[:, :t])
            assert torch.equal(sa.exit_layer[:, :t], sb.exit_layer[:, :t]) and apart(a[:, t:], b[:, t:])

    def test_each_document_of_a_packed_sequence_is_as_alone(self, ids):
        """Where `position_ids` restart, a new document begins, with its own protected tokens."""
        hat = active("channel")
        first, second = ids[:1, :8], ids[1:2, :6]
        positions = torch.cat((torch.arange(8), torch.arange(6)))[None]
        packed = hat.lm(torch.cat((first, second), 1), position_ids=positions, use_cache=False).logits
        trace = hat.trace
        assert trace.protected.nonzero()[:, 1].tolist() == [0, 1, 8, 9]
        close(packed[:, 8:], hat.lm(second, use_cache=False).logits)
        assert torch.equal(hat.trace.exit_layer, trace.exit_layer[:, 8:])


class TestCache:
    def test_beam_reorder(self, hat, ids):
        """After `reorder_cache` the next step equals that of the reordered sequences."""
        order = torch.tensor([2, 0, 0])
        parallel, masks = recorded(hat, ids[order])
        cache = DynamicCache(config=hat.lm.config)
        hat.lm(ids[:, :-1], cache=cache, use_cache=True)
        cache.reorder_cache(order)
        with hat.force(masks):
            close(hat.lm(ids[order][:, -1:], cache=cache, use_cache=True).logits[:, 0], parallel[:, -1])

    def test_masks_of_steps_whose_tokens_all_leave_join_to_those_of_all_tokens(self, hat, ids):
        """A step whose only token leaves runs no further layer; its masks there are recorded as all False."""
        leave, cache = {1: torch.ones_like(ids, dtype=torch.bool)}, DynamicCache(config=hat.lm.config)
        keep = recorded(hat, ids)[1].keep
        with hat.force(Masks(dict(keep), leave)):
            whole = recorded(hat, ids)[1]
            steps = [recorded(hat, step, cache=cache, use_cache=True)[1] for step in ids.split(1, dim=1)]
        assert all(set(masks.keep) == set(keep) == set(whole.keep) for masks in steps)
        for (layer, site), mask in whole.keep.items():
            assert torch.equal(torch.cat([masks.keep[layer, site] for masks in steps], dim=1), mask)
            assert layer == 0 or not mask[:, 2:].any(), "after the first two, which are protected, all have left"

    def test_static_cache_is_refused(self, hat, ids):
        with pytest.raises(HatError, match="static"):
            hat.lm(ids, cache=StaticCache(config=hat.lm.config, max_cache_len=32), use_cache=True)

    def test_bf16_and_back(self, hat, ids):
        """Routers, column norms and rotary frequencies stay fp32, as in a model loaded in bf16."""
        own = {k: v.clone() for k, v in [*hat.routers.named_buffers(), *hat.hat_parameters().items()]}
        masks = recorded(hat, ids)[1]
        hat.to(torch.bfloat16)
        assert hat.lm.dtype == torch.bfloat16 and hat.lm.model.rotary_emb.inv_freq.dtype == torch.float32
        assert all(torch.equal(v, own[k]) for k, v in [*hat.routers.named_buffers(), *hat.hat_parameters().items()])
        loaded = active(hat.config.granularity, tiny(torch.bfloat16))
        with hat.force(masks), loaded.force(masks):
            assert torch.equal(hat.lm(ids).logits, loaded.lm(ids).logits)
        hat.to(torch.float32)
        assert hat.lm(ids).logits.dtype == torch.float32

    def test_double_is_a_dtype_as_well(self, hat, ids):
        logits, masks = recorded(hat, ids)
        with hat.double().force(masks):
            assert hat.lm(ids).logits.dtype == torch.float64
            close(hat.lm(ids).logits.float(), logits)

    def test_a_base_moved_by_itself_is_told(self, hat, ids):
        hat.lm.to("meta")
        with pytest.raises(HatError, match="the base was moved under the model: use hat.to.*, not hat.lm.to"):
            hat.lm(ids.to("meta"))
        assert hat.decoding == "reference path (the model is on meta)"


class TestExits:
    def test_forced_depths_in_one_batch(self, hat, ids):
        """Tokens that leave at different depths freeze there, and hidden_states repeat the frozen state."""
        exits = {e: torch.zeros(3, 14, dtype=torch.bool) for e in EXITS}
        exits[1][0, 5], exits[2][1, 6:9], exits[3][2, 13] = True, True, True
        with hat.force(Masks({}, exits)):
            states = hat.lm(ids, output_hidden_states=True).hidden_states
        depth = hat.trace.exit_layer
        assert depth[0, 5] == 1 and (depth[1, 6:9] == 2).all() and depth[2, 13] == 3
        assert int((depth < hat.config.n_layers).sum()) == 5 and len(states) == hat.config.n_layers + 1
        for e, (row, t) in {1: (0, 5), 2: (1, 7)}.items():
            for later in range(e + 1, hat.config.n_layers):
                assert torch.equal(states[later][row, t], states[e + 1][row, t])
            close(states[e + 1][row, t], hat.gates[str(e)].translate(states[e][row, t][None])[0])

    def test_all_rows_gone(self, hat, ids):
        with hat.force(Masks({}, {1: torch.ones(3, 14, dtype=torch.bool)})):
            parallel = hat.lm(ids).logits
            assert hat.trace.exit_rate == pytest.approx(12 / 14)  # the two protected tokens of each row stay
            assert (hat.trace.share[:, :, :2] == 1).all()
            close(stepwise(hat.lm, ids), parallel)


class TestPolicies:
    def test_random_is_the_same_however_it_is_run(self, hat, ids):
        hat.exit_rate = 0.0
        with hat.using(Random(0.6, seed=4)):
            parallel = hat.lm(ids).logits
            realised = hat.trace.capacity
            close(stepwise(hat.lm, ids), parallel)
        with hat.using(Random(0.6, seed=5)):
            assert apart(hat.lm(ids).logits, parallel)
        # two protected tokens of 14 and, at the token grain, layer 0's FFN always run
        fixed = 2 / 14 if hat.config.granularity == "channel" else 1 - (12 / 14) * 0.75
        assert abs(realised - (fixed + (1 - fixed) * 0.6)) < 0.08

    def test_static_skips_whole_layers_but_never_layer_0s_ffn(self, ids):
        hat = active("token", exits=())
        with hat.using(Static({(i, "ffn"): torch.tensor(False) for i in (0, 2)})):
            out = hat.lm(ids).logits
        share = hat.trace.share
        assert (share[2, :, 2:] == 0).all() and (share[[0, 1, 3]] == 1).all()
        reference, rest = tiny(), torch.ones(14, 1)
        rest[2:] = 0
        kept = reference.model.model.layers[2].mlp.forward
        reference.model.model.layers[2].mlp.forward = lambda x: kept(x) * rest
        close(out, reference.model(ids).logits)

    @pytest.mark.parametrize("order", ["inside", "around"])
    def test_a_control_stays_the_control_at_another_capacity(self, hat, ids, order):
        with hat.using(KeepAll()), hat.at(exit_rate=0.0):
            expected = hat.lm(ids).logits
        control, capacity = hat.using(KeepAll()), hat.at(0.6, exit_rate=0.0)
        first, second = (capacity, control) if order == "inside" else (control, capacity)
        with first, second:
            assert torch.equal(hat.lm(ids).logits, expected) and hat.trace.capacity == 1.0 and hat.capacity == 0.6
        assert hat.capacity == 0.7 and hat.exit_rate == 0.2

    def test_the_last_capacity_asked_for_is_the_one_that_runs_and_contexts_restore_on_error(self, hat, ids):
        expected = hat.lm(ids).logits
        with hat.dense(), hat.at(0.7, 0.2):
            assert torch.equal(hat.lm(ids).logits, expected)
        with pytest.raises(RuntimeError), hat.dense():
            raise RuntimeError
        assert torch.equal(hat.lm(ids).logits, expected)

    def test_contexts_of_two_generators_that_end_in_the_other_order_leave_nothing(self, hat, ids):
        def inside(capacity, error=None):
            with hat.at(capacity):
                yield
                hat.exit_rate = 0.1
                if error:
                    raise error

        expected = hat.lm(ids).logits
        for error, seen in ((None, HatError), (KeyError("mine"), KeyError)):
            first, second = inside(0.9, error), inside(0.8)
            next(first), next(second)
            with pytest.raises(seen):
                next(first)
            assert hat.capacity == 0.8 and hat.exit_rate == 0.1  # the second's, which is still open
            assert next(second, None) is None
            assert hat.capacity == 0.7 and hat.exit_rate == 0.2 and torch.equal(hat.lm(ids).logits, expected)

    def test_a_context_may_be_closed_by_another_thread(self, hat):
        def inside():
            with hat.at(0.9):
                yield

        held = inside()
        next(held)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(held.close).result()
            assert hat.capacity == pool.submit(lambda: hat.capacity).result() == 0.7

    def test_a_calibration_takes_effect_in_every_context_that_is_open(self, hat, ids):
        def halved(table):
            return (np.array(table) / 2).tolist()

        table = replace(hat.calibration, thresholds=halved(hat.calibration.thresholds))
        with hat.at(0.6):
            with hat.at(0.8):
                hat.calibration = table
                inner = hat.lm(ids).logits
            outer = hat.lm(ids).logits
        for capacity, found in ((0.8, inner), (0.6, outer)):
            with hat.at(capacity):
                assert torch.equal(hat.lm(ids).logits, found)

    @pytest.mark.parametrize("grain", GRAINS)
    def test_capacity_without_calibration(self, grain):
        hat = untrained(grain)
        with pytest.raises(HatError, match="calibrat"):
            hat.capacity = 0.5
        with pytest.raises(HatError, match="capacity"):
            hat.capacity = float("nan")
        with pytest.raises(HatError, match="exit"):
            hat.exit_rate = 0.3

    def test_forced_masks_that_do_not_fit_are_refused(self, hat, ids):
        _, masks = recorded(hat, ids)
        _, others = recorded(active({"channel": "token", "token": "channel"}[hat.config.granularity]), ids)
        for given in (
            others,
            Masks({}, {7: torch.ones(3, 14, dtype=torch.bool)}),
            masks.map(lambda mask: mask[..., :-1, None]),
            masks.map(lambda mask: mask.float()),
        ):
            with pytest.raises(HatError):
                hat.force(given)
        longer = torch.cat((ids, ids), 1)
        with hat.force(masks):
            for use in (lambda: hat.lm(ids[:1]), lambda: hat.lm(longer), lambda: hat.lm.generate(ids, **GREEDY)):
                with pytest.raises(HatError, match=r"must cover \d sequences and \d+ tokens here, got 3 and 14"):
                    use()


class TestGeneration:
    """generate and pipeline work on `hat.lm`; generation with a cache equals generation without."""

    @pytest.mark.parametrize(
        "kwargs",
        [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"assistant_early_exit": 2}],
        ids=["greedy", "beam", "sample", "early exit drafts"],  # the last relies on the sliced loop over layers
    )
    @pytest.mark.parametrize("grain", GRAINS)
    def test_generate_equals_base_when_dense(self, kwargs, grain, ids):
        base, prompt = tiny(), ids[:1, :6]
        torch.manual_seed(0)
        plain = {name: value for name, value in kwargs.items() if name != "assistant_early_exit"}
        expected = base.model.generate(prompt, **GREEDY | plain)
        hat = untrained(grain, base)
        torch.manual_seed(0)
        assert torch.equal(hat.lm.generate(prompt, **GREEDY | kwargs), expected)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_cached_equals_uncached(self, hat, ids, beams, caplog):
        options = GREEDY | {"num_beams": beams}
        cached = hat.lm.generate(ids[:1, :6], **options)
        assert torch.equal(cached, hat.lm.generate(ids[:1, :6], use_cache=False, **options))
        assert "deprecated" not in caplog.text  # as the alias past_key_values would be

    def test_left_padded_batch_generates_each_row(self, hat, ids):
        batch, mask = ids[:2, :8].clone(), torch.ones(2, 8, dtype=torch.long)
        batch[1, :3], mask[1, :3] = 0, 0
        together = hat.lm.generate(batch, attention_mask=mask, **GREEDY)
        alone = hat.lm.generate(batch[1:, 3:], attention_mask=mask[1:, 3:], **GREEDY)
        assert torch.equal(together[1, 3:], alone[0])

    def test_pipeline(self, hat):
        pipe = pipeline("text-generation", model=hat.lm, tokenizer=hat.base.tokenizer)
        text = pipe("Hello", max_new_tokens=4, do_sample=False)[0]["generated_text"]
        assert text.startswith("Hello") and len(text) > 5


class TestParameters:
    def test_one_predicate(self, hat):
        names = set(hat.hat_parameters())
        assert names == {n for n, p in hat.named_parameters() if p.requires_grad}
        assert all(is_hat_parameter(n) for n in names) and not any("lm." in n for n in names)

    def test_published_tinyllama_has_about_100k(self):
        """22 routers of 2048 + 1, five gates of 2048 x 2 + 2, five translators: diagonal, bias and rank 1."""
        rank = HatConfig(22, "token").translator_rank
        counted = 22 * sum(p.numel() for p in MoERouter(2048).parameters())
        counted += 5 * sum(p.numel() for p in ExitGate(2048, rank).parameters())
        by_hand = 22 * (2048 + 1) + 5 * (2048 * 2 + 2) + 5 * (2048 + 2048 + 2 * 2048)
        assert counted == by_hand == 106_528


class TestThreads:
    """A forward belongs to its thread, and so does a context."""

    @pytest.mark.slow
    def test_eight_threads_give_what_one_gives(self, hat, ids):
        rows = [torch.cat((ids[i % 3 : i % 3 + 1], ids[i % 2 : i % 2 + 1]), 1)[:, : 20 + i] for i in range(8)]
        capacities = [0.7, 1.0] * 4

        def run(i):
            with torch.no_grad(), hat.at(capacities[i]):
                return stepwise(hat.lm, rows[i]), hat.trace.capacity

        expected, found, start = [run(i) for i in range(8)], {}, threading.Barrier(8)

        def work(i):
            start.wait()
            for _ in range(3):
                found.setdefault(i, []).append(run(i))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, (logits, capacity) in enumerate(expected):
            assert len(found[i]) == 3
            assert all(torch.equal(a, logits) and b == capacity for a, b in found[i])
        assert hat.capacity == 0.7

    def test_a_forward_inside_a_forward_and_one_that_fails(self, hat, ids):
        expected, inner = hat.lm(ids).logits, []

        def ask(module, args, out):
            if not inner:
                inner.append(None)
                with hat.dense():
                    inner.append(hat.lm(ids[:1]).logits)

        hook = hat.lm.model.layers[1].mlp.register_forward_hook(ask)
        assert torch.equal(hat.lm(ids).logits, expected) and hat.trace.batch == 3
        hook.remove()
        close(inner[1], tiny().model(ids[:1]).logits)
        hook = hat.lm.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hat.lm(ids)
        hook.remove()
        assert hat._context.passes == [] and torch.equal(hat.lm(ids).logits, expected)


class TestALlama:
    """Hooks, LoRA and saved files work on the reference path as on a Llama."""

    MODULES = ("input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj",
               "post_attention_layernorm", "mlp", "mlp.up_proj", "mlp.down_proj")  # fmt: skip

    @pytest.mark.parametrize("grain", GRAINS)
    def test_hooks_see_the_values_used(self, grain, ids):
        hat = active(grain, exits=())
        layer, seen = hat.lm.model.layers[2], {}
        for name in self.MODULES:
            layer.get_submodule(name).register_forward_hook(
                lambda module, args, kwargs, out, name=name: seen.update({name: (args, kwargs, out)}), with_kwargs=True
            )
        with hat.record():
            out = hat.lm(ids, output_hidden_states=True)
        masks = {site: m for (i, site), m in hat.trace.masks.keep.items() if i == 2}
        normed = seen["input_layernorm"][2]
        assert torch.equal(seen["self_attn"][1]["hidden_states"], normed)
        x = seen["mlp"][0][0]
        if grain == "channel":
            for name, site in {"self_attn.q_proj": "qkv", "self_attn.k_proj": "qkv", "mlp.up_proj": "gate_up"}.items():
                source = normed if site == "qkv" else seen["post_attention_layernorm"][2]
                assert torch.equal(seen[name][0][0], source * masks[site])
            for name, site in {"self_attn.o_proj": "o", "mlp.down_proj": "down"}.items():
                assert ((seen[name][0][0] != 0) <= masks[site]).all() and (~masks[site]).any()
            assert x.shape == (3, 14, 64)
        else:  # the FFN only sees the kept rows
            assert x.shape == (1, int(masks["ffn"].sum()), 64)
            assert torch.equal(x[0], seen["post_attention_layernorm"][2][masks["ffn"]])
        attended = out.hidden_states[2] + seen["self_attn"][2][0]
        update = seen["mlp"][2]
        if grain == "token":
            update = torch.zeros_like(attended).masked_scatter(masks["ffn"][..., None], update)
        close(out.hidden_states[3], attended + update)

    def test_a_hook_changes_what_follows(self, hat, ids):
        expected = hat.lm(ids).logits
        hook = hat.lm.model.layers[1].mlp.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
        assert apart(hat.lm(ids).logits, expected)
        hook.remove()
        assert torch.equal(hat.lm(ids).logits, expected)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_lora_is_honoured(self, when, ids):
        import peft  # slow to import

        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)

        def tune(model):  # peft draws its own numbers: make them the same on every call
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft asks for a name that transformers is about to drop
                tuned = peft.get_peft_model(model, lora)
            draws = np.random.default_rng(5)
            for name, p in sorted(tuned.named_parameters()):
                if "lora_" in name:
                    p.data = torch.from_numpy(draws.normal(size=tuple(p.shape)) * 0.1).float()
            return tuned

        expected = tune(tiny().model)(ids).logits
        base = tiny()
        if when == "before":
            tune(base.model)
        hat = untrained("channel", base, exit_layers=())
        if when == "after":
            tune(hat.lm)
        close(hat.lm(ids).logits, expected)
        assert apart(expected, tiny().model(ids).logits, 0.1)

        # Below capacity 1 the low-rank part also reads the masked input, as if it were merged into the weight.
        def skip(layer, site, x, rows, state):
            return torch.arange(x.shape[1]).expand(x.shape) % 3 > 0

        with hat.using(skip):
            gated = hat.lm(ids).logits
        merged = Base(tune(tiny().model).merge_and_unload(), base.tokenizer, "", "merged")
        merged = HierarchicalTransformer(merged, hat.config)
        with merged.using(skip):
            close(gated, merged.lm(ids).logits)

    def test_a_replaced_module_is_refused(self, hat, ids):
        layers = hat.lm.model.layers
        layers[2] = copy.deepcopy(layers[2])
        with pytest.raises(HatError, match="layer 2"):
            hat.lm(ids)
        layers[1].mlp = copy.deepcopy(tiny().model.model.layers[1].mlp)
        with pytest.raises(HatError, match="layer 1"):
            hat.lm(ids)

    def test_files_state_dicts_and_fingerprint_after_a_decode_are_those_of_plain_transformers(self, hat, ids, tmp_path):
        expected, plain = hat.lm(ids).logits, tiny()
        stepwise(hat.lm, ids[:1])
        assert fingerprint(hat.lm) == plain.fingerprint
        assert hat.lm.state_dict().keys() == plain.model.state_dict().keys()
        assert all(torch.equal(v, plain.model.state_dict()[k]) for k, v in hat.lm.state_dict().items())
        hat.lm.save_pretrained(tmp_path)
        with hat.dense():
            close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, hat.lm(ids).logits)
        whole = {k: v.clone() for k, v in hat.state_dict().items()}
        for p in hat.hat_parameters().values():
            p.zero_()
        hat.load_state_dict(whole)
        assert torch.equal(hat.lm(ids).logits, expected)

    def test_a_copy_is_a_model_of_its_own_and_what_cannot_be_copied_says_why(self, hat, ids):
        expected = hat.lm(ids).logits
        for use, message in (
            (lambda: copy.deepcopy(hat.lm), "hat.lm cannot be copied without its routers"),
            (lambda: copy.deepcopy(hat.lm.model), "hat.lm cannot be copied without its routers"),
            (lambda: pickle.dumps(hat), "never pickled: use save_pretrained"),
            (lambda: pickle.dumps(hat.lm), "never pickled"),
        ):
            with pytest.raises(HatError, match=message):
                use()
        twin = copy.deepcopy(hat)
        hat.capacity, hat.exit_rate = 1.0, 0.0
        assert torch.equal(twin.lm(ids).logits, expected) and (twin.capacity, twin.exit_rate) == (0.7, 0.2)
        assert twin.lm.model.layers[0].mlp is not hat.lm.model.layers[0].mlp

    def test_a_part_by_hand_is_the_bases_and_its_copy_works_in_the_model(self, ids):
        hat, plain = skipping("channel", bar=0.6, correction_rank=2), tiny().model
        expected, masks = recorded(hat, ids)
        x = plain.get_input_embeddings()(ids)
        given = {"position_embeddings": plain.model.rotary_emb(x, torch.arange(14)[None])}
        layer, theirs = hat.lm.model.layers[1], plain.model.layers[1]
        for ours in (layer, copy.deepcopy(hat.lm.model.layers)[1]):
            assert torch.equal(ours.mlp(x), theirs.mlp(x)) and torch.equal(copy.deepcopy(ours.mlp)(x), theirs.mlp(x))
            assert torch.equal(ours(x, **given), theirs(x, **given))
        for part in (layer, layer.mlp, layer.mlp.up_proj, hat.lm.lm_head):
            for write in (pickle.dumps, lambda part: torch.save(part, io.BytesIO())):
                with pytest.raises(HatError, match="parts of hat.lm are never pickled"):
                    write(part)
        copied, hat.lm.lm_head = copy.deepcopy(layer), copy.deepcopy(hat.lm.lm_head)
        with hat.force(masks):
            assert torch.equal(hat.lm(ids).logits, expected)
        base = hat.unload().model
        assert torch.equal(base(ids).logits, plain(ids).logits)
        assert torch.equal(copied.mlp(x), theirs.mlp(x))

    @pytest.mark.slow
    def test_torch_compile_runs_it_as_it_is(self, hat, ids):
        expected = hat.lm(ids).logits
        close(torch.compile(hat.lm, backend="eager")(ids).logits, expected)

    def test_eager_attention_gives_its_weights(self, ids):
        base = tiny()
        base.model.set_attn_implementation("eager")
        expected = base.model(ids, output_attentions=True).attentions
        found = untrained("channel", base).lm(ids, output_attentions=True).attentions
        assert len(found) == 4
        for a, b in zip(found, expected, strict=True):
            close(a, b)
