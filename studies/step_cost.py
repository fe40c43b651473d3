"""What a training step costs next to a plain forward and backward of the frozen base: ``data/results/step_cost.csv``.

One step is the teacher's pass plus the forward and backward of `hat_lib.training.objective`; beside it, transformers'
own model, cross-entropy, and the backward to the input embeddings, as far as the first router. The optimizer is left
out: what it updates is 0.01 % of the base.
"""

import statistics
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hat_lib.backbone.base import load_base
from hat_lib.calibration.capacity import calibrate
from hat_lib.config import HatConfig
from hat_lib.inference.speed import Variant, now, take_turns
from hat_lib.model.granularity import GRAINS
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.mixture import training_text
from hat_lib.training.objective import Objective
from hat_lib.training.recipe import Recipe
from hat_lib.training.run import nominal_thresholds
from hat_lib.training.trainer import collate
from studies.benchmark import plain_copy
from studies.common import Machine, machine, markdown, ratios, rounded, saved, times

ABOUT = "a training step beside a plain forward and backward"
MINUTES = 2
KEY = ("granularity",)


@dataclass(frozen=True)
class Row(Machine):
    """Medians over rounds."""

    granularity: str
    ratio: float
    step_seconds: float
    base_seconds: float
    tokens: int  # real tokens in the batch
    rounds: int


def rows(done: Collection = (), *, base: str = "bundled", rounds: int = 5, dtype: str = "bf16") -> Iterator[Row]:
    """Both grains, on two blocks of 512 tokens."""
    for granularity in GRAINS:
        if (granularity,) not in done:
            loaded = load_base(base, dtype=dtype)
            text = training_text(loaded, "addresses", 1024)
            hat = HierarchicalTransformer(loaded, HatConfig.default(loaded, granularity=granularity))
            if granularity == "channel":
                calibrate(hat, text["input_ids"], split="uniform", progress=False)
            yield step_ratio(hat, collate(list(text)), rounds)


def step_ratio(hat: HierarchicalTransformer, batch: dict[str, Tensor], rounds: int) -> Row:
    """Time a step of phase "routers" on ``batch``, at the end of its schedule, against a plain copy of the base."""
    device, plain = hat.base.device, plain_copy(hat)
    batch = {name: value.to(device) for name, value in batch.items()}
    recipe = Recipe.named("default", hat.config.granularity)
    objective = Objective(hat, recipe, "routers", nominal_thresholds(hat)).train()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=hat.base.dtype == torch.bfloat16):
            loss = objective(**batch, step=1, steps=1)["loss"]
        loss.backward()

    def forward_backward() -> None:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        embedded = plain.get_input_embeddings()(ids).detach().requires_grad_()
        labels = ids.masked_fill(mask == 0, -100)
        plain(inputs_embeds=embedded, attention_mask=mask, labels=labels, use_cache=False).loss.backward()

    def seconds(variant: Variant) -> float:
        hat.zero_grad()
        start = now(hat.lm)
        (step if variant is ours else forward_backward)()
        return now(hat.lm) - start

    ours, base = Variant("step", hat, nullcontext), Variant("base", plain, nullcontext)
    take_turns([ours, base], seconds, rounds)
    columns = machine(hat.base) | {"granularity": hat.config.granularity, "rounds": rounds}
    columns |= {"step_seconds": statistics.median(ours.times), "base_seconds": statistics.median(base.times)}
    columns["ratio"] = statistics.median(ratios(ours.times, base.times))
    return rounded(Row, **columns, tokens=int(batch["attention_mask"].sum()))


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["grain", "a training step", "plain forward and backward", "ratio", "tokens"]
    lines = []
    for r in saved("step_cost", results).itertuples():
        lines.append([r.granularity, f"{r.step_seconds:.1f} s", f"{r.base_seconds:.1f} s", times(r.ratio), r.tokens])
    return {"step_cost": markdown(header, lines)}
