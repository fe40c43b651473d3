"""AdaptiveInference: what is requested, what is realised, and nothing left behind."""

import math

import pytest
import torch
from tiny_runs import adaptive
from transformers import GenerationConfig, TextStreamer

from hat_lib.config import HatError
from hat_lib.decoding import inference as module
from hat_lib.decoding.inference import AdaptiveInference
from hat_lib.decoding.speed import SpeedCurve, steer_to_capacity

PROMPTS = ["The state of our union", "One", "A prompt that is longer than both of these"]


@pytest.fixture(scope="module", params=["channel", "token"])
def hat(request):
    return adaptive(request.param)


@pytest.fixture(scope="module")
def channel_hat():
    return adaptive("channel")


@pytest.fixture
def infer(hat):
    before = hat.capacity, hat.exit_rate
    yield AdaptiveInference(hat)
    assert (hat.capacity, hat.exit_rate) == before, "left as it was"


def alone(hat, prompt, n, **how):
    inputs = hat.base.tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
    return hat.lm.generate(**inputs, max_new_tokens=n, pad_token_id=hat.base.tokenizer.pad_token_id, **how)


def test_capacity(hat, infer):
    out = infer.generate(PROMPTS[0], capacity=0.6, max_new_tokens=12)
    with hat.at(0.6):
        expected = alone(hat, PROMPTS[0], 12, do_sample=False)
    assert torch.equal(out.ids, expected)
    assert out.texts == [hat.base.tokenizer.decode(expected[0, out.prompt_length :], skip_special_tokens=True)]
    assert out.requested_capacity == 0.6 and abs(out.capacity - 0.6) < 0.25 and 0 < out.model_share < 1
    assert out.realised_speedup is None and not out.speculation and math.isnan(out.acceptance)
    assert out.trace.exit_layer.tolist() == [[hat.config.n_layers] * 11]


def test_batch_is_its_rows(infer):
    """Padding never counts: shares, exits and texts of a batch are those of its rows alone."""
    together = infer.generate(PROMPTS, capacity=0.6, exit_rate=0.3, max_new_tokens=8)
    rows = [infer.generate(p, capacity=0.6, exit_rate=0.3, max_new_tokens=8) for p in PROMPTS]
    assert together.texts == [r.texts[0] for r in rows]
    assert together.new_tokens == sum(r.new_tokens for r in rows)
    depths, *others = (r.trace.exit_layer[r.trace.real].int().bincount(minlength=9) for r in (together, *rows))
    assert torch.equal(depths, sum(others)) and (depths > 0).sum() > 1
    for row, mine in zip(rows, together.token_share, strict=True):
        torch.testing.assert_close(mine[~mine.isnan()], row.token_share[0], atol=1e-5, rtol=0)
    tokens = [r.ids.shape[1] - 1 for r in rows]
    share = sum(r.model_share * n for r, n in zip(rows, tokens, strict=True)) / sum(tokens)
    assert together.model_share == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_tokens_after_the_end_of_text_do_not_count(channel_hat, monkeypatch, named):
    """The tokens are forced: one sequence ends with its third token, the other goes on to the tenth. Both are timed on
    the engine all the way, as they ran."""
    stop, words = 77, torch.arange(100, 120).view(2, 10)
    words[0, 2] = stop
    monkeypatch.setattr(channel_hat.lm.generation_config, "eos_token_id", None if named else stop)
    lengths = [len(channel_hat.base.tokenizer(p).input_ids) for p in PROMPTS[:2]]

    def force(ids, scores):
        word = words[:, ids.shape[1] - max(lengths), None]
        return torch.full_like(scores, -torch.inf).scatter(1, word, 0.0)

    how = {"logits_processor": [force], "measure": True} | ({"eos_token_id": [stop]} if named else {})
    with channel_hat.collect() as timed:
        out = AdaptiveInference(channel_hat).generate(PROMPTS[:2], capacity=0.6, max_new_tokens=10, **how)
    assert len(timed) > 5 and all(s.executed is not None for s in timed if s.start), "all but prefills"
    new = out.ids[:, out.prompt_length :]
    assert torch.equal(new[1], words[1]) and torch.equal(new[0, :3], words[0, :3]) and out.new_tokens == 3 + 10
    assert (~out.token_share.isnan()).sum(1).tolist() == [lengths[0] + 2, lengths[1] + 9]
    assert out.trace.exit_layer[out.trace.real].tolist() == [4] * (2 + 9)


@pytest.mark.parametrize("gate_prompt", [False, True])
def test_a_prompt_in_chunks_is_no_new_text(channel_hat, gate_prompt):
    infer, how = AdaptiveInference(channel_hat), {"capacity": 0.6, "max_new_tokens": 6, "gate_prompt": gate_prompt}
    for n in (1, 6):
        out = infer.generate(PROMPTS[0], prefill_chunk_size=5, **how | {"max_new_tokens": n})
        assert (out.trace is not None and int(out.trace.real.sum())) == n - 1 + gate_prompt * out.prompt_length
    assert out.token_share.shape == (1, out.prompt_length + 5)
    assert gate_prompt == (infer.generate(PROMPTS[0], **how | {"max_new_tokens": 1}).capacity < 1)


