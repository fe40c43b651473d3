"""Controls: what simpler choices of the same size keep, to hold the method against.

A router is worth something only if it beats these at equal realised work. Each control is a policy for
``with hat.using(policy):``, so it differs from the method in nothing but its decisions; protected tokens and
layer 0's FFN (token grain) run as ever. `CONTROLS` has them under one signature:

    random    every unit with the same probability (`random_mask`)
    static    the same channels, or the same FFNs, for every token (`static_choice`)
    cosine    a layer is skipped where it is predicted to turn the residual stream little (`cosine_rule`)
    removal   the same whole layers for every token (`layer_removal`)

and `as_in` is the method of another checkpoint, say an untrained one; `RandomExits` is the gates' control. Each is a
family with one dial, which `matched` turns until the realised capacity on a text is the requested one. On another
text it may differ, for `cosine_rule` above all: report what was realised there. Exits are off while one is built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hat_lib.config import CAPACITY_MIN, HatError
from hat_lib.evaluation.baselines.cosine_rule import cosine_rule
from hat_lib.evaluation.baselines.equal_compute import (
    Blocks,
    Family,
    for_site,
    matched,
    realised_capacity,
    text_tensors,
)
from hat_lib.evaluation.perplexity import score_each
from hat_lib.model.checkpoint import check_tensors, read_checkpoint
from hat_lib.model.policies import Policy, Random, Static, Threshold
from hat_lib.model.token_state import TokenState
from hat_lib.model.transformer import HierarchicalTransformer

# Tokens that price the removal of each layer, in blocks taken at even distances.
DAMAGE_TOKENS = 1024


# -- random and static ---------------------------------------------------------------------------------


def random_mask(hat: HierarchicalTransformer, blocks: Blocks, capacity: float, seed: int = 0) -> Policy:
    """Every unit is kept with the same probability, whatever the token: `router.Random`."""
    return matched(hat, lambda share: Random(share, seed), blocks, capacity)


@torch.no_grad()
def static_choice(hat: HierarchicalTransformer, blocks: Blocks, capacity: float, seed: int = 0) -> Policy:
    """The method without its choice per token.

    Channel grain: in each site the channels whose score has the largest root mean square on ``blocks``; how many
    is the method's own allocation, ``hat.calibration.shares_at``. The scores are the routers' as they are, trained or
    not. Token grain: FFNs to drop for every token, see `layer_removal`. The best static choice at a capacity is the
    better of the two.
    """
    if hat.config.granularity == "token":
        return layer_removal(hat, blocks, capacity, seed)
    if hat.calibration is None:
        raise HatError("the static choice takes its shares from a calibration: run `hat calibrate` first")
    texts, energy = text_tensors(hat, blocks), {}

    def watch(layer, site, x, rows, state):
        squares = hat.routers[f"{layer}_{site}"].score(x[~state.protected.view(-1)]).double().square().sum(0)
        energy[layer, site] = energy.get((layer, site), 0) + squares

    realised_capacity(hat, watch, texts)
    ranked = {key: squares.argsort(descending=True, stable=True) for key, squares in energy.items()}

    def family(dial: float) -> Policy:
        shares, keep = hat.calibration.shares_at(max(dial, CAPACITY_MIN)), {}
        for (layer, site), order in ranked.items():
            count = round(float(shares[layer, hat.grain.sites.index(site)]) * len(order))
            keep[layer, site] = torch.zeros(len(order), dtype=torch.bool, device=order.device)
            keep[layer, site][order[:count]] = True
        return Static(keep)

    return matched(hat, family, texts, capacity)


# -- whole layers --------------------------------------------------------------------------------------


class Layers:
    """Whole layers: ``share[layer]`` of the tokens, drawn at random, run all sites of that layer; default all."""

    def __init__(self, share: Mapping[int, float], seed: int = 0):
        self.draw = {layer: Random(s, seed) for layer, s in share.items() if s < 1}

    def __call__(self, layer, site, x, rows, state):
        if layer not in self.draw:
            return None
        keep = self.draw[layer](layer, "ffn", x, rows, state)  # one draw a token, the same at every site
        return for_site(keep, site, x)


def layer_removal(hat: HierarchicalTransformer, blocks: Blocks, capacity: float, seed: int = 0) -> Policy:
    """The routable work of whole layers is skipped for every token: the FFN, or all four sites (channel grain).

    Greedy: layers go in the order of their `layer_damage`, cheapest first, which does not see that two layers
    may stand in for one another. A layer is a coarse unit, so the last one to go is skipped for a random part of the
    tokens, such that the work is the requested one. At the channel grain a token that skips a layer
    leaves K and V of zero there.
    """
    texts = text_tensors(hat, blocks)
    order = sorted((cost, layer) for layer, cost in layer_damage(hat, texts).items())

    def family(dial: float) -> Policy:
        skipped = (1 - dial) * len(order)
        return Layers({layer: max(0.0, 1 - (skipped - i)) for i, (_, layer) in enumerate(order) if i < skipped}, seed)

    return matched(hat, family, texts, capacity)


_DAMAGE: WeakKeyDictionary[HierarchicalTransformer, dict] = WeakKeyDictionary()


def layer_damage(hat: HierarchicalTransformer, blocks: Blocks) -> dict[int, float]:
    """KL(base || base without that layer's routable work), nats per token, for each layer that can be skipped.

    A pass a layer, and one of the base, over about `DAMAGE_TOKENS` tokens of ``blocks``. No router has a part in it, so
    the numbers are kept for as long as ``hat`` is, and serve every capacity.
    """
    texts = text_tensors(hat, blocks)
    rows = [{"input_ids": t[0].tolist(), "n_context": 0} for t in texts]
    rows = rows[:: max(1, sum(t.shape[1] for t in texts) // DAMAGE_TOKENS)]
    known, key = _DAMAGE.setdefault(hat, {}), (hat.base.dtype, str(rows))
    if key not in known:
        layers = range(hat.config.granularity == "token", hat.config.n_layers)  # layer 0's FFN always runs
        with hat.dense():
            without = [partial(hat.using, Layers({layer: 0.0})) for layer in layers]
            _, scores = score_each(hat, rows, without, progress=False)
        known[key] = {layer: score.agreement.kl for layer, score in zip(layers, scores, strict=True)}
    return dict(known[key])


# -- another checkpoint, other exits ------------------------------------------------------------------------


def as_in(hat: HierarchicalTransformer, checkpoint: str | Path) -> Family:
    """The method as another checkpoint has it: its routers and its calibration; the untrained one above all.

    The dial is the requested capacity, from 0.1 on. ``hat`` stays as it is: each policy carries routers of its own.
    Raises `HatError` if the checkpoint cannot be read, has no calibration, or was made for another base or grain.
    """
    other = read_checkpoint(checkpoint)
    other.check_base(hat.base, checkpoint)
    if other.config.granularity != hat.config.granularity:
        raise HatError(f"{checkpoint} has the {other.config.granularity} grain, expected {hat.config.granularity}")
    if other.calibration is None:
        raise HatError(f"{checkpoint} has no calibration: make one with `hat calibrate`")
    tensors = {k.removeprefix("routers."): v for k, v in other.tensors.items() if k.startswith("routers.")}
    check_tensors(tensors, dict(hat.routers.named_parameters()), checkpoint)

    @torch.no_grad()
    def family(dial: float) -> Policy:
        routers = copy.deepcopy(hat.routers)
        for name, parameter in routers.named_parameters():
            parameter.copy_(tensors[name])
        return Threshold(routers, other.calibration.thresholds_at(max(dial, CAPACITY_MIN)))

    return family


class RandomExits:
    """Control for the gates: at depth e, each token that may leave does so with probability ``rates[e]``.

    To be put beside ``hat.gates`` at the shares of them that left there: same depths, same translators, same rates,
    other tokens.
    """

    def __init__(self, rates: Mapping[int, float], seed: int = 0):
        self.draws = {depth: Random(rate, seed + 1) for depth, rate in rates.items()}

    def exits(self, depth: int, h: Tensor, rows: Tensor, state: TokenState) -> Tensor:
        """bool ``[n]``: who of ``rows`` leaves after ``depth`` layers."""
        like = torch.empty(len(rows), 0, device=rows.device)
        return self.draws[depth](depth, "ffn", like, rows, state)


def exit_shares(states: Iterable[TokenState], depths: Iterable[int]) -> dict[int, float]:
    """Of the tokens that could leave at each depth, the share that did: the ``rates`` of `RandomExits`."""
    shares, layers = {}, [s.exit_layer[s.real & ~s.protected] for s in states]
    left = torch.cat(layers)
    for depth in depths:
        there = left >= depth
        shares[depth] = float((left == depth).sum() / there.sum().clamp(min=1))
    return shares


CONTROLS: dict[str, Callable[[HierarchicalTransformer, Blocks, float, int], Policy]] = {
    "random": random_mask,
    "static": static_choice,
    "cosine": cosine_rule,
    "removal": layer_removal,
}
