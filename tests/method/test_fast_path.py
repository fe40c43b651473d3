"""Which forwards the engine runs, and that it decides as the reference path does."""

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny_runs
import torch
from four_bits_read import packed_and_read
from test_off_the_path import CONTEXTS as NAMED
from test_transformer import close, stepwise
from tiny_runs import GRAINS, active, gating, greedy, skipping, tiny
from transformers import DynamicCache, LlamaForCausalLM

from hat_lib.base.load import fingerprint
from hat_lib.config import HatError
from hat_lib.decoding.generate import WEIGHT_FORMATS
from hat_lib.method.trace import Masks

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:token grain", "ignore:weights of the base were changed"),
]
every_family = tiny_runs.every_family(but=("random:tiny-mistral",))  # whose window the engine leaves alone


def states(hat, ids):
    with hat.collect() as found:
        logits = stepwise(hat, ids)
    return logits, found


def on_engine(hat, ids):
    """For each step of a decode, whether it ran on the engine."""
    return [state.executed is not None for state in states(hat, ids)[1]]


@every_family
def test_decides_as_the_reference_path(hat, ids):
    found, ours = states(hat, ids)
    with hat.reference():
        expected, theirs = states(hat, ids)
    assert all(s.executed is not None for s in ours) and all(s.executed is None for s in theirs)
    close(found, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.exit_layer, b.exit_layer) and torch.allclose(a.site_share, b.site_share)
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("real", "position", "protected"))
    assert 0.3 < type(ours[0]).cat(ours).capacity < 0.95 and type(ours[0]).cat(ours).exit_rate > 0.05


def hook(hat):
    hat.lm.model.layers[1].mlp.down_proj.register_forward_hook(lambda *args: None)


OBSTACLES = {
    "hook": hook,
    "adapter": lambda hat: setattr(mlp := hat.lm.model.layers[1].mlp, "up_proj", torch.nn.Sequential(mlp.up_proj)),
    "forward": lambda hat: setattr(
        linear := hat.lm.model.layers[0].self_attn.q_proj, "forward", partial(linear.forward)
    ),
    "float16": lambda hat: hat.to(torch.float16),
    "training": lambda hat: hat.lm.train(),
    "fewer layers": lambda hat: setattr(hat.lm.config, "num_hidden_layers", 3),
}


@pytest.mark.parametrize("change", OBSTACLES)
def test_changed_models_run_on_the_reference_path(channel_hat, ids, change):
    assert channel_hat.decoding.startswith("engine (float32, ")
    OBSTACLES[change](channel_hat)
    assert channel_hat.decoding.startswith("reference path (")
    assert not any(on_engine(channel_hat, ids[:, :4]))


