"""Training runs that take a second (`random:tiny`, a page of text, a dozen steps), and processes to kill."""

import copy
import csv
import json
import multiprocessing
import os
import signal
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DynamicCache

from hat_lib.base.load import fingerprint, load_base
from hat_lib.calibration.capacity import calibrate
from hat_lib.calibration.exits import calibrate_exits
from hat_lib.config import HatConfig
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.thresholds import Calibration
from hat_lib.training import trainer
from hat_lib.training.objective import nominal_thresholds
from hat_lib.training.recipe import Recipe
from hat_lib.training.run import Run
from hat_lib.training.trainer import train_phase

GRAINS = ("channel", "token")
OTHERS = ("random:tiny-mistral", "random:tiny-qwen2", "random:tiny-qwen3", "random:tiny-smollm3")
"""bases of the families other than Llama"""
KINDS = [(grain, "random:tiny") for grain in GRAINS]
PHASES = ("routers", "exit")


def every_family(but=()):
    """Runs a test for each of `KINDS` and, slowly, for the channel grain of each other family, with its ``hat``."""
    others = [pytest.param(("channel", name), marks=pytest.mark.slow) for name in OTHERS if name not in but]
    return pytest.mark.parametrize("hat", [*KINDS, *others], ids=" ".join, indirect=True)


def page(folder: Path) -> Path:
    """A text file of about 90 blocks of 64 tokens, five of them in its validation split."""
    path = folder / "page.txt"
    path.write_text(" ".join(f"Line {i}: the {i % 7} quick brown foxes jump over {i}." for i in range(120)))
    return path


def recipe(grain: str, **changes) -> Recipe:
    of_grain = Recipe.published if grain == "token" else Recipe.channel
    tiny = {"tokens": 1024, "block_size": 64, "batch_size": 2, "exit_tokens": 16, "log_steps": 1, "save_steps": 4}
    return of_grain("quick", **{**tiny, **changes})


def tiny_run(grain: str, text: Path, phase: str = "full", steps: int = 10, start=None, **changes) -> Run:
    start = start and str(start)
    return Run(phase, grain, "random:tiny", recipe(grain, text=str(text), **changes), "fp32", start, max_steps=steps)


def random_blocks(n: int = 16, length: int = 32, seed: int = 0) -> list[list[int]]:
    return torch.randint(5, 250, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


def rows(blocks: list[list[int]]) -> Dataset:
    return Dataset.from_list([{"input_ids": ids, "index": i} for i, ids in enumerate(blocks)])


def tiny(dtype=torch.float32, name="random:tiny"):
    """A separate tiny base."""
    return load_base(name, dtype=dtype, device="cpu")


def untrained(grain: str = "channel", base=None, **changes) -> HierarchicalTransformer:
    """Not calibrated; on its own base if none is given."""
    base = base or tiny()
    return HierarchicalTransformer(base, HatConfig.default(base, granularity=grain, **changes))


def new_hat(grain: str) -> HierarchicalTransformer:
    """Untrained, on its own base, calibrated if the grain's training needs it."""
    torch.manual_seed(0)
    hat = untrained(grain)
    if grain == "channel":
        hat.calibration = _calibration()
    return hat


def peaked(dtype=torch.float32):
    """A base whose predictions are not nearly uniform."""
    base = tiny(dtype)
    base.model.model.norm.weight.mul_(4)
    return replace(base, fingerprint=fingerprint(base.model))


def active(grain, base=None, exits=(1, 2, 3)):
    """Random routers and gates, thresholds that skip about a third, exits taken by about a fifth."""
    how = {"exit_layers": exits, "bar": 0.6, "translator_rank": 2}
    return skipping(grain, base, vectors=0.3 if grain == "channel" else 1.0, **how)


def gating(base=None, threshold=6.0, margin=10.0):
    """Calibrated, with the same threshold and margin for the head at every capacity."""
    hat, made = untrained("channel", base or peaked()), new_hat("channel").calibration
    tables = {"head_thresholds": threshold, "head_margins": margin, "head_shares": 0.5}
    hat.calibration = replace(made, **{name: [x] * len(made.capacities) for name, x in tables.items()})
    return hat


@cache
def _calibration():
    return calibrate(untrained(), random_blocks(), probe_tokens=64, progress=False)


def run_phase(
    hat, folder, phase="routers", steps=6, blocks=None, resume=False, max_minutes=None, progress=False,
    validation=None, **changes,
):  # fmt: skip
    """`train_phase` on random blocks."""
    return train_phase(
        hat, rows(blocks or random_blocks()), recipe(hat.config.granularity, **changes), phase,
        nominal_thresholds(hat), Path(folder), resume=resume, max_minutes=max_minutes, max_steps=steps,
        progress=progress, validation=validation,
    )  # fmt: skip


def gradients(checkpoint: Path, phase: str, folder: Path, **changes) -> list[dict[str, torch.Tensor]]:
    """For each of four steps of a phase, all at the checkpoint's parameters, because the learning rate is 0."""
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype="fp32", device="cpu")
    steps, clip = [], trainer._clip

    def note(objective, step):
        steps.append({n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None})
        return clip(objective, step)

    fixed = {"router_lr": 0, "exit_lr": 0, "split_lr": 1e-12, "anneal": 0, "capacity": 0.55, "spread": 0.1}
    with patch.object(trainer, "_clip", note):
        run_phase(hat, folder, phase, steps=4, **fixed | changes)
    return steps


