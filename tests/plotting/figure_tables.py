"""A table for every figure, small enough to know where each point has to be."""

import numpy as np
import pandas as pd

from hat_lib.plotting import frontier, routing, style, training
from studies.plotting import divergence, findings, speed

BASES, TEXTS = ("bundled", "random:tinyllama"), ("addresses", "docstrings")


def costs(rows, spread=0.1):
    """A table of increases, each with an interval of ``spread`` times its value on either side."""
    table = pd.DataFrame(rows)
    low, high = ((1 + sign * spread) * table["increase"] for sign in (-1, 1))
    return table.assign(increase_low=low, increase_high=high)


def quality(grains=("channel", "token")):
    rows = []
    for grain in grains:
        for text in TEXTS:
            base = {"granularity": grain, "text": text, "exit_rate": 0.0, "tokens": 4000}
            for capacity, increase in ((0.9, 0.005), (0.65, 0.055), (0.4, 0.5), (0.2, 2.0)):
                increase *= 1 if grain == "channel" else 100
                for variant, times in (("trained", 1), ("untrained", 2), ("random", 9)):
                    at = {"variant": variant, "capacity": capacity, "realised": capacity - 0.01}
                    rows.append(base | at | {"increase": times * increase, "model_share": capacity + 0.05})
            for variant, increase in (("trained", 0.3), ("random_exits", 0.6)):
                at = {"variant": variant, "capacity": 1.0, "realised": 1.0, "exit_rate": 0.1, "model_share": 0.97}
                rows.append(base | at | {"increase": increase})
    return costs(rows)


def divergences():
    return quality().assign(kl=lambda table: table["increase"] / 2)


def published():
    return quality(["token"]).query("capacity in (0.9, 0.4)").assign(increase=0.8, increase_low=0.7, increase_high=0.9)


def claims():
    rows = []
    for base in BASES:
        for grain, cost in (("channel", 0.02), ("token", 3.0)):
            for capacity, rate, promised in (
                (0.9, 0.0, (1.1, 0.01)),
                (0.4, 0.0, (1.8, 0.12)),
                (0.75, 0.1, (None,) * 2),
            ):
                row = {"base": base, "granularity": grain, "capacity": capacity, "exit_rate": rate}
                row |= dict(zip(("promised_speedup", "promised_increase"), promised, strict=True))
                row |= {"realised": capacity - 0.02, "model_share": capacity + 0.05, "ideal_decode": 1 / capacity}
                row |= {"decode_dense": 0.9 / capacity, "decode_hf": 2 / capacity, "prefill_dense": 0.8 / capacity}
                known = cost / capacity**4 if base == "bundled" else np.nan
                rows.append(row | {"docstrings": known, "docstrings_low": 0.8 * known, "docstrings_high": 1.3 * known})
    return pd.DataFrame(rows).astype({"promised_speedup": float, "promised_increase": float})


def decoding():
    rows = []
    for base, dense in zip(BASES, (14.0, 70.0), strict=True):
        for way, weights, ms in (("hf", "bfloat16", 3 * dense), ("llama.cpp", "q4_1", dense / 2)):
            rows.append({"base": base, "way": way, "weights": weights, "realised": 1.0, "ms": ms, "ideal": np.nan})
        for weights, share in (("bfloat16", 1.0), ("int8", 0.7)):
            for capacity in (1.0, 0.6, 0.4):
                row = {"base": base, "way": "engine", "weights": weights, "realised": capacity, "ideal": 1 / capacity}
                rows.append(row | {"ms": dense * share * (0.1 + 0.9 * capacity)})
    table = pd.DataFrame(rows)
    return table.assign(low=0.9 * table["ms"], high=1.2 * table["ms"])


def token_time():
    parts = ("qkv", "o", "gate_up", "down", "head", "rest", "loop")
    rows = [("hf", part, 1.0, 4.0, -9.0, 20.0) for part in parts]
    rows += [("dense", part, 1.0, 1.5, 0.5, 2.0) for part in parts]
    rows += [("adaptive", part, 0.55, 0.9, 0.1, 3.0) for part in parts]
    rows += [("adaptive", "decisions", 0.55, -0.02, -0.3, 0.2)]
    return pd.DataFrame(rows, columns=["way", "part", "realised", "ms", "low", "high"])


