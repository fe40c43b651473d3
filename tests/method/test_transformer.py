"""One equality per feature, on a tiny random Llama, for both grains, and on one of each other family.

Decisions recorded in one pass are forced on the other, so logits must agree within rounding.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
import torch
from soak import equalities
from tiny_runs import GRAINS, active, stepwise, tiny, tune, untrained
from transformers import AutoModelForCausalLM, DynamicCache

from hat_lib.base.load import Base, fingerprint
from hat_lib.config import HatError
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.trace import Masks

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:token grain")]
every_family = tiny_runs.every_family()


def base_within(hat, ids, expected):
    """`dense` gives the base, even inside a capacity at which the model differs."""
    with hat.at(0.5):
        assert apart(hat.lm(ids).logits, expected)
        with hat.dense():
            assert torch.equal(hat.lm(ids).logits, expected)
            close(stepwise(hat, ids), expected)


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
            close(stepwise(hat, ids), expected, tol)


class TestSamePassTwoWays:
    """Decode == parallel, compact == masked, alone == in a batch, the past ignores the future."""

    @every_family
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_all_of_a_drawn_model_hold_for_every_family(self, hat, side):
        case = {"grain": hat.grain.name, "exits": {1, 2, 3}, "translator_rank": 2, "correction_rank": None}
        case |= {"protected": 2, "capacity": 0.7, "skips_head": False, "lora": False, "dtype": torch.float32}
        case |= {"batch": 3, "tokens": 14, "side": side, "threads": 2, "seed": 0, "width": 64}
        equalities.equal(SimpleNamespace(**case), tiny(name=hat.base.name))

    @every_family
    @pytest.mark.parametrize("beams", [1, 3])
    def test_cached_equals_uncached(self, hat, ids, beams):
        options = GREEDY | {"num_beams": beams, "gate_prompt": True}
        cached = hat.lm.generate(ids[:1, :6], **options)
        assert torch.equal(cached, hat.lm.generate(ids[:1, :6], use_cache=False, **options))

    @every_family
    def test_chunked_prefill_and_cropped_cache(self, hat, ids):
        if getattr(hat.lm.config, "sliding_window", None):
            pytest.skip("transformers cannot crop the cache of a sliding window")
        parallel, masks = recorded(hat, ids)
        cache = DynamicCache(config=hat.lm.config)
        with hat.force(masks):
            chunks = [hat.lm(c, cache=cache, use_cache=True).logits for c in ids.split(5, dim=1)]
            close(torch.cat(chunks, 1), parallel)
            assert {layer.keys.shape[2] for layer in cache.layers} == {ids.shape[1]}, "an exited token has K and V"
            cache.crop(-4)
            close(hat.lm(ids[:, -4:], cache=cache, use_cache=True).logits, parallel[:, -4:])

    def test_packed_documents(self, ids):
        """Where `position_ids` restart, a new document begins, with its own protected tokens."""
        hat, first, second = active("channel"), ids[:1, :8], ids[1:2, :6]
        positions = torch.cat((torch.arange(8), torch.arange(6)))[None]
        packed = hat.lm(torch.cat((first, second), 1), position_ids=positions, use_cache=False).logits
        assert hat.trace.protected.nonzero()[:, 1].tolist() == [0, 1, 8, 9]
        close(packed[:, 8:], hat.lm(second, use_cache=False).logits)

    @every_family
    def test_forced_depths_in_one_batch(self, hat, ids):
        """Tokens that leave at different depths freeze there, and hidden_states repeat the frozen state."""
        exits = {e: torch.zeros(3, 14, dtype=torch.bool) for e in hat.config.exit_layers}
        exits[1][0, 5] = exits[2][1, 7] = exits[3][2, 13] = True
        with hat.force(Masks({}, exits)):
            states = hat.lm(ids, output_hidden_states=True).hidden_states
        depth = hat.trace.exit_layer
        assert int((depth < hat.config.n_layers).sum()) == 3 and len(states) == hat.config.n_layers + 1
        for e, (row, t) in {1: (0, 5), 2: (1, 7)}.items():
            assert depth[row, t] == e
            for later in range(e + 1, hat.config.n_layers):
                assert torch.equal(states[later][row, t], states[e + 1][row, t])
            close(states[e + 1][row, t], hat.gates[str(e)].translate(states[e][row, t][None])[0])

    def test_masks_that_do_not_fit(self, hat, ids):
        site, units = next(iter(hat.mask_shapes.items()))
        for size in ((2, 14, *units), (3, 13, *units), (3, 14, *units, 5)):
            with pytest.raises(HatError, match=site), hat.force(Masks({(1, site): torch.ones(size, dtype=torch.bool)})):
                hat.lm(ids)

    @every_family
    def test_bf16_and_back(self, hat, ids):
        """Routers, column norms and rotary frequencies stay fp32, as in a model loaded in bf16."""
        masks = recorded(hat, ids)[1]
        hat.to(torch.bfloat16)
        loaded = active(hat.grain.name, tiny(torch.bfloat16, hat.base.name))
        with hat.force(masks), loaded.force(masks):
            assert torch.equal(hat.lm(ids).logits, loaded.lm(ids).logits)
        hat.to(torch.float32)
        assert hat.lm(ids).logits.dtype == torch.float32


def test_contexts(hat, ids):
    """They restore, and follow a new calibration; for nested ones see `test_off_the_path.py`."""
    expected = hat.lm(ids).logits
    with pytest.raises(RuntimeError), hat.dense():
        raise RuntimeError
    assert torch.equal(hat.lm(ids).logits, expected) and (hat.capacity, hat.exit_rate) == (0.7, 0.2)
    halved = (np.array(hat.calibration.thresholds) / 2).tolist()
    with hat.at(0.6):
        with hat.at(0.8):
            hat.calibration = replace(hat.calibration, thresholds=halved)
            inner = hat.lm(ids).logits
        outer = hat.lm(ids).logits
    for capacity, found in ((0.8, inner), (0.6, outer)):
        with hat.at(capacity):
            assert torch.equal(hat.lm(ids).logits, found)


class TestThreads:
    """A forward belongs to its thread, and so does a context."""

    @pytest.mark.slow
    def test_threads(self, hat, ids):
        rows = [ids[i % 3 : i % 3 + 1, : 7 + i] for i in range(8)]

        def run(i):
            with torch.no_grad(), hat.at((0.7, 1.0)[i % 2]):
                return stepwise(hat, rows[i]), hat.trace.capacity

        expected = [run(i) for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(run, [*range(8)] * 3))
        for (logits, capacity), one in zip(found, expected * 3, strict=True):
            assert torch.equal(logits, one[0]) and capacity == one[1]
        assert hat.capacity == 0.7

    def test_forward_inside_a_forward(self, hat, ids):
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


class TestALlama:
    """Hooks, LoRA and saved files work on the reference path as on a Llama."""

    @pytest.mark.parametrize("grain", GRAINS)
    def test_hooks_see_the_values_used(self, grain, ids):
        hat = active(grain, exits=())
        layer, seen = hat.lm.model.layers[2], {}
        for name in ("post_attention_layernorm", "mlp", "mlp.up_proj"):
            layer.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: seen.update({name: (args[0], out)})
            )
        masks, normed = recorded(hat, ids)[1].keep, seen["post_attention_layernorm"][1]
        if grain == "channel":
            assert torch.equal(seen["mlp.up_proj"][0], normed * masks[2, "gate_up"])
        else:  # the FFN only sees the kept rows
            assert torch.equal(seen["mlp"][0][0], normed[masks[2, "ffn"]])

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_lora_is_honoured(self, when, ids):
        def skip(layer, site, x, rows, trace):
            return torch.arange(x.shape[1]).expand(x.shape) % 3 > 0

        base = tiny()
        if when == "before":
            tune(base.model)
        hat = untrained("channel", base, exit_layers=())
        if when == "after":
            tune(hat.lm)
        merged = tune(tiny().model).merge_and_unload()
        expected = merged(ids).logits
        close(hat.lm(ids).logits, expected)
        assert apart(expected, tiny().model(ids).logits, 0.1)
        # Below capacity 1 the low-rank part also reads the masked input, as if it were merged into the weight.
        merged = HierarchicalTransformer(Base(merged, base.tokenizer, "", "merged"), hat.config)
        with hat.using(skip), merged.using(skip):
            close(hat.lm(ids).logits, merged.lm(ids).logits)

    @every_family
    def test_saved_files_are_those_of_plain_transformers(self, hat, ids, tmp_path):
        expected, plain = hat.lm(ids).logits, tiny(name=hat.base.name)
        stepwise(hat, ids[:1])
        assert fingerprint(hat.lm) == plain.fingerprint
        assert hat.lm.state_dict().keys() == plain.model.state_dict().keys()
        hat.lm.save_pretrained(tmp_path)
        with hat.dense():
            close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, hat.lm(ids).logits)
        whole = {k: v.clone() for k, v in hat.state_dict().items()}
        for p in hat.hat_parameters().values():
            p.zero_()
        hat.load_state_dict(whole)
        assert torch.equal(hat.lm(ids).logits, expected)

    @pytest.mark.slow
    def test_torch_compile(self, hat, ids):
        expected = hat.lm(ids).logits
        close(torch.compile(hat.lm, backend="eager")(ids).logits, expected)
