"""What each layer executes at the settings of ``quality.csv``: ``data/results/layer_shares.csv``.

That file has one number for the whole model; the view of the frontier shows where in the model the work is done.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import frontier
from hat_lib.text.blocks import load_text
from studies.common import CHECKPOINTS, Machine, machine, rounded, saved

ABOUT = "what a layer executes at a setting"
MINUTES = 1
READS = ("quality",)
KEY = ("capacity", "exit_rate", "layer")


@dataclass(frozen=True)
class Row(Machine):
    capacity: float
    exit_rate: float  # both as requested
    layer: int
    executed: float  # of the layer's routable work, over all tokens
    entered: float  # share of tokens that had not left before it
    tokens: int


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    max_tokens: int = 2048,
    results: Path | None = None,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Every layer at each setting that ``quality.csv`` in ``results`` has for the channel grain on docstrings."""
    points = frontier.points(saved("quality", results))[["capacity", "exit_rate"]]
    if settings := [at for at in points.itertuples(index=False, name=None) if (*at, 0) not in done]:
        hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
        blocks = load_text("docstrings", hat.base.tokenizer, split="test", block_size=128, max_tokens=max_tokens)
        yield from layer_shares(hat, blocks, settings)


@torch.no_grad()
def layer_shares(
    hat: HierarchicalTransformer, blocks: Sequence[Mapping], settings: Iterable[tuple[float, float]]
) -> list[Row]:
    """Run ``hat`` over each row of `load_text`, one per forward, at each (capacity, exit rate)."""
    depth, rows = torch.arange(hat.config.n_layers, device=hat.lm.device)[:, None], []
    for capacity, exit_rate in settings:
        with hat.at(capacity, exit_rate), hat.collect() as traces:
            for block in blocks:
                hat.lm.model(input_ids=torch.tensor([block["input_ids"]], device=hat.lm.device), use_cache=False)
        share = torch.cat([trace.share[:, 0] for trace in traces], dim=1).double()
        entered = depth < torch.cat([trace.exit_layer[0] for trace in traces])
        setting = {"capacity": capacity, "exit_rate": exit_rate, "tokens": share.shape[1]} | machine(hat.base)
        shares = zip(share.mean(1).tolist(), entered.double().mean(1).tolist(), strict=True)
        rows += [rounded(Row, **setting, layer=i, executed=e, entered=n) for i, (e, n) in enumerate(shares)]
    return rows


def figures(results: Path | None = None) -> dict:
    return {"07_frontier": frontier.twin(saved("quality", results), saved("layer_shares", results))}
