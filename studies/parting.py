"""How often do the engine and the reference path part? ``data/results/parting.csv``.

Both continue the same prompts greedily, as many at a time as the engine takes. Then the reference path reads the
engine's texts token by token, so that what the two keep compares after the same tokens, also beyond a parting. As a
measure of rounding alone, the reference path also continues each prompt by itself.
"""

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from hat_lib.base.load import parse_dtype
from hat_lib.config import HatError, check_capacity, check_count
from hat_lib.engine.arrays import MAX_TOKENS
from hat_lib.hat import HierarchicalTransformer
from studies.common import CHECKPOINTS, Machine, machine, markdown, rounded, saved
from studies.prompts import prompts

ABOUT = "a dtype and a capacity: how often the engine's greedy text parts from the reference path's"
MINUTES = 12
KEY = ("dtype", "capacity")


@dataclass(frozen=True)
class Row(Machine):
    capacity: float  # requested
    realised: float  # by the engine's new tokens
    texts: int
    tokens: int  # new ones that were read, in all texts: all but the last of each
    parted: int  # texts
    reference_parted: int  # texts of the reference path that part from its own, written one at a time
    parted_at: float | None  # new tokens before the first that differs, median over the texts that part
    token_share: float  # of the tokens, those at which some site keeps another number of channels
    decision_share: float  # of the decisions, those that differ at least: flips that cancel in a count are not seen
    distance: float | None  # of a score from its threshold, relative, at a text's first difference: the largest of all


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    capacities: Sequence[float] = (1.0, 0.8, 0.7, 0.55, 0.4),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    count: int = 16,
    max_new_tokens: int = 40,
) -> Iterator[Row]:
    """A row for each dtype and capacity, of ``count`` prompts."""
    capacities, parsed = [check_capacity(c) for c in capacities], [parse_dtype(dtype) for dtype in dtypes]
    check_count("max_new_tokens", max_new_tokens, 2)
    for dtype in parsed:
        left = [c for c in capacities if (str(dtype).removeprefix("torch."), c) not in done]
        if not left:
            continue
        hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype, device="cpu")
        for capacity in left:
            with hat.at(capacity, 0.0):
                yield _measure(hat, count, max_new_tokens)


@torch.inference_mode()
def _measure(hat: HierarchicalTransformer, count: int, max_new_tokens: int) -> Row:
    if not hat.decoding.startswith("engine"):
        raise HatError(f"there is one path alone: {hat.decoding}")
    how = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
    parted, differ, distances, realised, reference_parted = [], [], [], [], 0
    tokens = [torch.tensor(hat.base.tokenizer(prompt.text).input_ids) for prompt in prompts(hat.base.tokenizer, count)]
    for some in range(0, count, MAX_TOKENS):
        found = tokens[some : some + MAX_TOKENS]
        ids = pad_sequence(found, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(one) for one in found], batch_first=True, padding_side="left")
        with hat.reference():
            theirs = hat.lm.generate(ids, attention_mask=mask, **how)
            alone = [hat.lm.generate(one[None], **how)[0, len(one) :] for one in found]
        pairs = zip(theirs[:, ids.shape[1] :], alone, strict=True)
        reference_parted += sum(not torch.equal(a, b) for a, b in pairs)
        texts = hat.lm.generate(ids, attention_mask=mask, **how)
        parted += [int(row.nonzero()[0]) - ids.shape[1] for row in texts != theirs if row.any()]
        realised.append(hat.trace.capacity)
        more, first = _differences(hat, texts, mask, hat.trace.site_share)
        differ.append(more)
        distances += first.values()
    differ, units = torch.cat(differ, dim=2), sum(map(prod, hat.mask_shapes.values()))
    return rounded(
        Row, **machine(hat.base), capacity=hat.capacity, realised=statistics.mean(realised), texts=count,
        tokens=differ[0, 0].numel(), parted=len(parted), reference_parted=reference_parted,
        parted_at=statistics.median(map(float, parted or [torch.nan])),
        token_share=float((differ > 0).any(0).any(0).double().mean()),
        decision_share=float(differ.sum()) / differ[:, 0].numel() / units, distance=max(distances, default=None),
    )  # fmt: skip


def _differences(
    hat: HierarchicalTransformer, texts: Tensor, mask: Tensor, shares: Tensor
) -> tuple[Tensor, Mapping[int, float]]:
    """By how many channels the reference path's counts differ from the engine's ``shares [L, S, B, T]``, as it reads
    the same ``texts`` after prompts of this ``mask``: ``[L, S, B, T]``; and by text, if it has one, at its first
    difference, the relative distance from the threshold of the farthest score that must have tipped."""
    sites, widths = list(hat.mask_shapes), torch.tensor([prod(shape) for shape in hat.mask_shapes.values()])
    thresholds, scores, first, found = hat.calibration.thresholds_at(hat.capacity), {}, {}, []
    engine, prompt, cache = (shares * widths[:, None, None]).round(), mask.shape[1], DynamicCache(config=hat.lm.config)

    def watch(layer, site, x, rows, trace):
        scores[layer, site] = hat.scores(layer, site, x)
        return hat.keeps(layer, site, x)

    mask = torch.cat([mask, mask.new_ones(len(texts), shares.shape[-1])], dim=1)
    position = (mask.cumsum(1) - 1).clamp(min=0)

    def read(part: slice) -> None:
        given = {"attention_mask": mask[:, : part.stop], "position_ids": position[:, part]}
        hat.lm(texts[:, part], cache=cache, use_cache=True, logits_to_keep=1, **given)

    with hat.reference():
        with hat.dense():
            read(slice(0, prompt))
        for t in range(shares.shape[-1]):
            with hat.using(watch):
                read(slice(prompt + t, prompt + t + 1))
            more = (hat.trace.site_share[..., 0] * widths[:, None]).round() - engine[..., t]
            for text in set(range(len(texts))) - first.keys():
                if len(places := more[..., text].nonzero()):
                    layer, site = places[0].tolist()
                    count, threshold = int(more[layer, site, text]), thresholds[layer, sites[site]]
                    score = scores[layer, sites[site]][text]
                    near = ((score - threshold) / threshold).abs()[(score > threshold) == (count > 0)]
                    first[text] = float(near.sort().values[abs(count) - 1])
            found.append(more.abs())
    return torch.stack(found, dim=-1), first


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["dtype", "capacity", "texts that part", "of the reference path, alone and in a batch",
              "new tokens before that, median", "tokens at which some site keeps another number",
              "decisions that differ, at least", "first of them: largest distance from its threshold"]  # fmt: skip
    lines = []
    for row in saved("parting", results).itertuples():
        at = None if row.parted_at != row.parted_at else f"{row.parted_at:.0f}"
        far = None if row.distance != row.distance else f"{row.distance:.0e}"
        shares = f"{row.token_share:.1%}", f"{row.decision_share:.1e}" if row.decision_share else "0"
        lines.append(
            [row.dtype, f"{row.capacity:.2f}", f"{row.parted} of {row.texts}", row.reference_parted, at, *shares, far]
        )
    return {"parting": markdown(header, lines)}