CONTEXTS = {
    **{name: NAMED[name][0] for name in ("reference", "record", "masked", "using", "exiting")},
    "force": lambda hat: hat.force(Masks()),
    "grad": lambda hat: torch.enable_grad(),
    "autocast": lambda hat: torch.autocast("cpu"),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_that_run_on_the_reference_path(channel_hat, ids, context):
    with CONTEXTS[context](channel_hat):
        assert not any(on_engine(channel_hat, ids[:, :3]))
    assert all(on_engine(channel_hat, ids[:, :3]))


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("config", [{"hidden_act": "gelu"}, {"rope_parameters": DYNAMIC}], ids=str)
def test_bases_that_run_on_the_reference_path(ids, config):
    base = tiny()
    changed = copy.deepcopy(base.model.config)
    changed.update(config)
    hat = active("channel", replace(base, model=LlamaForCausalLM(changed).eval()))
    assert hat.decoding.startswith("reference path (") and not any(on_engine(hat, ids[:, :3]))


def test_forwards_that_are_not_the_engines(channel_hat, ids):
    hat, cache = channel_hat, DynamicCache(config=channel_hat.lm.config)
    hat.lm(ids[:1, :1], cache=cache, use_cache=True)  # neither asked for nor in generate
    assert hat.trace.executed is None
    with hat.engine():
        hat.lm(ids[:1, :9], cache=cache, use_cache=True)  # one token too many
        assert hat.trace.executed is None
        hat.lm(ids[:1, :1], cache=cache, use_cache=True, output_hidden_states=True)
    assert all(on_engine(hat, ids)), "hooks that transformers leaves for hidden states do not count"


@pytest.mark.parametrize("capacity", [1.0, 0.5])
@pytest.mark.parametrize("keep", [1, 0, torch.tensor([2, 0]), torch.tensor([0, 0, 1, 2, 2])], ids=str)
def test_logits_to_keep(ids, capacity, keep):
    hat, some = gating(), torch.tensor([[7, 11, 13], [17, 19, 23]])
    kept = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    with hat.at(capacity), hat.engine():
        every = hat.lm(some, cache=DynamicCache(config=hat.lm.config)).logits
        shares = torch.tensor([state.head_share for state in states(hat, some)[1]])
        cache = DynamicCache(config=hat.lm.config)
        found = hat.lm(some, cache=cache, logits_to_keep=keep).logits
        twice = isinstance(keep, torch.Tensor) and keep.numel() > 3
        assert (hat.trace.executed is None) == twice and cache.get_seq_length() == 3
        close(found, every[:, kept])
        assert hat.trace.head_share == pytest.approx(float(shares[kept].mean()), abs=1e-5)
        assert (capacity < 1) == (hat.trace.head_share < 1)


EXTREMES = {
    "gates": lambda lm: [layer.mlp.gate_proj.weight.mul_(3e3) for layer in lm.model.layers],
    "last norm": lambda lm: lm.model.norm.weight.mul_(1e4),
    "norms": lambda lm: [layer.post_attention_layernorm.weight.mul_(1e4) for layer in lm.model.layers],
    "largest": lambda lm: lm.model.embed_tokens.weight[:40].fill_(torch.finfo(lm.dtype).max),
    "infinite": lambda lm: lm.model.embed_tokens.weight[:40, 5].fill_(torch.inf),
    "NaN": lambda lm: lm.model.embed_tokens.weight[:40, 5].fill_(torch.nan),
}


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(extreme, dtype, tol, ids):
    """NaN where the reference path has it; in bfloat16 the engine rounds less, so decisions are left out."""
    hat = active("channel", tiny(dtype))
    EXTREMES[extreme](hat.lm)
    for context in [hat.dense()] + [hat.at(0.5, 0.0)] * (dtype == torch.float32):
        with context:
            found = stepwise(hat, ids)
            with hat.reference():
                expected = stepwise(hat, ids)
        assert torch.equal(found.isfinite(), expected.isfinite())
        close(found.nan_to_num(), expected.nan_to_num(), tol)


def test_ids_outside_the_vocabulary(channel_hat, ids):
    """Refused where they are read: in a prompt, in a known text, and after the end of a shorter text."""
    hat, new = channel_hat, lambda: DynamicCache(config=channel_hat.lm.config)
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    stop = int(hat.lm.generate(ids, **given)[0, 16])
    for bad in (hat.lm.config.vocab_size, -1, 10**9):
        text = torch.tensor([[5, bad, 6]])
        with hat.engine(), pytest.raises(IndexError, match=str(bad)):
            hat.lm(text, cache=new(), use_cache=True)
        with pytest.raises(IndexError, match=str(bad)):
            hat.replay(text, new())
        with pytest.raises(IndexError):
            hat.lm.generate(text, **given)
        given |= {"pad_token_id": bad, "eos_token_id": stop}
        assert hat.lm.generate(ids[:1], **given)[0, -1] == stop  # it is alone, so nothing follows
        with pytest.raises(IndexError, match=str(bad)):
            hat.lm.generate(ids, **given)


def filled(*shape, odd=()):
    """A cache of four layers with keys and values ``[B, G, T, h]``, of another shape in the last."""
    torch.manual_seed(0)
    return DynamicCache([(torch.randn(s), torch.randn(s)) for s in [*[shape] * 3, odd or shape]])


CALLS = {
    "as usual": dict,
    "hidden states": lambda: {"output_hidden_states": True},
    "labels": lambda: {"labels": torch.tensor([[7]])},
    "no cache": lambda: {"use_cache": False},
    "negative": lambda: {"position_ids": torch.tensor([[-3]])},
    "far": lambda: {"position_ids": torch.tensor([[1 << 40]])},
    "positions of two rows": lambda: {"position_ids": torch.tensor([[3], [4]])},
    "all positions": lambda: {"position_ids": torch.arange(4)[None]},
    "floats": lambda: {"input_ids": torch.tensor([[7.0]])},
    "list of logits": lambda: {"logits_to_keep": [0]},
    "mask in bfloat16": lambda: {"attention_mask": torch.ones(1, 6).bfloat16()},
    "size of heads": lambda: {"cache": filled(1, 2, 5, 1)},
    "heads": lambda: {"cache": filled(1, 1, 5, 16)},
    "one row for two": lambda: {"input_ids": torch.tensor([[7], [8]])},
    "two rows for one": lambda: {"cache": filled(2, 2, 5, 16)},
    "lengths": lambda: {"cache": filled(1, 2, 5, 16, odd=(1, 2, 1, 16))},
}


@pytest.mark.parametrize("call", CALLS)
def test_odd_calls_are_as_on_the_reference_path(channel_hat, call):
    """The same results, or the same error."""
    hat, found = channel_hat, []
    for context in (hat.engine, hat.reference):
        given = {"input_ids": torch.tensor([[7]]), "cache": filled(1, 2, 5, 16), "use_cache": True} | CALLS[call]()
        with hat.at(0.5, 0.0), context():
            try:
                out = hat.lm(**given)
                found.append((list(out), out.logits.shape, given["cache"].get_seq_length(), out.logits))
            except Exception as error:
                found.append((f"{type(error).__name__}: {error}", torch.zeros(1)))
    assert found[0][:-1] == found[1][:-1]
    close(found[0][-1], found[1][-1])


@pytest.mark.slow
def test_without_numba_everything_works():
    script = Path(__file__).parents[1] / "without_numba.py"
    here = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, env=here)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["texts"] == [greedy(skipping(grain)) for grain in GRAINS]
    (why,) = set(found["decoding"])
    assert why.startswith("reference path (numba cannot be used here (ModuleNotFoundError: ")
    assert any(why in line for line in found["report"])


