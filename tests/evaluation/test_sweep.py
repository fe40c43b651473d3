"""`sweep`: each row is what `score_each` and `compare` give, from one pass over the base."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_runs
import torch

from hat_lib.config import HatError
from hat_lib.evaluation.choices import Random
from hat_lib.evaluation.perplexity import compare, score_each
from hat_lib.evaluation.sweep import sweep
from hat_lib.text.blocks import load_text

pytestmark = pytest.mark.filterwarnings("ignore:token grain")
BLOCKS = tiny_runs.random_blocks(6, 40, seed=4)


@pytest.fixture(scope="module", params=tiny_runs.GRAINS)
def hat(request):
    return tiny_runs.adaptive(request.param)


def test_rows_are_those_of_each_capacity_alone(hat):
    before = hat.capacity, hat.exit_rate
    with hat.collect() as forwards:
        found = sweep(hat, BLOCKS, (0.5, 1.0), exit_rate=0.2, batch_size=6, progress=False)
    assert len(forwards) == 3 and (hat.capacity, hat.exit_rate) == before
    rows = [{"input_ids": ids, "n_context": 0} for ids in BLOCKS]
    for row in found.frame.itertuples():
        with hat.at(row.capacity, 0.2):
            base, (alone,) = score_each(hat, rows, batch_size=6, progress=False)
        versus = compare(base, alone)
        assert (row.realised, row.exit_rate, row.model_share) == (alone.capacity, alone.exit_rate, alone.model_share)
        assert (row.perplexity, row.increase) == (alone.perplexity, versus.increase)
        assert (row.increase_low, row.increase_high) == (versus.low, versus.high)
        assert (row.kl, row.top1) == (alone.kl, alone.top1)
    for shown in (str(found), found._repr_html_()):
        assert "234 scored tokens in 6 blocks" in shown and all(column in shown for column in found.frame)


def test_text_is_a_name_a_text_texts_or_blocks(hat, tmp_path):
    path = tiny_runs.page(tmp_path)
    how = {"block_size": 32, "max_tokens": 256, "progress": False, "split": "train"}
    named = load_text(path, hat.base.tokenizer, split="train", block_size=32, max_tokens=256)
    ids = [row["input_ids"] for row in named]
    text = hat.base.tokenizer.decode([i for block in ids for i in block])
    texts = [hat.base.tokenizer.decode(block) for block in ids]
    for one, given in ((named, (path, str(path), text, [text])), (ids, (texts,))):  # of one document, and of many
        expected = sweep(hat, one, [0.7], **how)
        assert expected.frame.notna().all(axis=None) and "in 8 blocks" in expected.heading
        for other in given:
            assert sweep(hat, other, [0.7], **how).frame.equals(expected.frame)


def test_all_of_a_file_is_measured_unless_it_was_trained_on(hat, tmp_path, monkeypatch):
    path = tiny_runs.page(tmp_path)
    whole, test = (len(load_text(path, hat.base.tokenizer, split=s, block_size=16)) for s in ("all", "test"))
    how = {"block_size": 16, "batch_size": 16, "max_tokens": 10_000, "progress": False}
    assert f"in {whole} blocks" in sweep(hat, path, [1.0], **how).heading
    found, other = (
        replace(hat.calibration, text=f"{path}, validation split, 9 tokens"),
        {"recipe": {"text": "addresses"}},
    )
    for name, value in (("training_summary", {"recipe": {"text": f"addresses+{path}"}}), ("calibration", found),
                        ("training_summary", {"routers": {"text": f"addresses+{path}"}, **other})):  # fmt: skip
        with monkeypatch.context() as patch:  # the last two: gates trained on another text than routers
            patch.setattr(hat, "training_summary", other)
            patch.setattr(hat, name, value)
            assert f"in {test} blocks" in sweep(hat, path, [1.0], **how).heading


def test_a_policy_of_ones_own_beside_others_at_its_work(hat):
    def mine(layer, site, x, rows, trace):
        """The largest half of the channels; whether the first input is positive."""
        size = x.abs()
        return size >= size.median(1, keepdim=True).values if trace.mask_shapes[site] else x[:, 0] > 0

    text, how = tiny_runs.random_blocks(8, 64, seed=4), {"exit_rate": 0.2, "batch_size": 8, "progress": False}
    policies = {"mine": mine, "nothing": Random(0.0)}
    with pytest.warns(UserWarning, match="no row for method at the work of nothing"):
        found = sweep(hat, text, (0.7,), policies=policies, **how).frame.set_index("decides")
    assert found.index.tolist() == ["method", "mine", "random at mine", "method at mine", "nothing"]
    with hat.dense(), hat.using(mine), torch.no_grad():
        hat.lm(torch.tensor(text))
    own = found.loc["mine"]
    assert own["realised"] == pytest.approx(hat.trace.capacity, abs=1e-6) and own["exit_rate"] == 0
    assert np.isnan(own["capacity"]) and 0.3 < own["realised"] < 0.7
    for other in ("random at mine", "method at mine"):
        assert found.loc[other, "capacity"] == own["realised"]
        assert found.loc[other, "model_share"] == pytest.approx(own["model_share"], abs=0.004)
    assert found["kl"].nunique() == 5
    assert sweep(hat, text, (0.7,), **how).frame.equals(found.reset_index()[:1])


@pytest.mark.parametrize(
    ("text", "how"),
    [
        (BLOCKS, {"capacities": 2}),
        (BLOCKS, {"capacities": ()}),
        (BLOCKS, {"exit_rate": -1}),
        ("nowhere.txt", {}),
        ("my notes.md", {}),
        (["a text", "\udfff"], {}),
        ("some words", {"max_tokens": 1}),
        ([], {}),
        (BLOCKS, {"policies": Random(0.5)}),
        (BLOCKS, {"policies": {"mine": 0.5}}),
        (BLOCKS, {"policies": {"mine": Random}}),
        (BLOCKS, {"policies": {"method": Random(0.5)}}),
        (BLOCKS[:4], {"policies": {"mine": Random(0.5)}}),
    ],
)
def test_refuses_before_anything_runs(hat, monkeypatch, text, how):
    monkeypatch.setattr(hat.lm.model, "forward", None)
    before = hat.capacity, hat.exit_rate
    with pytest.raises(HatError):
        sweep(hat, text, progress=False, **how)
    with hat.using(Random(0.5)), pytest.raises(HatError, match="using"):
        sweep(hat, BLOCKS)
    assert (hat.capacity, hat.exit_rate) == before
