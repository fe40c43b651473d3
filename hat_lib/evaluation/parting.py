"""Where the engine and the reference path part: they round differently, so a channel whose score lies within rounding
of its threshold may be kept by one alone, and from there on states differ by more than rounding::

    print(first_difference(hat, hat.lm.generate(ids, max_new_tokens=40), ids.shape[1]))
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hat_lib.config import HatError, check_count
from hat_lib.hat import HierarchicalTransformer


@dataclass(frozen=True)
class Difference:
    """One decision, by the reference path's numbers."""

    token: int  #: which of the new tokens was read, from 0
    text: str
    layer: int
    site: str  #: of the grain; "exit" for the gate before the layer
    channel: int | None  #: None for an exit, or for a whole FFN
    score: float
    threshold: float

    @property
    def distance(self) -> float:
        """Of the score from its threshold, relative to that."""
        return abs(self.score - self.threshold) / max(abs(self.threshold), 1e-30)

    def __str__(self) -> str:
        channel = "" if self.channel is None else f", channel {self.channel}"
        numbers = f"score {self.score:.8g}, threshold {self.threshold:.8g}, {self.distance:.1e} apart"
        return f"new token {self.token} {self.text!r}, layer {self.layer}, {self.site}{channel}: {numbers}"


@torch.inference_mode()
def first_difference(hat: HierarchicalTransformer, ids: Tensor, prompt_length: int) -> Difference | None:
    """The first decision, as ``hat`` is set, that differs while both paths read a text, int64 ``[1, T]``, as generate
    does: the prompt in full, then token by token, the last one not at all. None if nothing differs.

    The engine says how many channels a site kept, not which. Of those that may have tipped (kept on the side that kept
    more), the one named has the score nearest its threshold; a distance far beyond rounding says that something else
    came before. Not seen: flips at one site that cancel in the count, until they tip another; decisions of the head.
    Thresholds stand still, also where they are steered. `HatError` where the engine does not run.
    """
    if not hat.decoding.startswith("engine") or hat.weight_format != "base":
        raise HatError(f"two paths on the base's own weights are compared, hat.decoding says: {hat.decoding}")
    if ids.dtype != torch.int64 or ids.dim() != 2 or len(ids) != 1:
        raise HatError(f"expected one text, int64 [1, T], got {ids.dtype} {list(ids.shape)}")
    check_count("prompt_length", prompt_length, 1, ids.shape[1] - 2)
    caches, new = [DynamicCache(config=hat.lm.config) for _ in range(2)], ids[:, prompt_length:-1]
    for cache in caches:
        with hat.reference(), hat.dense():
            hat.lm(ids[:, :prompt_length], cache=cache, use_cache=True, logits_to_keep=1)
    with hat.changed(gain=0.0):
        hat.replay(new, caches[0])
    engine, thresholds, seen = hat.trace, hat.new_forward().setting.thresholds, {}
    sites, units = list(hat.mask_shapes), torch.tensor([prod(shape) for shape in hat.mask_shapes.values()])

    def decide(layer, site, x, rows, trace):
        keep = hat.keeps(layer, site, x)
        seen[layer, site] = hat.scores(layer, site, x), keep, float(thresholds.site[layer, sites.index(site)])
        return keep

    def leave(depth, h, rows, trace):
        score, threshold = hat.gates[str(depth)].score(h), float(thresholds.exit[[*hat.gates].index(str(depth))])
        seen[depth, "exit"] = score, score > threshold, threshold
        return score > threshold

    for t, token in enumerate(new.split(1, dim=1)):
        with hat.reference(), hat.using(decide, leave):
            hat.lm(token, cache=caches[1], use_cache=True, logits_to_keep=1)
        left = sorted((int(hat.trace.exit_layer), int(engine.exit_layer[0, t])))
        more = ((hat.trace.site_share[:, :, 0, 0] - engine.site_share[:, :, 0, t]) * units).round()
        places = [(layer, sites[site]) for layer, site in more[: left[0]].nonzero().tolist()]
        places += [(left[0], "exit")] * (left[0] < left[1])
        if places:
            (layer, site), (scores, keep, threshold) = places[0], seen[places[0]]
            kept_more = site in sites and bool(more[layer, sites.index(site)] > 0)
            away = (scores - threshold).abs().where(keep == kept_more, torch.inf)[0]
            channel = int(away.argmin()) if away.dim() else None
            score = float(scores[0] if channel is None else scores[0, channel])
            return Difference(t, hat.base.tokenizer.decode(token[0]), layer, site, channel, score, threshold)
    return None