CHANGES = {
    "weight": lambda hat: hat.lm.model.layers[1].mlp.up_proj.weight.data.mul_(1.5),
    "rotary": lambda hat: hat.lm.model.rotary_emb.inv_freq.mul_(2),
    "parameter": lambda hat: setattr(
        hat.lm.model.layers[1].mlp.up_proj, "weight", torch.nn.Parameter(2 * hat.lm.model.layers[1].mlp.up_proj.weight)
    ),
    "head": lambda hat: setattr(hat.lm.lm_head, "weight", torch.nn.Parameter(2 * hat.lm.lm_head.weight)),
    "routers": lambda hat: [p.data.add_(0.3) for p in hat.hat_parameters().values()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed(hat, ids, change):
    before = stepwise(hat, ids)
    CHANGES[change](hat)
    warned = pytest.warns(UserWarning, match="changed under the model")
    with warned if change in ("weight", "parameter", "head") else nullcontext():
        after = stepwise(hat, ids)
    assert float((after - before).abs().max()) > 1e-2
    with hat.reference():
        close(after, stepwise(hat, ids))
    assert hat.base.fingerprint == fingerprint(hat.lm)


@pytest.mark.parametrize("form, size", [("int8", 0.4), ("q4", 0.25)])
def test_weights_in_fewer_bits(channel_hat, ids, form, size):
    hat = channel_hat
    assert hat.packed_bytes == 0
    before = stepwise(hat, ids)
    full = hat.packed_bytes
    with hat.changed(weight_format=form):
        assert hat.decoding.startswith(f"engine ({form}, ") and not torch.equal(stepwise(hat, ids), before)
    assert torch.equal(stepwise(hat, ids), before)
    hat.weight_format = form
    stepwise(hat, ids)
    assert 0 < hat.packed_bytes < size * full


def test_q4_is_near_the_file_s_own_numbers(bundled):
    for name, layer, own, read in packed_and_read(bundled.model):
        assert float((own - read).norm() / own.norm()) < 0.01, (name, layer)


def test_weight_format_that_is_unknown_or_does_not_fit(channel_hat, monkeypatch):
    with pytest.raises(HatError, match="int3"):
        channel_hat.weight_format = "int3"
    monkeypatch.setattr(channel_hat.lm.model.layers[0].mlp.up_proj, "out_features", 150)
    with pytest.raises(HatError, match="up_proj"):
        channel_hat.weight_format = "q4"
    assert channel_hat.weight_format == "base"


@every_family
@pytest.mark.parametrize("form", [*WEIGHT_FORMATS, "bfloat16"])
def test_rows_alone_and_tokens_in_pieces_give_the_same_bits(hat, ids, form):
    if form == "bfloat16":
        hat.to(torch.bfloat16)
    else:
        hat.weight_format = form
    together, ours = states(hat, ids)
    for r in range(3):
        alone, own = states(hat, ids[r : r + 1])
        assert torch.equal(alone[0], together[r])
        assert torch.equal(type(own[0]).cat(own).site_share[..., 0, :], type(ours[0]).cat(ours).site_share[..., r, :])
    cache = DynamicCache(config=hat.lm.config)
    with hat.collect() as found, hat.engine():
        pieces = [hat.lm(piece, cache=cache, use_cache=True).logits for piece in ids[:1].split(7, dim=1)]
    assert torch.equal(torch.cat(pieces, 1), together[:1]) and all(s.executed is not None for s in found)


def test_copy_goes_on_and_unloading_leaves_nothing(hat, ids):
    twin, expected = copy.deepcopy(hat), stepwise(hat, ids)
    base = hat.unload()
    assert hat.packed_bytes == 0 and not {"forward", "generate"} & set(vars(base.model))
    assert all(on_engine(twin, ids))
    close(stepwise(twin, ids), expected)
