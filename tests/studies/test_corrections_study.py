"""`corrections` on `random:tiny`: what a run trains, and at which work it is compared."""

import numpy as np
import pandas as pd
import pytest

from hat_lib.backbone.base import load_base
from hat_lib.config import HatError
from hat_lib.training.run import nominal_thresholds
from studies import corrections
from studies.corrections import CAPACITIES, MEASURED, SHOWN, Change


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corrections, "START_TOKENS", 2048)
        patch.setattr(corrections, "PROBE_TOKENS", 256)
        yield


@pytest.mark.slow
def test_a_run_trains_what_it_says():
    how = {"base": "random:tiny", "steps": 2, "tokens": 1024, "changes": ["untrained", "on addresses"]}
    rows = list(corrections.rows({("untrained", "news", CAPACITIES[0])}, **how))
    keys = [(r.change, r.text, r.capacity) for r in rows]
    every = [(name, text, c) for name in how["changes"] for text, _ in MEASURED for c in CAPACITIES]
    assert keys == [key for key in every if key != ("untrained", "news", CAPACITIES[0])]
    for r in rows:
        assert r.realised == pytest.approx(r.capacity, abs=0.1) and r.kl > 0
        assert (r.steps, r.parameters > 0) == ((0, False) if r.change == "untrained" else (2, True))
    before, after = ({(r.text, r.capacity): r.kl for r in rows if r.change == name} for name in how["changes"])
    assert all(before[key] != after[key] for key in before)


@pytest.mark.slow
def test_a_learned_split_is_measured():
    change = Change("split", None, "addresses", split_lr=0.5)
    hat = corrections._started(load_base("random:tiny", dtype="fp32"), change, {})
    nominal, learned = nominal_thresholds(hat), corrections._train(hat, change, 2)
    for capacity, moved in ((0.5, True), (0.9, False)):
        assert (learned(capacity) != nominal(capacity)) == moved
    calibrated, split = (
        next(corrections._on_text(hat, change, 2, t, *MEASURED[1], (0.5,), 1024)) for t in (nominal, learned)
    )
    assert calibrated.kl != split.kl
    routers = sum(p.numel() for n, p in hat.routers.named_parameters() if "_token" not in n)
    assert split.parameters == routers + 3 * hat.config.n_layers * len(hat.grain.sites)


def test_runs_are_read_at_the_work_of_the_first(tmp_path):
    def kl(share):
        return np.exp(1 - 8 * share)

    runs = {"untrained": (0.0, 1.0), "rank 4": (0.03, 0.8)}  # how much more it executes, its KL at equal work
    table = [
        {"change": name, "text": text, "capacity": c, "realised": c + more, "kl": better * kl(c + more), "increase": 0}
        for name, (more, better) in runs.items()
        for text, _ in MEASURED
        for c in CAPACITIES
    ]
    pd.DataFrame(table).to_csv(tmp_path / "corrections.csv", index=False)
    read = corrections.shown(tmp_path)
    assert len(read) == 2 * len(MEASURED) * len(SHOWN)
    for name, (_, better) in runs.items():
        rows = read[read["change"] == name]
        np.testing.assert_allclose(rows["kl"], better * kl(rows["capacity"]), rtol=1e-9)


def test_an_unknown_change_is_refused_before_anything_is_loaded():
    with pytest.raises(HatError, match="changes must be among untrained, .* got 'rank 3'"):
        next(corrections.rows(base="nowhere", changes=["rank 3"]))
