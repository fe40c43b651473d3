"""Which forwards the engine runs, and that it decides as the reference path does."""

import copy
import json
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from four_bits_read import round_weights
from test_transformer import EXITS, GREEDY, active, close, stepwise
from tiny_runs import GRAINS, gating, greedy, skipping, tiny
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, TextStreamer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from hat_lib.backbone.base import fingerprint
from hat_lib.config import HatConfig, HatError
from hat_lib.engine.decoder import Decoder
from hat_lib.evaluation.controls import RandomExits
from hat_lib.model import fast_path
from hat_lib.model.fast_path import WEIGHT_FORMATS
from hat_lib.model.granularity import column_norm
from hat_lib.model.policies import Random
from hat_lib.model.transformer import HierarchicalTransformer

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:token grain", "ignore:weights of the base were changed"),
]


@pytest.fixture(params=GRAINS)
def hat(request):
    return active(request.param)


def states(hat, ids, **given):
    with hat.collect() as found:
        logits = stepwise(hat.lm, ids, **given)
    return logits, found


def on_engine(hat, ids, **given):
    """For each step of a decode, whether it ran on the engine."""
    return [state.executed is not None for state in states(hat, ids, **given)[1]]


def test_it_decides_as_the_reference_path_does(hat, ids):
    found, ours = states(hat, ids)
    with hat.reference():
        expected, theirs = states(hat, ids)
    assert all(s.executed is not None for s in ours) and all(s.executed is None for s in theirs)
    close(found, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.exit_layer, b.exit_layer) and torch.allclose(a.site_share, b.site_share)
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("real", "position", "protected"))
        assert (a.capacity, a.exit_rate, a.routed, a.gated) == (pytest.approx(b.capacity), b.exit_rate, True, True)
    assert 0.3 < type(ours[0]).cat(ours).capacity < 0.95 and type(ours[0]).cat(ours).exit_rate > 0.05


def test_it_does_what_is_forced(hat, ids):
    ids = ids if hat.config.granularity == "token" else ids[:1]  # channels, of a single row
    with hat.record(), hat.reference():
        expected = hat.lm(ids).logits
    masks, recorded = hat.trace.masks, hat.trace
    with hat.force(masks):
        found, ours = states(hat, ids)
    assert all(s.executed is not None for s in ours)
    close(found, expected)
    joined = type(recorded).cat(ours)
    assert torch.equal(joined.exit_layer, recorded.exit_layer)
    assert torch.allclose(joined.site_share, recorded.site_share)


def test_left_padding_is_not_seen(hat, ids):
    mask = torch.ones(3, 18, dtype=torch.long)
    mask[0, :4] = mask[1, :1] = 0
    padded, cache, out = torch.nn.functional.pad(ids, (4, 0)), DynamicCache(config=hat.lm.config), []
    position = (mask.cumsum(1) - 1).clamp(min=0)
    for t in range(18):
        given = {"attention_mask": mask[:, : t + 1], "position_ids": position[:, t : t + 1]}
        out.append(hat.lm(padded[:, t : t + 1], cache=cache, use_cache=True, **given).logits)
        assert (hat.trace.executed is not None) == (t >= 4)  # the engine does not run padded tokens
        assert torch.equal(hat.trace.position.clamp(min=0), position[:, t : t + 1])
    with hat.reference():
        expected = hat.lm(padded, attention_mask=mask, position_ids=position).logits
    close(torch.cat(out, 1)[mask.bool()], expected[mask.bool()])


class Reasons:
    """How to ask for each thing the engine cannot do."""

    def hook(hat, monkeypatch):
        hat.lm.model.layers[1].mlp.down_proj.register_forward_hook(lambda *args: None)

    def global_hook(hat, monkeypatch):
        monkeypatch.setitem(torch.nn.modules.module._global_forward_hooks, 0, lambda *args: None)

    def adapter(hat, monkeypatch):
        mlp = hat.lm.model.layers[1].mlp
        mlp.up_proj = torch.nn.Sequential(mlp.up_proj)

    def parameter(hat, monkeypatch):
        linear = hat.lm.model.layers[1].mlp.up_proj
        linear.weight = torch.nn.Parameter(linear.weight * 2)

    def foreign_forward(hat, monkeypatch):
        linear = hat.lm.model.layers[0].self_attn.q_proj
        linear.forward = linear.forward

    def scaling(hat, monkeypatch):
        hat.lm.model.layers[1].self_attn.scaling *= 2

    def epsilon(hat, monkeypatch):
        hat.lm.model.norm.variance_epsilon *= 2

    def float16(hat, monkeypatch):
        hat.to(torch.float16)

    def training(hat, monkeypatch):
        hat.lm.train()

    def fewer_layers(hat, monkeypatch):
        monkeypatch.setattr(hat.lm.config, "num_hidden_layers", 3)

    def activations(hat, monkeypatch):
        monkeypatch.setattr(hat.lm.config, "output_hidden_states", True)


