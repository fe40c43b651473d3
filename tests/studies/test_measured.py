"""Each experiment but `quality`, on `random:tiny`: rows are complete, work is forced, and finished rows are skipped.

No assertion on speed.
"""

import pytest
import torch
from tiny_runs import GRAINS, adaptive, new_hat, random_blocks

from hat_lib.backbone.machine import cpu_name
from hat_lib.config import DATA, HatConfig, HatError
from hat_lib.evaluation.decoded import score_decoded
from hat_lib.evaluation.perplexity import compare
from hat_lib.inference.speed import SpeedCurve, Variant, take_turns
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.rows import RowWriter, read_rows
from hat_lib.training.trainer import collate
from studies import (
    ablations,
    benchmark,
    published_claims,
    quality,
    registry,
    self_speculative,
    token_time,
)
from studies import speed_targets as targets
from studies import step_cost as cost
from studies.ablations import CAPACITIES, CHANGES, MEASURED
from studies.benchmark import Setting, forced, measure, ratio
from studies.layer_shares import layer_shares
from studies.published_claims import PROMISED, SETTINGS


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for grain in GRAINS:
        adaptive(grain).save_pretrained(folder / grain)
    return {grain: folder / grain for grain in GRAINS}


@pytest.fixture(scope="module")
def hat():
    return adaptive("channel")


def keys(experiment, rows):
    return [tuple(getattr(row, name) for name in experiment.KEY) for row in rows]


def write_quality(folder, points):
    """`quality.csv` with increases that identify their row."""
    template = read_rows(DATA / "results" / "quality.csv", quality.Row)[0]
    with RowWriter(folder / "quality.csv", quality.Row, quality.KEY) as writer:
        for p in points:
            n = p.capacity + (10 if p.text == "docstrings" else 0) + (100 if p.granularity == "token" else 0)
            increase = {"increase": n, "increase_low": n - 1, "increase_high": n + 1}
            writer.write(quality.Row(**vars(template) | p._asdict() | increase))


# --- benchmark ---


def test_turns_are_interleaved_and_ratios_paired():
    fake = {"a": iter([9, 2.0, 4.0, 8.0]), "b": iter([9, 1.0, 1.0, 1.0])}
    variants = [Variant(n, None, torch.inference_mode) for n in "ab"]
    take_turns(variants, lambda v: next(fake[v.name]), rounds=3)
    assert variants[0].times == [2.0, 4.0, 8.0]  # the warm-up is not counted
    assert ratio(*variants) == 4.0


def test_a_round_has_a_random_order_and_the_next_its_reverse_alike_in_every_run():
    def turns():
        order, variants = "", [Variant(n, None, torch.inference_mode) for n in "abcd"]

        def once(v):
            nonlocal order
            order += v.name
            return 1.0

        take_turns(variants, once, rounds=79)
        return [order[i : i + 4] for i in range(0, len(order), 4)]

    rounds = turns()
    assert rounds == turns() and all({*r} == {*"abcd"} for r in rounds)
    assert all(a == b[::-1] for a, b in zip(rounds[::2], rounds[1::2], strict=True))
    before_d = [r[r.index("d") - 1] for r in rounds if r[0] != "d"]
    assert all(before_d.count(name) > 10 for name in "abc")


@pytest.mark.slow
def test_forced_shares_by_phase_and_batch():
    asked = {"channel": [1.0, 0.75, 0.5], "token": [1.0, 0.75], "exits": [0.4], "batches": [1, 2]}
    how = {"base": "random:tiny", "rounds": 1, "steps": 20, "dtype": "fp32"}
    rows = list(benchmark.rows(**asked, **how))
    assert keys(benchmark, rows) == [
        *(("channel", phase, 1, c, 0.0) for phase in ("decode", "prefill") for c in asked["channel"]),
        *(("token", phase, size, *at) for phase in ("decode", "prefill") for size in (1, 2)
          for at in ((1.0, 0.0), (0.75, 0.0), (1.0, 0.4))),
    ]  # fmt: skip
    for r in rows:
        assert r.threads >= 1 and r.dtype == "float32" and r.cpu == cpu_name()
        assert r.exit_rate or abs(r.realised - r.capacity) < 0.1
        assert abs(r.realised_exit - r.exit_rate) < 0.25 and (r.realised_exit > 0) == (r.exit_rate > 0)
        assert r.ideal == pytest.approx(1.0) if (r.capacity, r.exit_rate) == (1, 0) else r.ideal > 1.05
        assert r.efficiency_hf == pytest.approx(r.speedup_hf / r.ideal, rel=1e-3)
    again = list(benchmark.rows(set(keys(benchmark, rows[:-4])), **asked, **how))
    assert keys(benchmark, again) == keys(benchmark, rows[-4:])