def targets():
    names = ["granularity", "versus", "requested", "reachable", "largest", "measured", "lowest", "highest", "prompts"]
    rows = [
        ("channel", "dense", 0.9, True, 0.9, 0.91, 0.85, 0.95, 10),
        ("channel", "dense", 1.1, False, 0.9, np.nan, np.nan, np.nan, 0),
        ("token", "dense", 1.1, True, 1.6, 1.12, 1.05, 1.2, 10),
    ]
    return pd.DataFrame(rows, columns=names)


def lossless():
    one = {"granularity": "channel", "capacity": 0.5, "accepted": 8, "ideal": 1.1, "ms_hf": 30.0, "ms_dense": 15.0}
    rows = []
    for dtype in ("bfloat16", "float32"):
        for i in range(12):
            more = {"dtype": dtype, "kind": "code" if i % 2 else "list", "drafted": 10 + i, "ms_lossless": 20.0 + i}
            rows.append(one | more | {"ms_early_exit": 40.0 if i < 4 else np.nan})
    return pd.DataFrame(rows)


def exits():
    rows = [(0.1, 22, 0.1), (0.1, 30, 0.9), (0.3, 16, 0.1), (0.3, 22, 0.2), (0.3, 30, 0.7)]
    return pd.DataFrame(rows, columns=["exit_rate", "layers", "share"])


def benchmark():
    rows = [
        {"base": base, "device": "cpu", "dtype": "bfloat16", "threads": 2, "granularity": grain, "phase": phase}
        | {"batch": batch, "realised": c, "ideal": 1 / c, "speedup_hf": 1.1 / c, "speedup_dense": 0.9 / c}
        for base in BASES
        for grain in ("channel", "token")
        for phase, batch in (("decode", 1), ("prefill", 1), ("decode", 8))
        for c in (1.0, 0.75, 0.5)
    ]
    return pd.DataFrame(rows)


def weight_shares():
    return pd.DataFrame({"base": ["a", "b"], "ffn": [0.6, 0.7], "attention": [0.2, 0.2], "head": [0.2, 0.1]})


def skipped_ffn():
    return pd.DataFrame({"layer": [1, 2, 3], "ratio": [1.1, 2.5, 0.99], "low": [1, 2, 0.9], "high": [1.2, 3, 1.1]})


def grain_frontier():
    points = {"method": ["x", "x", "y"], "work": [0.9, 0.6, 0.7], "increase": [-0.004, 0.06, 40.0]}
    return pd.DataFrame(points | {"low": [-0.01, 0.03, 30.0], "high": [0.002, 0.1, 60.0]})


def sweep():
    points = [(0.4, 0.42, 0.3, 0.2, 0.4, 0.8), (0.9, 0.88, 0.01, np.nan, np.nan, 0.9)]
    return pd.DataFrame(points, columns=["capacity", "realised", *style.COST, "top1"])


def measured(keys, left=0.0):
    """Share and exits of the groups ``keys``: the first clearly below the mean, the second not, the third above."""

    def intervals(means, differences, half=0.02):
        means, differences = np.array(means), np.array(differences, dtype=float)
        table = pd.DataFrame({"mean": means, "low": means - half, "high": means + half})
        bounds = {"difference_low": differences - half, "difference_high": differences + half}
        return table.assign(difference=np.nan_to_num(differences), **bounds)

    share = intervals([0.5, 0.59, 0.7], [-0.1, -0.01, 0.1])
    early = intervals([left, 1.2 * left, left], [0.0, 0.02, np.nan])  # nan: no interval
    return pd.concat([keys.assign(measure="share").join(share), keys.assign(measure="left").join(early)])


def classes(left=0.0):
    return measured(pd.DataFrame({"class": ["space", "digits", "name"], "tokens": [10, 2000, 3]}), left)


def positions(left=0.0):
    keys = {"first": [0, 2, 4], "last": [1, 3, 7], "protected": [True, False, False]}
    return measured(pd.DataFrame(keys), left)


def quantiles(left=0.0):
    names = [f"{name}_of_{which}" for name in ("surprisal", "entropy") for which in ("token", "next")]
    parts = [measured(pd.DataFrame({"quantity": name, "median": [0.1, 2.0, 6.0]}), left) for name in names]
    return pd.concat(parts, ignore_index=True)