def interrupt_at(monkeypatch, *steps: tuple[str, int], by=signal.SIGINT) -> None:
    """Press Ctrl-C, or send another signal, once in each given (phase, step)."""
    left = set(steps)

    class Interrupted(trainer.Objective):
        def forward(self, *args, step, **kwargs):
            if (self.phase, step + 1) in left:
                left.remove((self.phase, step + 1))
                signal.raise_signal(by)
            return super().forward(*args, step=step, **kwargs)

    monkeypatch.setattr(trainer, "Objective", Interrupted)


# Processes. A fork server has done the imports, which take seconds, and has run nothing yet that a fork would break.

if "forkserver" in multiprocessing.get_all_start_methods():
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["hat_lib.training.run", "hat_lib.cli.app", "soak.kills"])
else:
    _context = multiprocessing.get_context("spawn")


def start(target, *args):
    process = _context.Process(target=_quietly, args=(target, *args))
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # a fork server does not get sys.path
        process.start()
    return process


def _quietly(target, *args):
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    target(*args)


def kill_at(folder: Path, event: int | None) -> None:
    """`kill -9` this very process when it touches a file in ``folder`` for the n-th time."""
    seen = 0

    def hook(name, args):
        nonlocal seen
        touches = name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if event is not None and touches and str(args[0]).startswith(str(folder)):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def adaptive(grain: str, **changes) -> HierarchicalTransformer:
    """Calibrated, including exits, on its own base; nothing trained."""
    torch.manual_seed(0)
    hat = untrained(grain, **changes)
    with torch.no_grad():  # routers and gates that tell tokens apart
        for parameter in hat.hat_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    calibrate(hat, random_blocks(), probe_tokens=128, progress=False)
    calibrate_exits(hat, random_blocks(seed=1), progress=False)
    return hat


def skipping(grain, base=None, exit_layers=(1, 2, 3), bar=3.0, vectors=0.3, **changes):
    """Random routers and gates, with thresholds that skip about a third and let about a fifth leave."""
    hat, draws = untrained(grain, base, exit_layers=exit_layers, **changes), np.random.default_rng(3)
    with torch.no_grad():
        for parameter in hat.hat_parameters().values():
            scale = 0.3 if parameter.dim() > 1 else vectors
            parameter.copy_(torch.from_numpy(np.asarray(scale * draws.normal(size=tuple(parameter.shape)))))
    scores = {}

    def watch(layer, site, x, rows, trace):
        scores[layer, site] = hat.scores(layer, site, x)

    with torch.no_grad(), hat.using(watch):
        hat.lm(torch.from_numpy(draws.integers(5, 250, (4, 32))))
    thresholds = {k: float(v.flatten().quantile(0.33)) for k, v in scores.items()}
    return decides(hat, thresholds, [bar] * len(exit_layers))


def stepwise(hat, ids):
    """Logits of a decode, on the engine unless the context says otherwise."""
    cache = DynamicCache(config=hat.lm.config)
    with hat.engine():
        return torch.cat([hat.lm(step, cache=cache, use_cache=True).logits for step in ids.split(1, dim=1)], 1)


def tune(lm, seed: int = 5):
    """``lm`` with low-rank adapters on some linear layers, the same on every call."""
    import peft  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks for a name that transformers is about to drop
        tuned = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    draws = np.random.default_rng(seed)
    for name, p in sorted(tuned.named_parameters()):
        if "lora_" in name:
            p.data = torch.from_numpy(draws.normal(size=tuple(p.shape)) * 0.1).to(p.dtype)
    return tuned


def greedy(hat, tokens: int = 16) -> list[int]:
    """What follows a prompt of random tokens."""
    return hat.lm.generate(torch.tensor(random_blocks(1)), max_new_tokens=tokens, do_sample=False)[0].tolist()


@torch.no_grad()
def same_after_saving(hat, base, folder: Path, ids) -> None:
    """At half the work, a model saved and loaded onto ``base``, and a copy, give the same logits and text."""
    hat.save_pretrained(folder)
    loaded, twin = HierarchicalTransformer.from_pretrained(folder, base), copy.deepcopy(hat)
    with hat.at(0.5), loaded.at(0.5), twin.at(0.5):
        expected = hat.lm(ids).logits
        assert torch.equal(loaded.lm(ids).logits, expected) and torch.equal(twin.lm(ids).logits, expected)
        assert greedy(hat) == greedy(loaded) == greedy(twin)


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logged_steps(folder: Path) -> list[tuple[str, int]]:
    return [(row["phase"], int(row["step"])) for row in table(folder / "log.csv")]


def decides(hat, thresholds, gates=()):
    """``hat``, set to decide by these thresholds and let tokens leave by those of ``gates``, as a calibration would."""
    sites, layers = hat.grain.sites, range(hat.config.n_layers)
    table = [[[thresholds.get((i, s), 0.0)] * 2 for s in sites] for i in layers]
    shares = [[[0.5, 1.0] for _ in sites] for _ in layers]
    more = {"exit_capacities": [1.0], "exit_rates": [[0.0, 1.0]], "exit_scores": [[list(gates)] * 2]} if gates else {}
    if hat.grain.scales_thresholds:
        more["sensitivity"] = [0.5, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the token grain's
        hat.calibration = Calibration(list(sites), [0.5, 1.0], table, shares, **more)
        hat.capacity, hat.exit_rate = 0.7, 0.2 if gates else 0.0
    return hat


def unpacked(block):
    """Header and shares of a block, the latter ``[C, T, L, S]``."""
    end = 4 + int.from_bytes(block[:4], "little")
    header = json.loads(block[4:end])
    return header, np.frombuffer(block[end:], np.uint8).reshape(header.get("shape", (0,)))
