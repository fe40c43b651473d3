"""Each study on `random:tiny`, for seconds: its rows are complete, their work is as asked, and finished rows are
skipped. Nothing is asserted about speed."""

import os
import string
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_runs import GRAINS, adaptive, gating, random_blocks, skipping, tiny, untrained

from hat_lib.contexts import combined
from hat_lib.decoding.speed import SpeedCurve
from hat_lib.evaluation.perplexity import compare, score_each
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import Work
from studies import alternatives, decode, registry, self_speculative, speed_targets, tasks, token_time
from studies.prompts import whole_blocks
from studies.timing import forced

TINY = {"base": "random:tiny", "dtype": "fp32"}
ADDRESSES = (("addresses", "validation"),)
SMALL = {
    # study: (options, constants in place of its own, number of rows)
    "ablations": (
        TINY | {"tokens": 1200, "calibration_tokens": 2048},
        {"CHANGES": {"none": {}, "uniform split": {"split": "uniform"}}, "CAPACITIES": (0.6,), "MEASURED": ADDRESSES},
        2,
    ),
    "decode": (
        {"capacities": [0.5], "shape_capacities": [0.5], "rounds": 1, "steps": 2, "shape_dtype": "fp32"},
        {"BUNDLED": "random:tiny", "TIMED": ["random:tiny-qwen3"], "CONTEXT": 16}, 17,
    ),
    "frontier": (
        {"capacities": [0.7], "beside": [0.7], "removed": [1], "tokens": 128, "steps": 4, "rounds": 1},
        {"BLOCK": 64, "READ_FIRST": 8, "CONTEXT": 32, "KINDS": ()}, 16,
    ),
    "token_time": ({"capacity": 0.5, "rounds": 1, "steps": 2, "dtype": "fp32"}, {}, 22),
    "parting": ({"capacities": [0.5], "dtypes": ["fp32"], "count": 2, "max_new_tokens": 8}, {}, 1),
    "self_speculative": ({"capacities": [0.5], "dtypes": ["fp32"], "count": 2, "max_new_tokens": 8}, {}, 2),
    "answers": ({"rounds": 1, "dtype": "fp32"}, {"POINTS": ((16, 2, 0), (8, 1, 1)), "ANSWER": 6}, 12),
    "tasks": (
        {"tasks": ["copying", "arithmetic", "agreement"], "capacities": [0.6], "count": 8, "dtype": "fp32"},
        {"SHARED": 8}, 3,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for grain in GRAINS:
        adaptive(grain).save_pretrained(folder / grain)
    return {grain: folder / grain for grain in GRAINS}


LONG = ("ablations", "answers", "decode", "frontier")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in SMALL])
def test_rows(name, checkpoints, monkeypatch):
    study, (options, constants, count) = registry.load(name), SMALL[name]
    for constant, value in constants.items():
        monkeypatch.setattr(study, constant, value)
    known = registry.option_kinds(name)
    options |= {"checkpoint": checkpoints["channel"]} if "checkpoint" in known else {}
    options |= checkpoints if "token" in known else {}
    rows = list(study.rows(**options))
    assert len(rows) == count
    for row in rows:
        dtype = "bfloat16" if getattr(row, "weights", None) == "bfloat16" else "float32"
        assert row.device == "cpu" and row.dtype == dtype and row.threads >= 1 and row.cpu
        if hasattr(row, "realised"):
            assert row.realised == pytest.approx(row.capacity, abs=0.2)
    done = {tuple(getattr(row, field) for field in study.KEY): row for row in rows}
    assert list(study.rows(done, **options)) == []
    if name == "self_speculative":
        assert all(row.identical for row in rows)