def layer_map(exits=(4, 2, 4), texts=(" the", "🦙", "\n")):
    layer, token = (grid.ravel() for grid in np.meshgrid(range(4), range(3), indexing="xy"))
    table = pd.DataFrame({"token": token, "text": np.array(texts)[token], "exit_layer": np.array(exits)[token]})
    share = np.where(layer < table["exit_layer"], 0.2 * layer + 0.1 * token, np.nan)
    return table.assign(layer=layer, share=share, difference=share - 0.4)


def sensitivity():
    table = pd.DataFrame({"first": [0, 0, 2, 2], "last": [1, 1, 3, 3], "forecast": [0.5, 2.0, 0.4, 3.0]})
    return table.assign(mean=[0.6, 1.8, 0.5, 2.0], low=[0.5, 1.6, 0.4, 1.5], high=[0.7, 2.1, 0.6, 2.5])


def scores():
    return pd.DataFrame({"score": np.r_[0.0, np.geomspace(0.01, 5, 200)]})


def thresholds():
    return pd.DataFrame({"capacity": [0.9, 0.7, 0.4], "threshold": [0.1, 0.5, 2.0], "share": [0.6, 0.4, 0.2]})


def changes():
    runs = [("untrained", 0.3), ("rank 1", 0.28), ("rank 4", 0.27)]
    rows = [(change, text, c, kl / c) for change, kl in runs for text in ("addresses", "news") for c in (0.6, 0.5)]
    return pd.DataFrame(rows, columns=["change", "text", "capacity", "kl"])


def curve():
    table = pd.DataFrame({"tokens": [0, 0, 1024, 1024], "capacity": [0.75, 0.4, 0.75, 0.4]})
    return table.assign(kl=[0.01, 0.8, 0.012, 0.5], increase=[0.01, 1.1, 0.0, 0.6], share=[0.8, 0.45, 0.8, 0.45])


def router_log(granularity="token", steps=12):
    step = np.arange(1, steps + 1)
    table = pd.DataFrame({"granularity": granularity, "step": step, "steps": steps, "kl": 2 / step, "capacity": 0.6})
    sites = {f"share_{s}": 0.6 if granularity == "channel" else np.nan for s in training.SITES}
    return table.assign(share=0.62, **sites, **{f"share_{i}": 0.5 + 0.1 * i for i in range(4)})


def gate_log(granularity="token", steps=12):
    step = np.arange(1, steps + 1)
    table = pd.DataFrame({"granularity": granularity, "step": step, "steps": steps, "kl": 9 / step, "gate_loss": 0.6})
    return table.assign(agreement=0.2, exit_rate=0.3)


def both(log):
    return lambda: pd.concat([log("channel"), log("token")])


def rates():
    grains = ["channel", "token"] * 3
    return pd.DataFrame({"granularity": grains, "exit_rate": [0.1, 0.1, 0.5, 0.5, 1, 1], "agreement": 0.5})


def depths():
    return pd.DataFrame({"reader": ["lens"] * 3 + ["ours"] * 2, "depth": [1, 2, 3, 1, 3], "agreement": 0.3})


FIGURES = {
    style.weight_shares: (weight_shares,),
    style.skipped_ffn: (skipped_ffn,),
    style.grain_frontier: (grain_frontier,),
    style.benchmark: (benchmark,),
    frontier.quality: (quality,),
    divergence.divergence: (divergences,),
    frontier.sweep: (sweep,),
    divergence.changes: (changes,),
    findings.promised: (quality, published, claims),
    findings.speeds: (claims,),
    findings.exits: (quality,),
    speed.decode: (decoding,),
    speed.targets: (targets,),
    speed.lossless: (lossless,),
    speed.work_and_time: (claims,),
    speed.promise: (claims,),
    speed.exits: (exits,),
    routing.layer_map: (layer_map,),
    routing.by_class: (classes,),
    speed.token_time: (token_time,),
    routing.by_position: (positions,),
    routing.by_quantile: (quantiles,),
    routing.by_sensitivity: (sensitivity,),
    routing.score_histogram: (scores, thresholds),
    training.routers: (router_log,),
    training.gates: (gate_log,),
    training.reference_routers: (both(router_log),),
    training.reference_gates: (both(gate_log), rates),
    training.exit_depths: (depths,),
    training.learning_curve: (curve,),
}
"""figure -> the function that makes its tables"""


def drawn(figure):
    return figure(*(make() for make in FIGURES[figure]))