@pytest.mark.parametrize("reason", [r for r in vars(Reasons) if not r.startswith("_")])
def test_what_it_cannot_do_the_reference_path_does(hat, ids, monkeypatch, reason):
    assert hat.decoding.startswith("engine (float32, ")
    getattr(Reasons, reason)(hat, monkeypatch)
    assert not any(on_engine(hat, ids[:, :4]))
    assert reason == "activations" or hat.decoding.startswith("reference path (")


@pytest.mark.parametrize(
    "context",
    [
        lambda hat: hat.reference(),
        lambda hat: hat.record(),
        lambda hat: hat.masked(),
        lambda hat: hat.using(Random(0.5)),
        lambda hat: hat.exiting(RandomExits(dict.fromkeys(EXITS, 0.5))),
        lambda hat: hat.dropping(torch.zeros(4, 3, dtype=torch.bool)),
        lambda hat: torch.enable_grad(),
        lambda hat: torch.autocast("cpu"),
    ],
    ids=["reference", "record", "masked", "using", "exiting", "dropping", "grad", "autocast"],
)
def test_contexts_that_it_leaves_to_the_reference_path(hat, ids, context):
    with context(hat):
        assert not any(on_engine(hat, ids[:, :3]))
    assert all(on_engine(hat, ids[:, :3]))


def head_bias(lm):
    lm.lm_head.bias = torch.nn.Parameter(torch.zeros(lm.vocab_size))


def foreign_forward(lm):
    lm.model.layers[0].mlp.forward = lm.model.layers[0].mlp.forward


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        ({"hidden_act": "gelu"}, None, "the FFN's activation is gelu"),
        ({"rope_parameters": DYNAMIC}, None, "rotary embeddings of type dynamic"),
        ({}, head_bias, "the head has a bias"),
        ({}, foreign_forward, "another library overrides a forward of the base"),
    ],
)
def test_bases_that_it_leaves_to_the_reference_path(ids, config, change, words):
    base = tiny()
    changed = copy.deepcopy(base.model.config)
    changed.update(config)
    lm = LlamaForCausalLM(changed).eval()
    if change is not None:
        change(lm)
    hat = active("channel", replace(base, model=lm))
    assert hat.decoding == f"reference path ({words})"
    assert not any(on_engine(hat, ids[:, :3]))


@pytest.mark.parametrize("given", [{"output_hidden_states": True}, {"labels": True}, {"use_cache": False}])
def test_what_is_asked_of_one_call(hat, ids, given):
    if "labels" in given:
        given = {"labels": ids[:, :1]}
    hat.lm(ids[:, :1], **{"cache": DynamicCache(config=hat.lm.config), "use_cache": True} | given)
    assert hat.trace.executed is None
    hat.lm(ids[:1, :9], cache=DynamicCache(config=hat.lm.config), use_cache=True)  # one row more than the engine takes
    assert hat.trace.executed is None


@pytest.mark.parametrize("capacity", [1.0, 0.5])
@pytest.mark.parametrize(
    "keep",
    [1, 2, 9, 0, None, torch.tensor([1]), torch.tensor([2, 0]), torch.tensor(2), torch.tensor([0, 0, 1, 2, 2])],
    ids=lambda keep: f"{keep if keep is None or type(keep) is int else keep.tolist()}",
)
def test_the_head_runs_for_the_logits_that_are_asked_for(ids, capacity, keep):
    hat, some = gating(), torch.tensor([[7, 11, 13], [17, 19, 23]])
    asked = slice(-(keep or 0), None) if not isinstance(keep, torch.Tensor) else keep
    with hat.at(capacity):
        every = hat.lm(some, cache=DynamicCache(config=hat.lm.config)).logits
        alone = stepwise_shares(hat, some)[asked].flatten()
        cache = DynamicCache(config=hat.lm.config)
        found = hat.lm(some, cache=cache, **({} if keep is None else {"logits_to_keep": keep})).logits
        twice = isinstance(keep, torch.Tensor) and keep.numel() > 3
        assert (hat.trace.executed is None) == twice and cache.get_seq_length() == 3
        close(found, every[:, asked])
        assert hat.trace.head_share == pytest.approx(float(alone.mean()), abs=1e-5)
        assert (capacity < 1) == (hat.trace.head_share < 1)