def test_targets_are_refused_beyond_the_curve_and_priced_as_they_were_timed(checkpoints, monkeypatch):
    curve = SpeedCurve("dense", 0.0, [0.1, 1.0], [[1.16], [1.0]], "cpu")
    monkeypatch.setattr("hat_lib.decoding.inference.speed_curve", lambda *_, **__: curve)
    monkeypatch.setattr(speed_targets, "TEXTS", ("addresses",))
    monkeypatch.setattr(speed_targets, "BLOCK", 64)
    monkeypatch.setattr(speed_targets, "CONTEXT", 8)
    done = {("token", "float32", "dense", target) for target in (1.1, 1.16, 1.3, 1.6, 1.7, 1.8)}
    options = {"count": 1, "max_new_tokens": 6, "tokens": 192, "weights": ["float32"]}
    rows = list(speed_targets.rows(done, **checkpoints, **options))
    assert [(r.requested, r.reachable) for r in rows] == [(t, t <= 1.16) for t in (1.1, 1.16, 1.3, 1.6, 1.7, 1.8)]
    assert all(r.capacity is r.measured is r.addresses is None for r in rows if not r.reachable)
    assert rows[0].over_hf > 0 and rows[0].lowest <= rows[0].measured <= rows[0].highest
    hat = HierarchicalTransformer.from_pretrained(checkpoints["channel"], dtype="fp32")
    blocks = whole_blocks("addresses", hat.base.tokenizer, 192, 64, 8)
    steered = partial(combined, partial(hat.at, rows[0].realised_capacity, 0.0), hat.steered)
    base, scored = (speed_targets.decoded(hat, blocks, around) for around in (hat.dense, steered))
    assert rows[0].addresses == pytest.approx(compare(base, scored).increase, rel=1e-2)


# --- their parts ---


def test_about_the_share_that_was_asked_for_runs():
    hat = untrained("channel", protected_tokens=0)
    with torch.no_grad(), forced(hat, [0.6], 256)[0.6]():
        hat.lm(torch.tensor(random_blocks(2, 256)))
    assert hat.trace.capacity == pytest.approx(0.6, abs=0.1)


def test_teal_keeps_magnitudes_and_layers_go_for_good():
    hat, ids, x = alternatives.magnitudes(tiny()), torch.tensor(random_blocks(2, 256)), torch.randn(3, 64)
    cuts = alternatives.teal(hat, ids)
    torch.testing.assert_close(hat.routers["0_qkv"].score(x), x.abs())
    for share in (0.8, 0.4):
        with torch.no_grad(), hat.dense(), hat.using(hat.threshold_policy(cuts(share))):
            hat.lm(ids)
        assert hat.trace.share[:, ~hat.trace.protected].mean(1) == pytest.approx([share] * 4, abs=0.05)
    less, whole = alternatives.without(tiny(), [1, 2]).model, tiny().model
    del whole.model.layers[1:3]
    with torch.no_grad():
        assert torch.equal(*(lm(ids[:1, :8], use_cache=False).logits for lm in (less, whole)))


@pytest.mark.parametrize("make", [partial(skipping, "channel"), partial(skipping, "token"), gating])
def test_decoding_a_text_scores_it_as_one_forward_does(make):
    hat = make()
    blocks = random_blocks(3, 40, seed=1)  # in which no score is within rounding of its threshold
    rows = Dataset.from_list([{"input_ids": ids, "doc": "d", "n_context": 0} for ids in blocks])
    around = [partial(hat.at, 0.7), hat.dense]
    for at, one in zip(around, score_each(hat, rows, around, progress=False)[1], strict=True):
        found = speed_targets.decoded(hat, rows, at)
        np.testing.assert_allclose(found.nll, one.nll, rtol=1e-4)
        head = 0.01 * (hat.has_shortlist and found.capacity < 1)  # of all tokens, not of the scored ones
        for name in ("tokens", "capacity", "exit_rate", "model_share"):
            assert getattr(found, name) == pytest.approx(getattr(one, name), abs=1e-4 + head)


def test_a_format_s_ideal_is_in_the_bytes_that_it_reads():
    """Half of 1000 weights of the layers, and of 200 of the head, whose preview has four bits and all its scales."""
    dense, executed = ({"ffn": torch.tensor(2.0 * n), "head": torch.tensor(0.4 * n)} for n in (1000, 500))
    ideal = {form: decode._ideal(Work({}, executed, {}, dense), 2, form) for form in ("base", "int8", "q4")}
    scales, preview = 1000 * 3 / 32, 100 / 2 + 200 * 3 / 32
    assert ideal == {
        "base": 2.0, "int8": 1212.5 / (500 + preview), "q4": (500 + scales + 212.5) / (250 + scales + preview)
    }  # fmt: skip
    dense, executed = ({"ffn": torch.tensor(4.0 * n), "head": torch.tensor(0.8 * n)} for n in (1000, 500))
    executed["corrections"] = torch.tensor(40.0)  # ten numbers of an fp32 base, two bytes each beside fewer bits
    assert decode._ideal(Work({}, executed, {}, dense), 4, "int8") == 1212.5 / (520 + preview)


