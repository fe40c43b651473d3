"""At a given time of a token, what costs least? ``data/results/frontier.csv``.

Every way to decode the bundled base that its user has, in one run. Prices are on pieces of three texts, against the
base in fp32: in one forward where weights are the base's, which decides the same, and token by token where the engine
has them in fewer bits. Times are of the same pieces, in turns, a new piece in each round. llama.cpp takes part if
llama-cpp-python is installed (``pip install "hat-workbook[peers]"``, which takes minutes to compile).
"""

import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import DynamicCache

from hat_lib.base.families import linear_work
from hat_lib.base.load import BUNDLED, load_base
from hat_lib.config import HatConfig, HatError, check_capacity, check_count
from hat_lib.decoding.speculation import Speculation
from hat_lib.decoding.speed import now, take_turns
from hat_lib.evaluation.controls import layer_damage, turned, under
from hat_lib.evaluation.perplexity import Score, compare
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import state_cost
from hat_lib.method.trace import Trace
from hat_lib.text.blocks import load_text
from hat_lib.text.blocks import spread as evenly
from studies.alternatives import llama_files, llama_logits, llama_ms, magnitudes, teal, without
from studies.common import (
    CHECKPOINTS,
    FORMATS,
    Machine,
    machine,
    markdown,
    over_dense,
    ratios,
    rounded,
    saved,
    spread,
    times,
)
from studies.plotting import speed
from studies.plotting.findings import increase_text
from studies.prompts import whole_blocks
from studies.quality import MANY
from studies.timing import CONTEXT, decode_ms, plain_copy

ABOUT = "a way to decode the bundled base: its time, and its price on three texts"
MINUTES = 20
KEY = ("way", "weights", "capacity")
WAYS = {"engine": "our engine", "teal": "TEAL", "removal": "layers removed", "drafts": "self-speculation",
        "hf": "plain transformers", "llama.cpp": "llama.cpp"}  # fmt: skip
TEXTS, BLOCK = tuple(MANY), 256
READ_FIRST = 32  # tokens of a block, which are not scored
BESIDE = ("bfloat16", "q4")  # formats of the rivals in our engine
KINDS = ("Q3_K_M", "Q2_K")
SEARCHED = 512  # tokens of validation text, for TEAL and for the order in which layers go


@dataclass(frozen=True)
class Row(Machine):
    way: str  # of `WAYS`
    weights: str  # of `FORMATS`, or a kind of llama.cpp's
    capacity: float  # requested; of "teal" that whose work it does, of "removal" the share of layers that stay
    timed: float | None  # share of the whole model's work, of the timed tokens
    scored: float | None  # and of the scored ones
    ms: float  # a token: the median, the fastest and the slowest round
    low: float
    high: float
    over_dense: float | None  # over our own dense path in the same format, paired by round: median, lowest, highest
    over_dense_low: float | None
    over_dense_high: float | None
    over_hf: float  # over plain transformers, in fp32 or bf16
    mib: float | None  # of llama.cpp's file
    kl: float  # KL(base || way), nats a token: on the text where it is largest
    addresses: float  # increase in perplexity over the base's in fp32, with its 95 % paired interval
    addresses_low: float | None
    addresses_high: float | None
    docstrings: float
    docstrings_low: float | None
    docstrings_high: float | None
    encyclopedia: float
    encyclopedia_low: float | None
    encyclopedia_high: float | None
    tokens: int  # of each text
    steps: int
    rounds: int