@pytest.mark.parametrize("grain", GRAINS)
def test_nothing_that_was_forced_stays_behind(grain):
    hat = new_hat(grain)
    ids = torch.randint(5, 250, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        around = forced(hat, [0.5], 1, 600)[0.5]
        before = hat.lm(ids[:, :60]).logits
        (row,) = measure(hat, hat.base.model, {Setting(0.5): around}, ids, phase="decode", rounds=1, steps=4)
        assert row.realised < 0.7 and torch.equal(hat.lm(ids[:, :60]).logits, before)
        assert hat.trace.capacity == 1


def test_forced_tokens_skip_exactly(tiny_base):
    hat = HierarchicalTransformer(tiny_base, HatConfig.published(tiny_base, exit_layers=(), protected_tokens=0))
    with torch.no_grad(), forced(hat, [0.5], 2, 40)[0.5]():
        hat.lm(torch.randint(5, 250, (2, 40)))
    share = hat.trace.share
    hat.unload()
    assert (share[0] == 1).all() and (share.sum(0) == 2).all()
    assert len({tuple(share[:, b, t].tolist()) for b in range(2) for t in range(40)}) == 3


# --- published_claims ---


@pytest.mark.slow
def test_claims(checkpoints, tmp_path, monkeypatch):
    texts = ("addresses", "docstrings")
    points = [quality.Point(g, text, 1, *s, "trained") for g in GRAINS for text in texts for s in SETTINGS]
    write_quality(tmp_path, points)
    monkeypatch.setattr(published_claims, "SHAPE", "random:tiny")
    rows = list(published_claims.rows(**checkpoints, results=tmp_path, dtype="fp32", rounds=1, steps=40))
    n = len(SETTINGS)
    assert [(r.capacity, r.exit_rate) for r in rows] == 4 * SETTINGS
    for r, shape in zip(rows[:n], rows[n : 2 * n], strict=True):
        assert r.addresses == r.capacity
        assert (r.docstrings_low, r.docstrings_high) == (r.capacity + 9, r.capacity + 11)
        assert shape.addresses is None, "a shape without weights has no quality"
        assert shape.realised == pytest.approx(r.realised, abs=0.05), "forced to what was realised"
        assert (shape.realised_exit > 0) == (r.exit_rate > 0)
        assert r.promised_speedup == (PROMISED[r.capacity][0] if r.exit_rate == 0 else None)
        assert min(r.decode_dense, r.decode_hf, r.prefill_dense, r.prefill_hf) > 0
    assert rows[-1].granularity == "token" and rows[2 * n].addresses == 100.9
    (tmp_path / "quality.csv").unlink()
    write_quality(tmp_path, points[:4])
    with pytest.raises(HatError, match="run `python -m studies quality` first"):
        next(published_claims.rows(results=tmp_path))


# --- speed_targets, self_speculative ---


def test_targets(checkpoints, monkeypatch):
    curve = SpeedCurve("dense", 0.0, [0.1, 1.0], [1.16, 1.0], "cpu")
    monkeypatch.setattr("hat_lib.inference.generate.speed_curve", lambda *_, **__: curve)
    monkeypatch.setattr(targets, "TEXTS", ("addresses", "docstrings"))
    monkeypatch.setattr(targets, "BLOCK", 64)
    done = {("token", "dense", target) for target in (1.16, 1.3, 1.6, 1.7, 1.8)}
    how = {"dtype": "fp32", "count": 2, "max_new_tokens": 6, "tokens": 384}
    rows = list(targets.rows(done, **checkpoints, **how))
    expected = [("channel", target, target <= 1.16) for target in (1.1, 1.16, 1.3, 1.6, 1.7, 1.8)]
    assert [(r.granularity, r.requested, r.reachable) for r in rows] == [*expected, ("token", 1.1, True)]
    promised, largest, *beyond, token = rows
    for r in (promised, largest, token):
        assert r.predicted == pytest.approx(r.requested, abs=1e-3) and r.lowest <= r.measured <= r.highest
        assert r.over_hf > 0 and abs(r.realised_capacity - r.capacity) < 0.3
    assert promised.docstrings_low < promised.docstrings < promised.docstrings_high and promised.tokens == 6 * 63
    for r in (largest, token):
        assert (r.docstrings, r.docstrings_realised, r.tokens) == (None, None, 0), "no claim for it, or for this grain"
    hat = HierarchicalTransformer.from_pretrained(checkpoints["channel"], dtype="fp32")
    blocks = targets.whole_blocks("addresses", hat.base.tokenizer, 384)
    with hat.at(curve.capacity_for(1.1), 0.0), hat.steered():
        base, (adapted,) = score_decoded(hat, blocks, progress=False)
    assert promised.addresses == pytest.approx(compare(base, adapted).increase, rel=1e-2), "priced as it was timed"
    assert promised.addresses_realised == pytest.approx(adapted.capacity, abs=1e-4)
    for r in beyond:
        assert r.requested > r.largest == 1.16 and r.capacity is r.measured is r.over_hf is None


def test_self_speculative_text_is_the_base_s(checkpoints):
    how = {"checkpoint": checkpoints["channel"], "capacity": 0.5, "weights": "int8"}
    how |= {"dtypes": ["fp32"], "max_new_tokens": 8, "rounds": 2}
    rows = list(self_speculative.rows(count=5, **how))
    assert [r.prompt for r in rows] == list(range(5)) and all(r.identical for r in rows)
    assert all(r.new_tokens == r.accepted + r.passes for r in rows if r.new_tokens == 8)
    assert all(min(r.ms_hf, r.ms_dense, r.ms_lossless, r.ms_early_exit) > 0 for r in rows)
    for r in rows:  # rounded
        assert r.rounds == 2 and r.over_dense_low <= 1.0001 * r.ms_dense / r.ms_lossless <= 1.0002 * r.over_dense_high
    more = list(self_speculative.rows(set(keys(self_speculative, rows)), count=7, **how))
    assert [(r.prompt, r.ms_early_exit) for r in more] == [(5, None), (6, None)]
    (once,) = self_speculative.rows(count=1, **how | {"rounds": 1})
    assert (once.over_dense_low, once.over_dense_high, once.rounds) == (None, None, 1)


def test_where_two_texts_part():
    logits = [torch.tensor([[1.0, top, top - gap]]) for top, gap in [(8.0, 1.0), (3.0, 0.03125), (200.0, 1.0)]]
    base, parting = torch.tensor([1, 1, 1]), self_speculative.parting
    assert parting(base, base, logits) == (None, None)
    # A bf16 has steps of 2^-6 between 2 and 4, and of 1 between 128 and 256.
    assert parting(base, torch.tensor([1, 2, 1]), logits) == (1, 2.0)
    assert parting(base, torch.tensor([1, 1, 2]), logits) == (2, 1.0)
    assert parting(base, base[:2], logits) == parting(base[:2], base, logits) == (2, 1.0), "one ended"


# --- token_time ---


def test_the_parts_of_a_step_make_the_whole(checkpoints):
    how = {"checkpoint": checkpoints["channel"], "capacity": 0.5, "rounds": 1, "steps": 4, "dtype": "fp32"}
    rows = list(token_time.rows({("hf", "qkv")}, **how))
    parts = {way: [r.part for r in rows if r.way == way] for way in token_time.WAYS}
    assert parts["adaptive"] == list(token_time.PARTS) and "decisions" not in parts["dense"]
    assert parts["hf"] == [part for part in parts["dense"] if part != "qkv"]
    assert [r.realised for r in rows if r.way == "dense"] == [1.0] * len(parts["dense"])
    assert rows[-1].realised == pytest.approx(0.5, abs=0.2)
    assert list(token_time.rows({("hf", "qkv"), *keys(token_time, rows)}, checkpoint="nowhere")) == []
    with pytest.raises(HatError, match="has the token grain, expected channel"):
        next(token_time.rows(**how | {"checkpoint": checkpoints["token"]}))
    ms = {"dense": [9.0], "dense without nothing": [10.0], "few words": [7.0], "dense generate": [9.5]}
    ms |= {f"dense without {part}": [10.0 - k] for k, part in enumerate(token_time.LINEARS)}
    found = {part: times[0] for part, times in token_time._parts("dense", ms).items()}
    assert found == {"qkv": 0.0, "o": 1.0, "gate_up": 2.0, "down": 3.0, "head": 2.0, "rest": 1.0, "loop": 0.5}


# --- layer_shares ---


def test_layer_shares_are_those_of_the_trace(hat):
    blocks = [{"input_ids": ids} for ids in (*random_blocks(1, 30), *random_blocks(1, 20, seed=1))]
    rows = layer_shares(hat, blocks, [(0.6, 0.0), (0.6, 0.5), (1.0, 0.0)])
    n = hat.config.n_layers
    assert [row.layer for row in rows] == 3 * list(range(n)) and {row.tokens for row in rows} == {50}
    expected = torch.zeros(n, dtype=torch.float64)
    with hat.at(0.6, 0.5), torch.no_grad():
        for row in blocks:
            hat.lm.model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
            expected += hat.trace.share.double().sum((1, 2))
    gated, leaving, everything = rows[:n], rows[n : 2 * n], rows[2 * n :]
    assert [row.executed for row in leaving] == pytest.approx((expected / 50).tolist(), rel=1e-4)
    entered = [row.entered for row in leaving]
    assert entered == sorted(entered, reverse=True) and entered[0] == 1 and entered[-1] < 1
    assert all(row.entered == 1 for row in gated) and all(row.executed == row.entered == 1 for row in everything)
    before = hat.capacity, hat.exit_rate
    for odd in (([], [(0.6, 0.0)]), (blocks, [(7.0, 0.0)])):
        with pytest.raises(HatError):
            layer_shares(hat, *odd)
    assert (hat.capacity, hat.exit_rate) == before


def test_layer_shares_at_the_settings_of_the_sweep(checkpoints, hat, tmp_path):
    at = [(0.5, 0.0), (1.0, 0.3)]
    write_quality(tmp_path, [quality.Point("channel", "docstrings", 4000, *setting, "trained") for setting in at])
    rows = list(registry.measure("layer_shares", tmp_path, checkpoint=checkpoints["channel"], dtype="fp32"))
    assert {(r.capacity, r.exit_rate) for r in rows} == {*at, (1.0, 0.0)}, "those of quality.csv, and the base"
    assert len(rows) == 3 * hat.config.n_layers


# --- step_cost, ablations ---


@pytest.mark.parametrize("grain", GRAINS)
def test_a_step_is_timed_and_leaves_the_model_as_it_was(grain):
    hat = new_hat(grain)
    before = {n: p.clone() for n, p in hat.hat_parameters().items()}
    batch = collate([{"input_ids": ids, "index": i} for i, ids in enumerate(random_blocks(2, 64))])
    found = cost.step_ratio(hat, batch, rounds=3)
    assert min(found.ratio, found.step_seconds, found.base_seconds) > 0
    assert (found.tokens, found.rounds, found.base, found.granularity) == (128, 3, "random:tiny", grain)
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", torch.get_num_threads())
    assert not hat.training and all(p.grad is None for p in hat.parameters())
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in hat.hat_parameters().items())


@pytest.mark.slow
def test_a_step_for_each_grain():
    rows = list(cost.rows({("token",)}, base="random:tiny", rounds=1, dtype="fp32"))
    assert [(row.granularity, row.tokens) for row in rows] == [("channel", 1024)]


@pytest.mark.slow
def test_ablations():
    how = {"base": "random:tiny", "tokens": 1200, "calibration_tokens": 2048, "dtype": "fp32"}
    rows = list(ablations.rows(**how))
    assert keys(ablations, rows) == [(c, at, text) for c in CHANGES for text, _ in MEASURED for at in CAPACITIES]
    assert all(r.realised == pytest.approx(r.capacity, abs=0.003) for r in rows)
    assert all(r.margin == 0 for r in rows[:4]) and all(r.margin != 0 for r in rows[4:])
    assert list(ablations.rows(set(keys(ablations, rows[:3])), **how)) == rows[3:]