def stepwise_shares(hat, ids):
    """The head's share of each token, ``[T]``, mean over rows."""
    with hat.collect() as found:
        stepwise(hat.lm, ids)
    return torch.tensor([state.head_share for state in found])


def test_weights_in_another_form_for_a_while(hat, ids):
    before = stepwise(hat.lm, ids)
    with hat.weights("int8"):
        assert hat.decoding.startswith("engine (int8, ") and not torch.equal(stepwise(hat.lm, ids), before)
    assert hat.decoding.startswith("engine (float32, ") and torch.equal(stepwise(hat.lm, ids), before)
    with pytest.raises(HatError, match="weight format must be one of base, int8, q4, got 'int3'"):
        hat.weights("int3")


def test_hidden_states_that_were_asked_for_once(hat, ids):
    hat.lm(ids, output_hidden_states=True)
    assert any(hat.lm.model.layers[0]._forward_hooks.values()) and all(on_engine(hat, ids))
    assert len(hat.lm(ids[:, :2], output_hidden_states=True).hidden_states) == 5


@pytest.mark.filterwarnings("ignore:.*past_key_values")
def test_a_cache_by_its_former_name(hat, ids):
    cache = hat.lm(ids[:, :4], cache=DynamicCache(config=hat.lm.config)).cache
    found = hat.lm(ids[:1, 4:5].expand(3, 1), past_key_values=cache)
    assert hat.trace.executed is not None and found.cache is cache and cache.get_seq_length() == 5


@pytest.mark.slow
def test_without_numba_everything_works():
    script = Path(__file__).parents[1] / "without_numba.py"
    here = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, env=here)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    hats = [skipping(grain) for grain in GRAINS]
    assert found["texts"] == [greedy(hat) for hat in hats] and all(hat.trace.executed is not None for hat in hats)
    (why,) = set(found["decoding"])
    assert why.startswith("reference path (numba cannot be used here (ModuleNotFoundError: ")
    assert [line.split(maxsplit=1)[1] for line in found["report"] if line.startswith("decoding")] == [why]
    assert "note: no engine: skipped channels save no time" in found["report"]