@dataclass(kw_only=True)
class Engine:
    """A setting of a model in our engine."""

    name: str
    weights: str
    capacity: float
    hat: HierarchicalTransformer
    around: Callable  # makes the context of the setting
    size: float = 1.0  # of the model's dense work, as a share of the base's
    traces: list[Trace] = field(default_factory=list)  # of what was timed
    times: list[float] = field(default_factory=list)

    def once(self, ids: Tensor, steps: int) -> float:
        """Milliseconds a token, over ``steps`` of ``ids [1, T]``."""
        with self.hat.changed(weight_format=FORMATS[self.weights][1]), self.around(), self.hat.collect() as states:
            ms = decode_ms(self.hat, ids, steps, CONTEXT)
        self.traces.append(states[-1])
        return ms

    @torch.inference_mode()
    def predict(self, ids: Tensor) -> tuple[Tensor, float]:
        """Log-probabilities of what follows each of ``ids [B, T]``, fp32 ``[B, T, V]``; share of the base's work."""
        hat, form = self.hat, FORMATS[self.weights][1]
        with hat.changed(weight_format=form), self.around(), hat.engine(), hat.collect() as states:
            if form == "base":
                parts, along = [hat.lm(row).logits.float().log_softmax(-1) for row in ids.split(1)], 0
            else:
                cache, along = DynamicCache(config=hat.lm.config), 1
                parts = [hat.lm(token, cache=cache, use_cache=True).logits.log_softmax(-1) for token in ids.split(1, 1)]
                states = [Trace.cat(states)]
        return torch.cat(parts, along), self.share(states, READ_FIRST - 1)

    def share(self, traces: Sequence[Trace], first: int = 0) -> float:
        """The share of the base's work that tokens ran, from the ``first`` of each trace."""
        costs = [state_cost(self.hat, trace) for trace in traces]
        sums = [[float(part[:, first:].sum()) for part in (cost.executed, cost.dense)] for cost in costs]
        executed, dense = np.sum(sums, axis=0)
        return self.size * executed / dense


@dataclass(kw_only=True)
class Plain:
    """Plain transformers."""

    name: str = "hf"
    weights: str
    capacity: float = 1.0
    lm: torch.nn.Module
    around: Callable = torch.inference_mode
    times: list[float] = field(default_factory=list)

    def once(self, ids: Tensor, steps: int) -> float:
        return decode_ms(self.lm, ids, steps, CONTEXT)

    @torch.inference_mode()
    def predict(self, ids: Tensor) -> tuple[Tensor, None]:
        return torch.cat([self.lm(row).logits.float().log_softmax(-1) for row in ids.split(1)]), None


@dataclass(kw_only=True)
class Drafts(Plain):
    """The base's own text, drafted by our engine in four bits."""

    name: str = "drafts"
    hat: HierarchicalTransformer

    def once(self, ids: Tensor, steps: int) -> float:
        how, seconds = {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1}, []
        with self.hat.at(self.capacity, 0.0), self.hat.changed(weight_format="q4"):
            for count in (1, 1 + steps):
                began = now(self.hat)
                self.hat.lm.generate(
                    ids[:, :CONTEXT], max_new_tokens=count, custom_generate=Speculation(self.hat), **how
                )
                seconds.append(now(self.hat) - began)
        return 1e3 * (seconds[1] - seconds[0]) / steps