def test_parting():
    logits = [torch.tensor([[1.0, top, top - gap]]) for top, gap in [(8.0, 1.0), (3.0, 0.03125), (200.0, 1.0)]]
    base, parting = torch.tensor([1, 1, 1]), self_speculative.parting
    assert parting(base, base, logits) == (None, None)
    # A bf16 has steps of 2^-6 between 2 and 4, and of 1 between 128 and 256.
    assert parting(base, torch.tensor([1, 2, 1]), logits) == (1, 2.0)
    assert parting(base, torch.tensor([1, 1, 2]), logits) == (2, 1.0)
    assert parting(base, base[:2], logits) == parting(base[:2], base, logits) == (2, 1.0), "one ended"


def test_the_parts_of_a_token_make_the_whole():
    """Also where, without a product, the others and the head keep other shares."""
    per_share, head = np.array([2.0, 1.0, 4.0, 3.0, 2.0]), 2.0
    kept = {"dense without nothing": np.array([0.5, 0.6, 0.7, 0.4, 0.3])}
    for k, part in enumerate(token_time.LINEARS):
        kept[f"dense without {part}"] = np.where(np.arange(5) == k, 0.0, np.roll(kept["dense without nothing"], k))
    ms = {name: [float(1 + shares @ per_share)] for name, shares in kept.items()}
    ms |= {"dense": [9.0], "few words": [9.0 - head], "dense generate": [9.5]}
    found = {part: times[0] for part, times in token_time._parts("dense", ms, kept).items()}
    parts = {"qkv": 1.0, "o": 0.6, "gate_up": 2.8, "down": 1.2, "head": head}
    assert found == pytest.approx(parts | {"rest": 9.0 - sum(parts.values()), "loop": 0.5})


def test_items_of_tasks_are_what_they_say():
    for prompt, answer in tasks.items("copying", 20):
        _, shown, begun = prompt.split("\n")
        assert begun + answer == shown and len(set(shown.split())) == 8
    for prompt, answer in tasks.items("arithmetic", 20):
        assert all(eval(line.replace("=", "==")) for line in f"{prompt}{answer}".split("\n"))
    assert tasks.items("copying", 3) == tasks.items("copying", 3) != tasks.items("copying", 3, seed=1)


def test_without_skipping_a_text_goes_on_as_the_base_does(monkeypatch):
    monkeypatch.setattr(tasks, "SHARED", 8)
    hat, texts = skipping("channel"), ["one two", "three"]
    assert (tasks.shared(hat, texts, 1.0) == 1).all() and (tasks.shared(hat, texts, 0.3) < 1).any()


def test_right_is_the_share_of_likeliest_tokens():
    hat = skipping("channel")

    def likeliest(prompt):
        ids = hat.base.tokenizer(prompt, return_tensors="pt").input_ids
        return hat.base.tokenizer.decode(hat.lm(ids).logits[0, -1].argmax())

    prompt, answer = next((p, a) for p in string.ascii_letters if (a := likeliest(p)) in [*string.printable])
    other = "a" if answer != "a" else "b"
    assert tasks.right(hat, [(prompt, answer), (prompt, other)]).tolist() == [1, 0]
    assert tasks.right(hat, [(prompt, answer + "\x00")]).tolist()[0] in (0.5, 1)


SCRIPT = """
import torch
from studies.gpu.triton_product import gated_product

draw = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for channels, outputs in ((64, 128), (45, 301), (200, 7)):
        x = torch.randn(channels, generator=draw).to(dtype)
        w = torch.randn(channels, outputs, generator=draw).to(dtype)
        cut = torch.rand(channels, generator=draw) - 0.1
        for scale in (1.0, 0.5, 3.0, 1e9):
            kept = torch.where(x.float().abs() > cut * scale, x.float(), 0.0)
            expected = kept.double() @ w.double()
            found = gated_product(x, w, cut, scale)
            assert found.dtype == torch.float32
            assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max()), (dtype, channels, scale)
"""


@pytest.mark.slow
def test_the_gpu_kernel_interpreted_is_the_masked_product():
    pytest.importorskip("triton")
    # Read when triton is imported, hence a separate process.
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