def test_beams_are_traced_along_the_chosen_one(channel_hat):
    infer = AdaptiveInference(channel_hat)
    out = infer.generate(PROMPTS[0], capacity=0.6, max_new_tokens=8, num_beams=3, gate_prompt=True)
    with channel_hat.at(0.6):
        assert torch.equal(out.ids, alone(channel_hat, PROMPTS[0], 8, num_beams=3, do_sample=False, gate_prompt=True))
        with torch.no_grad():
            channel_hat.lm.model(out.ids[:, :-1], use_cache=False)
        assert out.capacity == pytest.approx(channel_hat.trace.capacity, abs=1e-6)


def test_seed_and_streamer(channel_hat, capsys):
    infer, how = AdaptiveInference(channel_hat), {"capacity": 0.6, "max_new_tokens": 8}
    texts = [infer.generate(PROMPTS, temperature=1.0, seed=seed, **how).texts for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    out = infer.generate(PROMPTS[0], streamer=TextStreamer(channel_hat.base.tokenizer), **how)
    assert capsys.readouterr().out.strip("\n") == channel_hat.base.tokenizer.decode(out.ids[0]).strip("\n")


def test_target_speedup(hat, infer, monkeypatch):
    asked = []

    def curve(hat, versus, **how):
        asked.append((versus, how["exit_rate"], how["batch"]))
        return SpeedCurve(versus, how["exit_rate"], [0.1, 1.0], [[1.8, 1.9, 2.0], [0.9, 1.0, 1.2]], "cpu")

    monkeypatch.setattr(module, "speed_curve", curve)
    out = infer.generate(PROMPTS[:2], target_speedup=1.4, exit_rate=0.2, max_new_tokens=8)
    assert asked == [("dense", 0.2, 2)] and out.requested_capacity == pytest.approx(0.6, abs=1e-3)
    assert (out.target_speedup, out.requested_exit_rate) == (1.4, 0.2)
    assert out.predicted_range == pytest.approx((1.3, 1.5556), abs=1e-3)
    assert out.predicted_speedup == pytest.approx(1.4, abs=1e-3) and out.realised_speedup > 0
    with hat.at(out.requested_capacity, 0.2), steer_to_capacity(hat):
        steered = infer.generate(PROMPTS[:2], max_new_tokens=8)
    assert torch.equal(out.ids, steered.ids)
    torch.testing.assert_close(out.token_share, steered.token_share, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(HatError, match="at most 1.900"):
        infer.generate(PROMPTS[0], target_speedup=2.0)


def test_lossless_is_the_base_prompt_by_prompt(hat, infer):
    out = infer.generate(PROMPTS, capacity=0.5, mode="lossless", max_new_tokens=12)
    with hat.dense():
        expected = [alone(hat, p, 12, do_sample=False) for p in PROMPTS]
    decode = hat.base.tokenizer.decode
    assert out.texts == [decode(e[0, -12:], skip_special_tokens=True) for e in expected]
    assert out.new_tokens == 36 and 0 <= out.acceptance <= 1 and out.realised_speedup > 0 and out.token_share is None
    assert out.draft_share < 1 < out.model_share, "drafts ran less than dense steps, all together more"
    one = infer.generate(PROMPTS[1], mode="lossless", max_new_tokens=1, measure=False)
    assert math.isnan(one.capacity) and math.isnan(one.draft_share) and one.model_share == 1


def test_against_plain_transformers(channel_hat):
    infer = AdaptiveInference(channel_hat, "hf")
    out = infer.generate(PROMPTS[0], capacity=0.6, max_new_tokens=8, measure=True)
    assert out.realised_speedup > 0 and out.versus == "hf"
    with pytest.raises(HatError, match="both"):
        AdaptiveInference(channel_hat, "both")


WRONG = [
    {"mode": "fast"}, {"capacity": 0.05}, {"exit_rate": 2}, {"target_speedup": 0}, {"target_speedup": "fast"},
    {"target_speedup": float("nan")}, {"target_speedup": 1.1, "capacity": 0.5}, {"num_beams": 2, "mode": "lossless"},
    {"target_speedup": 1.1, "mode": "lossless"}, {"max_new_tokens": 0}, {"max_new_tokens": 10_000}, {"seed": 2**64},
    {"temperature": float("nan")}, {"return_dict_in_generate": True}, {"use_cache": False},
    {"generation_config": GenerationConfig(return_dict_in_generate=True)}, {"attention_mask": torch.ones(1, 3)},
    {"prompt_lookup_num_tokens": 2},
]  # fmt: skip
WRONG = [(PROMPTS[0], how) for how in WRONG] + [(PROMPTS, {"stop_strings": ["a"]})]
WRONG += [(prompts, {}) for prompts in ([], None, ["whole", "half \ud800"], " ", [PROMPTS[0], 3])]


@pytest.mark.parametrize(("prompts", "how"), WRONG)
def test_bad_input_before_anything_runs(channel_hat, monkeypatch, prompts, how):
    monkeypatch.setattr(channel_hat.lm, "forward", None)
    with pytest.raises(HatError):
        AdaptiveInference(channel_hat).generate(prompts, **how)


def test_chat_puts_each_prompt_into_the_template(channel_hat, monkeypatch):
    infer, tokenizer = AdaptiveInference(channel_hat), channel_hat.base.tokenizer
    with pytest.raises(HatError, match="no chat template"):
        infer.generate(PROMPTS[0], chat=True)
    template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<assistant>"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    out = infer.generate(PROMPTS, chat=True, capacity=0.6, max_new_tokens=4)
    for ids, prompt in zip(out.ids, PROMPTS, strict=True):
        turn = tokenizer(f"<user>{prompt}<assistant>", add_special_tokens=False).input_ids
        assert ids[: out.prompt_length].tolist()[-len(turn) :] == turn