@dataclass(kw_only=True)
class Llama:
    """llama.cpp on a file, in a process of its own: in ours it died of an illegal instruction."""

    name: str = "llama.cpp"
    weights: str
    capacity: float = 1.0
    path: Path
    mib: float
    process: ProcessPoolExecutor
    around: Callable = nullcontext
    times: list[float] = field(default_factory=list)

    def once(self, ids: Tensor, steps: int) -> float:
        return self._run(llama_ms, ids[0].tolist(), CONTEXT, steps)

    def predict(self, ids: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(self._run(llama_logits, ids.tolist())).log_softmax(-1), None

    def _run(self, what: Callable, *given):
        return self.process.submit(what, self.path, torch.get_num_threads(), *given).result()


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    capacities: Sequence[float] = (1.0, 0.9, 0.7, 0.55, 0.4),
    beside: Sequence[float] = (0.7, 0.55, 0.4),
    removed: Sequence[int] = (1, 2, 4),
    tokens: int = 1_536,
    steps: int = 32,
    rounds: int = 6,
) -> Iterator[Row]:
    """All rows; none if some are done, as times are comparable within one run.

    At ``beside`` TEAL does the same work; ``removed`` are numbers of layers; ``tokens`` are read of each text's test
    split.
    """
    if done:
        return
    asked = [1.0, *(check_capacity(c) for c in dict.fromkeys([*capacities, *beside]) if c != 1)]
    check_count("tokens", tokens, 2 * BLOCK)
    hats = {dtype: HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype) for dtype in ("fp32", "bf16")}
    hat = hats["fp32"]
    if hat.config.granularity != "channel" or not hat.decoding.startswith("engine"):
        got = f"{hat.config.granularity}, {hat.decoding}"
        raise HatError(f"{checkpoint}: expected the channel grain, decoded by the engine, got {got}")
    for count in removed:
        check_count("removed", count, 1, hat.config.n_layers - 1)
    texts = {text: whole_blocks(text, hat.base.tokenizer, tokens, BLOCK, READ_FIRST) for text in TEXTS}
    ids = {text: torch.tensor(blocks["input_ids"]) for text, blocks in texts.items()}
    plain = {name: Plain(weights=name, lm=plain_copy(hats[FORMATS[name][0]])) for name in ("float32", "bfloat16")}
    base = {text: plain["float32"].predict(ids[text])[0] for text in TEXTS}
    priced = partial(_priced, texts=texts, ids=ids, base=base)
    ours = [
        Engine(name="engine", weights=weights, capacity=c, hat=hats[dtype], around=partial(hats[dtype].at, c, 0.0))
        for weights, (dtype, _) in FORMATS.items()
        for c in asked
    ]
    found = [(way, priced(way)) for way in ours]
    wanted = {way.capacity: price["scored"] for way, price in found if way.weights == "float32"}
    held_out = load_text("addresses", hat.base.tokenizer, split="validation", block_size=BLOCK)
    held_out = evenly(held_out, SEARCHED)
    sample = [block.tolist() for text in TEXTS for block in ids[text][:2]]
    others = [*_removals(hat, held_out, removed), *_teals(hat, held_out, sample, {c: wanted[c] for c in beside})]
    others += [Drafts(weights="float32", capacity=c, hat=hat, lm=plain["float32"].lm) for c in (1.0, 0.75)]
    pieces = [ids[TEXTS[k % len(TEXTS)]][[k % len(ids[TEXTS[0]])]] for k in range(rounds + 1)]  # the first to warm up
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as process:
        for kind, path in (llama_files(Path(folder), KINDS) if hat.base.name == BUNDLED else {}).items():
            others.append(Llama(weights=kind, path=path, mib=path.stat().st_size / 2**20, process=process))
        found += [(way, priced(way)) for way in [*plain.values(), *others]]
        ways = [way for way, _ in found]
        take_turns(ways, lambda way: way.once(pieces[len(way.times)], steps), rounds)
    for way, price in found:
        about = {"steps": steps, "rounds": rounds, "tokens": ids[TEXTS[0]].numel()}
        yield _row(getattr(way, "hat", hat), way, ways, price | about)


def _priced(way, texts: dict, ids: dict, base: dict) -> dict:
    """The columns of a price."""
    columns, kl, shares = {}, [], []
    for text, blocks in texts.items():
        predicted, share = way.predict(ids[text])
        scores = [_score(p, ids[text], blocks) for p in (base[text], predicted)]
        columns |= compare(*scores).ends(text)
        pair = (p[:, READ_FIRST - 1 : -1] for p in (predicted, base[text]))
        kl.append(float(kl_div(*pair, reduction="sum", log_target=True)) / scores[0].tokens.sum())
        shares.append(share)
    return columns | {"kl": max(kl), "scored": None if None in shares else statistics.mean(shares)}


def _score(predicted: Tensor, ids: Tensor, blocks: Dataset) -> Score:
    nll = -predicted[:, READ_FIRST - 1 : -1].gather(-1, ids[:, READ_FIRST:, None])[..., 0].double().sum(1)
    return Score(nll.numpy(), np.full(len(ids), ids.shape[1] - READ_FIRST), blocks["doc"])