def merged(lm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks for a name that transformers is about to drop
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        peft.get_peft_model(lm, lora).merge_and_unload()


CHANGES = {
    "adapters were merged": merged,
    "data": lambda lm: lm.model.layers[1].mlp.up_proj.weight.data.mul_(1.5),
    "rotary": lambda lm: lm.model.rotary_emb.inv_freq.mul_(2),
    "replaced": lambda lm: setattr(lm.lm_head, "weight", torch.nn.Parameter(2 * lm.lm_head.weight)),
    "loaded": lambda lm: lm.load_state_dict({k: 1.2 * v for k, v in lm.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_under_the_model_are_followed(hat, ids, change):
    before = stepwise(hat.lm, ids)
    CHANGES[change](hat.lm)
    another = pytest.warns(UserWarning, match="weights of the base were changed under the model")
    with another if change != "rotary" else nullcontext():
        after = stepwise(hat.lm, ids)
    assert float((after - before).abs().max()) > 1e-2
    with hat.reference():
        close(after, stepwise(hat.lm, ids))
    assert hat.base.fingerprint == fingerprint(hat.lm)
    if hat.config.granularity == "channel":
        torch.testing.assert_close(hat.routers["1_down"].column_norm, column_norm(hat.lm.model.layers[1], "down"))


def test_weights_that_change_while_another_thread_packs_them_are_followed(hat, ids, monkeypatch):
    looked = threading.Thread(target=hat.refresh)

    def pack(*args, **given):
        packed = Decoder(*args, **given)
        if looked.ident is None:
            hat.lm.model.layers[1].mlp.up_proj.weight.mul_(1.5)
            looked.start()
            looked.join(0.5)  # it waits until this is done
        return packed

    monkeypatch.setattr(fast_path, "Decoder", pack)
    hat.lm(ids[:1, :1], cache=DynamicCache(config=hat.lm.config))
    looked.join()
    after = stepwise(hat.lm, ids)
    with hat.reference():
        close(after, stepwise(hat.lm, ids))


def test_routers_changed_through_data_are_followed(hat, ids):
    stepwise(hat.lm, ids)
    for p in hat.hat_parameters().values():
        p.data.add_(0.3)
    after = stepwise(hat.lm, ids)
    with hat.reference():
        close(after, stepwise(hat.lm, ids))


def test_weights_and_routers_that_change_are_followed(hat, ids):
    before = stepwise(hat.lm, ids)
    hat.lm.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    for p in hat.hat_parameters().values():
        p.add_(0.05)
    after = stepwise(hat.lm, ids)
    assert float((after - before).abs().max()) > 1e-2
    with hat.reference():
        close(after, stepwise(hat.lm, ids))
    hat.to(torch.bfloat16)
    assert all(on_engine(hat, ids)) and stepwise(hat.lm, ids).dtype == torch.bfloat16


@pytest.mark.parametrize("form, size, off", [("int8", 0.4, 0.05), ("q4", 0.25, 0.05)])
def test_weights_in_fewer_bits(hat, ids, form, size, off):
    if form == "q4":  # against a base with the same weights, only inputs in eight bits differ
        round_weights(hat.lm)
    assert hat.packed_bytes == 0 and all(on_engine(hat, ids))
    full, hat.weight_format = hat.packed_bytes, form
    assert hat.decoding.startswith(f"engine ({form}, ") and all(on_engine(hat, ids))
    assert 0 < hat.packed_bytes < size * full
    with hat.dense():  # decisions would depend on the last bit
        found = stepwise(hat.lm, ids)
        with hat.reference():
            near = stepwise(hat.lm, ids)
    assert 0 < float((found - near).abs().mean()) < off * float(near.abs().mean())
    assert hat.lm.generate(ids, **GREEDY).shape == (3, 22)


def test_a_format_that_it_does_not_know_or_cannot_make(hat, ids, monkeypatch):
    hat.weight_format = "int8"
    with pytest.raises(HatError, match="weight format must be one of base, int8, q4, got 'int3'"):
        hat.weight_format = "int3"
    monkeypatch.setattr(hat.lm.model.layers[0].mlp.up_proj, "out_features", 150)
    with pytest.raises(HatError, match="weight format q4 needs .* of 32, and mlp.up_proj has 150 outputs"):
        hat.weight_format = "q4"
    assert hat.weight_format == "int8"


@pytest.mark.parametrize("form", WEIGHT_FORMATS)
def test_rows_and_pieces_change_no_bit_of_what_is_decided(hat, ids, form):
    hat.weight_format = form
    together, ours = states(hat, ids)
    for r in range(3):
        alone, own = states(hat, ids[r : r + 1])
        assert torch.equal(alone[0], together[r])
        assert torch.equal(type(own[0]).cat(own).site_share[..., 0, :], type(ours[0]).cat(ours).site_share[..., r, :])
    assert 0.3 < type(ours[0]).cat(ours).capacity < 0.98 and type(ours[0]).cat(ours).exit_rate > 0.02
    cache = DynamicCache(config=hat.lm.config)
    with hat.collect() as found:
        pieces = [hat.lm(piece, cache=cache, use_cache=True).logits for piece in ids[:1].split(7, dim=1)]
    assert torch.equal(torch.cat(pieces, 1), together[:1]) and all(s.executed is not None for s in found)


def test_a_copy_and_the_base_afterwards(hat, ids):
    twin, expected = copy.deepcopy(hat), stepwise(hat.lm, ids)
    base = hat.unload()
    assert hat.packed_bytes == 0
    assert not {"forward", "generate"} & set(vars(base.model))
    with pytest.raises(HatError, match="unloaded"):
        hat.decoding  # noqa: B018 - a property
    assert all(on_engine(twin, ids))
    close(stepwise(twin.lm, ids), expected)


class Raises(StoppingCriteria):
    """Records torch's threads, and raises at the second token."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(torch.get_num_threads())
        if len(self.seen) == 2:
            raise ValueError("enough")
        return torch.zeros(len(input_ids), dtype=torch.bool)


class TestGenerate:
    """transformers' own loop writes the same on either path."""

    def both(self, hat, ids, **settings):
        given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | settings
        torch.manual_seed(0)
        found = hat.lm.generate(ids, **given)
        assert hat.trace.executed is not None
        torch.manual_seed(0)
        with hat.reference():
            return found, hat.lm.generate(ids, **given)

    @pytest.mark.parametrize(
        "settings",
        [{}, {"do_sample": True, "top_k": 20}, {"repetition_penalty": 1.3}, {"num_beams": 2}],
        ids=["greedy", "sampled", "penalty", "beams"],
    )
    def test_the_same_text(self, hat, ids, settings):
        assert torch.equal(*self.both(hat, ids[:1], **settings))
        assert torch.equal(*self.both(hat, ids, **settings))

    def test_what_listens_and_what_decides(self, hat, ids, capsys):
        class Nothing(LogitsProcessor):
            def __call__(self, input_ids, scores):
                scores[:, 7] = torch.inf
                return scores

        class Enough(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), input_ids.shape[1] >= 17)

        given = {"logits_processor": LogitsProcessorList([Nothing()])}
        given["stopping_criteria"] = StoppingCriteriaList([Enough()])
        streamer = TextStreamer(hat.base.tokenizer, skip_prompt=True)
        found, expected = self.both(hat, ids[:1], streamer=streamer, **given)
        assert found[0, 14:].tolist() == [7, 7, 7] and torch.equal(found, expected)
        assert capsys.readouterr().out.strip()

    @pytest.mark.parametrize("how", ["a streamer", "a weight"])
    def test_what_a_streamer_does_to_the_model_counts_from_the_next_token(self, hat, ids, how):
        class Meddler:
            def __init__(self):
                self.seen = 0

            def put(self, value):
                self.seen += 1
                if self.seen == 4 and how == "a weight":
                    hat.lm.model.layers[1].mlp.up_proj.weight.mul_(1.5)
                elif self.seen == 4:
                    hat.lm.model.layers[1].register_forward_hook(lambda *args: None)

            def end(self):
                pass

        with hat.collect() as found:
            hat.lm.generate(ids[:1], streamer=Meddler(), **GREEDY)
        ran = [state.executed is not None for state in found]
        assert ran == [False, *[True] * 7] if how == "a weight" else ran == [False, True, True, *[False] * 5]

    def test_torch_has_its_threads_back(self, hat, ids):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            hat.lm.generate(ids[:1], **GREEDY)
            assert torch.get_num_threads() == 2
            inside = []
            with pytest.raises(ValueError, match="enough"):
                hat.lm.generate(ids[:1], stopping_criteria=[Raises(inside)], **GREEDY)
            assert torch.get_num_threads() == 2 and inside == [2, 1]  # after the prefill, and after a step
            with ThreadPoolExecutor(1) as pool:  # a thread started afterwards
                assert pool.submit(torch.get_num_threads).result() == 2
        finally:
            torch.set_num_threads(before)

    def test_a_conversation_goes_on_behind_one_cache(self, hat, ids):
        texts = []
        for around in (hat.at(), hat.reference()):
            cache, text = DynamicCache(config=hat.lm.config), ids[:1, :5]
            with around:
                for turn in (ids[1:2], ids[2:3, :3]):
                    text = torch.cat([text, turn], 1)
                    text = hat.lm.generate(text, cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
                    cache.crop(-2)  # as if a user had removed the end
                    text = text[:, :-2]
            texts.append(text)
        assert torch.equal(*texts)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(("prompt", "more"), [(1, 63), (60, 4), (60, 40), (70, 4)])
def test_up_to_the_context_limit_and_beyond_as_transformers_does(grain, prompt, more):
    base = tiny()
    config = copy.deepcopy(base.model.config)
    config.max_position_embeddings = 64
    torch.manual_seed(0)
    lm = LlamaForCausalLM(config).eval()
    hat, given = active(grain, replace(base, model=copy.deepcopy(lm))), GREEDY | {"max_new_tokens": more}
    text = torch.from_numpy(np.random.default_rng(1).integers(5, 250, (1, prompt)))
    with hat.collect() as ours:
        found = hat.lm.generate(text, **given)
    assert all(state.executed is not None for state in ours[1:])
    with hat.reference():
        assert torch.equal(found, hat.lm.generate(text, **given))
    with hat.dense():
        found = hat.lm.generate(text, **given)
    assert hat.trace.executed is not None and torch.equal(found, lm.generate(text, **given))
    assert found.shape[1] == prompt + more


def test_the_token_grain_never_skips_layer_0(ids):
    base = tiny()
    hat = HierarchicalTransformer(base, HatConfig.published(base, exit_layers=()))
    everything = dict.fromkeys(((i, "ffn") for i in range(hat.config.n_layers)), float("inf"))
    with hat._changed(own_policy=hat.threshold_policy(everything)):
        stepwise(hat.lm, ids)
    share = hat.trace.site_share
    assert hat.trace.executed is not None and share[0].eq(1).all() and not share[1:].any()