def _removals(hat: HierarchicalTransformer, blocks: Dataset, removed: Sequence[int]) -> Iterator[Engine]:
    """The base without the layers whose removal, one by one, changes it least."""
    damage, dense = layer_damage(hat, blocks), _weights(hat)
    order = sorted(damage, key=damage.get)
    for count, weights in ((k, w) for k in removed for w in BESIDE):
        base = without(load_base(hat.base.name, dtype=FORMATS[weights][0]), order[:count])
        less = HierarchicalTransformer(base, HatConfig.default(base, exit_layers=()))
        capacity = round(1 - count / hat.config.n_layers, 4)
        yield Engine(name="removal", weights=weights, capacity=capacity, hat=less, around=less.dense,
                     size=_weights(less) / dense)  # fmt: skip


def _weights(hat: HierarchicalTransformer) -> int:
    return hat.config.n_layers * sum(linear_work(hat.lm.config).values()) + hat.lm.lm_head.weight.numel()


def _teals(hat: HierarchicalTransformer, blocks: Dataset, sample: list, wanted: dict[float, float]) -> Iterator[Engine]:
    """TEAL where it does the ``wanted`` share of the whole model's work on a sample, by capacity."""
    models = {w: magnitudes(load_base(hat.base.name, dtype=FORMATS[w][0])) for w in BESIDE}
    exact = magnitudes(load_base(hat.base.name, dtype=hat.base.dtype))
    cuts = teal(exact, torch.tensor([row for row in blocks["input_ids"] if len(row) == BLOCK]))

    def around(model: HierarchicalTransformer, share: float) -> Callable:
        return under(model, model.threshold_policy(cuts(share)))

    for capacity, work in wanted.items():
        share = turned(exact, partial(around, exact), sample, work, which=2)
        for weights, model in models.items():
            yield Engine(name="teal", weights=weights, capacity=capacity, hat=model, around=around(model, share))


def _row(hat: HierarchicalTransformer, way, ways: Sequence, columns: dict) -> Row:
    dtype = "bfloat16" if way.weights == "bfloat16" else "float32"
    (hf,) = (w for w in ways if (w.name, w.weights) == ("hf", dtype))
    columns |= {"way": way.name, "weights": way.weights, "capacity": way.capacity, "mib": getattr(way, "mib", None)}
    columns |= spread(way.times) | {"over_hf": statistics.median(ratios(hf.times, way.times)), "timed": None}
    columns |= dict.fromkeys(("over_dense", "over_dense_low", "over_dense_high"))
    if isinstance(way, Engine):
        (dense,) = (w for w in ways if (w.name, w.weights, w.capacity) == ("engine", way.weights, 1.0))
        columns |= over_dense(dense.times, way.times) | {"timed": way.share(way.traces[1:])}
    return rounded(Row, KEY, **machine(hat.base) | columns | {"dtype": dtype})


def figures(results: Path | None = None) -> dict:
    return {"frontier": speed.frontier(saved("frontier", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["way", "weights", "capacity", "work, timed / scored", "ms a token", "over our own dense path",
              "over plain transformers", "KL, worst text", *TEXTS]  # fmt: skip
    lines, table = {}, saved("frontier", results)
    for row in table.to_dict("records"):
        share = None if pd.isna(row["timed"]) else f"{row['timed']:.3f} / {row['scored']:.3f}"
        over = f"{times(row['over_dense'])} ({row['over_dense_low']:.2f} to {row['over_dense_high']:.2f})"
        line = [WAYS[row["way"]], row["weights"], f"{row['capacity']:.2f}", share]
        line += [f"{row['ms']:.1f} ({row['low']:.1f} to {row['high']:.1f})", over if share else None]
        line += [times(row["over_hf"]), f"{row['kl']:.4f}", *(increase_text(row, text) for text in TEXTS)]
        lines[tuple(row[key] for key in KEY)] = line
    best = [lines[tuple(row[key] for key in KEY)] for row in cheapest(table).to_dict("records")]
    return {"frontier": markdown(header, lines.values()), "frontier_best": markdown(header, best)}


def cheapest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows than which none is both faster and nearer to the base by KL, the fastest first."""
    table = table.sort_values(["ms", "kl"])
    return table[table["kl"] < table["kl"].cummin().shift(fill_value=np.inf)]
