"""Controls: simpler choices of what to skip, compared with the method at equal compute.

Each control is a family of policies with one dial, which `matched` turns until the realised capacity on a text is the
requested one. A policy runs by ``with hat.using(policy):``, so it differs from the method only in its decisions.
`CONTROLS` makes the families, from a text, `checkpoint_family` from another checkpoint. `RandomExits` is the control
for the gates.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hat_lib.calibration.quantiles import block_tensors, forwards, spread
from hat_lib.checkpoint import check_tensors, read_checkpoint
from hat_lib.config import CAPACITY_MIN, HatError, check_capacity
from hat_lib.contexts import combined
from hat_lib.evaluation.choices import Random, Static
from hat_lib.evaluation.perplexity import score_each
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import WorkTally
from hat_lib.method.setting import Policy
from hat_lib.method.trace import Trace

Blocks = Sequence[Sequence[int] | Mapping]
"""token-id lists, or rows of `load_text`; all of it is run several times: 2,000 tokens are enough"""
Family = Callable[[float], Policy]
"""a policy for each setting of a dial in [0, 1]; it keeps more as the dial rises, and everything at 1"""
Around = Callable[[], AbstractContextManager]

EQUAL = 0.003  # equal work: two shares of the work on the same text that differ by no more than this
CLOSE, STEPS = 0.001, 24  # where `turned` stops
DAMAGE_TOKENS = 1024  # of evenly spaced blocks, for pricing the removal of each layer


class OutOfReach(HatError):
    """This control cannot realise the capacity on this text: a sweep goes on, with no result in this row."""


def matched(
    hat: HierarchicalTransformer, family: Family, blocks: Blocks, capacity: float, around: Around | None = None
) -> Policy:
    """The member of ``family`` that realises ``capacity`` on ``blocks``, within 0.003, inside ``around()``.

    By default this is ``hat.dense()``, where the head is read in full and is no part of a capacity. Only the work is
    looked at, never predictions, so ``blocks`` may be the text that is measured afterwards. Raises `OutOfReach` for a
    capacity that no member comes near, and a plain `HatError` for one outside [0.1, 1] or fewer than 256 tokens.
    """
    capacity = check_capacity(capacity)
    if capacity == 1.0:
        return hat.threshold_policy({})  # keeps everything
    return family(turned(hat, lambda dial: under(hat, family(dial), around), blocks, capacity))


def turned(
    hat: HierarchicalTransformer, at: Callable[[float], Around], blocks: Blocks, wanted: float, which: int = 0
) -> float:
    """The dial in [0, 1] at which number ``which`` of `WorkTally.shares` inside ``at(dial)`` is the ``wanted`` one; it
    rises with the dial. Raises `OutOfReach` if none is within `EQUAL`."""
    low, high, found = (0.0, 0.0), (1.0, 1.0), []  # (dial, work) at both ends of the bracket, and of what was tried
    for _ in range(STEPS):
        # Where a line between the ends would cross, kept away from them so that the bracket always shrinks.
        step = float(np.clip((wanted - low[1]) / max(high[1] - low[1], 1e-9), 0.1, 0.9))
        dial = low[0] + step * (high[0] - low[0])
        found.append((dial, work_on(hat, blocks, at(dial)).shares[which]))
        low, high = (low, found[-1]) if found[-1][1] > wanted else (found[-1], high)
        if abs(found[-1][1] - wanted) <= CLOSE:
            break
    dial, nearest = min(found, key=lambda tried: abs(tried[1] - wanted))
    if abs(nearest - wanted) > EQUAL:
        nearest = f"its nearest is {nearest:.3f}, if work rises with its dial"
        raise OutOfReach(f"this control cannot do {wanted:.3f} of the work on this text: {nearest}")
    return dial


@torch.no_grad()
def work_on(hat: HierarchicalTransformer, blocks: Blocks, around: Around) -> WorkTally:
    """The work of all tokens of ``blocks`` inside ``around()``."""
    spent = WorkTally(hat)
    with around():
        logits = 0 if hat.has_shortlist and hat.capacity < 1 else 1  # all, where the head's work differs by token
        for _ in forwards(hat, block_tensors(hat, blocks), logits=logits):
            spent.add(hat.trace)
    return spent


def under(hat: HierarchicalTransformer, policy: Policy, around: Around | None = None) -> Around:
    """Makes the context in which a policy decides inside ``around()``; by default alone, with the head in full."""
    return partial(combined, around or hat.dense, partial(hat.using, policy))


def own_choice(hat: HierarchicalTransformer) -> Family:
    """The method's own decisions; the dial is the requested capacity."""
    return lambda dial: hat.threshold_policy(hat.calibration.thresholds_at(max(dial, CAPACITY_MIN)))


def _for_site(keep: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A decision per row, ``[n]``, for all units of a site, whose number is ``shape``."""
    return keep.view(-1, *[1] * len(shape)).expand(-1, *shape)


def random_mask(hat: HierarchicalTransformer, blocks: Blocks, seed: int = 0) -> Family:
    """Every unit is kept with the same probability, whatever the token (`Random`)."""
    return lambda share: Random(share, seed)


@torch.no_grad()
def static_choice(hat: HierarchicalTransformer, blocks: Blocks, seed: int = 0) -> Family:
    """The method without its choice per token. Channel grain: at each site, the channels whose scores have the largest
    root mean square on ``blocks``, as many as the method allocates. Token grain: `layer_removal`."""
    if not any(hat.mask_shapes.values()):  # one decision for each layer
        return layer_removal(hat, blocks, seed)
    if hat.calibration is None:
        raise HatError("the static choice takes its shares from a calibration: run `hat calibrate` first")
    energy = defaultdict(int)

    def watch(layer, site, x, rows, trace):
        scores = hat.routers[f"{layer}_{site}"].score(x[~trace.protected.view(-1)])
        energy[layer, site] += scores.double().square().sum(0)

    work_on(hat, blocks, under(hat, watch))
    ranks = {key: squares.argsort(descending=True, stable=True).argsort() for key, squares in energy.items()}

    def family(dial: float) -> Policy:
        shares, sites = hat.calibration.shares_at(max(dial, CAPACITY_MIN)), hat.grain.sites
        counts = {key: round(float(shares[key[0], sites.index(key[1])]) * len(rank)) for key, rank in ranks.items()}
        return Static({key: rank < counts[key] for key, rank in ranks.items()})

    return family


class Layers:
    """Whole layers: ``share[layer]`` of the tokens (default: all), drawn at random, run all sites of that layer."""

    def __init__(self, share: Mapping[int, float], seed: int = 0):
        self.draw = {layer: Random(s, seed) for layer, s in share.items() if s < 1}

    def __call__(self, layer, site, x, rows, trace):
        if layer not in self.draw:
            return None
        keep = self.draw[layer](layer, "ffn", x, rows, trace)  # one draw per token, the same at every site
        return _for_site(keep, trace.mask_shapes[site])


def layer_removal(hat: HierarchicalTransformer, blocks: Blocks, seed: int = 0) -> Family:
    """Whole layers' routable work is skipped in the order of their `layer_damage`, cheapest first; that of the last for
    a random part of the tokens. Channel grain: a token that skips a layer has zero K and V there."""
    order = sorted((cost, layer) for layer, cost in layer_damage(hat, blocks).items())

    def family(dial: float) -> Policy:
        skipped = (1 - dial) * len(order)
        return Layers({layer: max(0.0, 1 - (skipped - i)) for i, (_, layer) in enumerate(order) if i < skipped}, seed)

    return family


def layer_damage(hat: HierarchicalTransformer, blocks: Blocks) -> dict[int, float]:
    """KL(base || base without that layer's routable work), nats per token, for each layer that can be skipped."""
    sample = spread(block_tensors(hat, blocks), DAMAGE_TOKENS)
    rows = [{"input_ids": block[0].tolist(), "n_context": 0} for block in sample]
    every = range(hat.config.n_layers)
    layers = [i for i in every if not all(hat.grain.always_runs(i, site) for site in hat.grain.sites)]
    _, scores = score_each(hat, rows, [under(hat, Layers({layer: 0.0})) for layer in layers], progress=False)
    return {layer: score.kl for layer, score in zip(layers, scores, strict=True)}


class Cosine:
    """Skip layer l for a token whose predicted cosine across it exceeds ``threshold``; see `cosine_rule`. ``slope`` and
    ``intercept [L]`` predict it from that across the previous layer; an intercept of -inf always runs its layer."""

    def __init__(self, hat: HierarchicalTransformer, slope: np.ndarray, intercept: np.ndarray, threshold: float):
        self.site, self.threshold = hat.grain.sites[0], threshold
        self.slope, self.intercept = slope.tolist(), intercept.tolist()
        name = "post_attention_layernorm" if self.site == "ffn" else "input_layernorm"
        weights = [getattr(layer, name).weight.detach().float() for layer in hat.lm.model.layers]
        self.inverse = [torch.where(w == 0, 0.0, 1 / w) for w in weights]
        # By forward: the residual stream at the last layer, ``[B * T, D]``; which tokens run it, and the cosine that is
        # predicted across it, ``[B * T]``.
        self._before: WeakKeyDictionary[Trace, Tensor] = WeakKeyDictionary()
        self._decided: WeakKeyDictionary[Trace, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def __call__(self, layer, site, x, rows, trace):
        if site == self.site:  # the layer's other sites follow
            cosine = self.turned(layer, x, rows, trace)
            if cosine is None:
                predicted = torch.full_like(trace.real.flatten(), -torch.inf, dtype=torch.float)
            else:
                kept, predicted = self._decided[trace]
                # A layer that did not run turns nothing, which tells us nothing: what was predicted stands.
                predicted = self.slope[layer] * torch.where(kept, cosine, predicted) + self.intercept[layer]
            self._decided[trace] = predicted <= self.threshold, predicted
        keep = self._decided[trace][0]
        return _for_site(keep if rows is None else keep[rows], trace.mask_shapes[site])

    def turned(self, layer: int, x: Tensor, rows: Tensor | None, trace: Trace) -> Tensor | None:
        """The cosine of each token's residual stream with that before the previous layer, fp32 ``[B * T]``; None at the
        first layer of a forward, 0 for tokens that have left. ``x`` is the stream after an RMSNorm, whose weights are
        divided out; a cosine ignores the rest."""
        point = x.detach().float() * self.inverse[layer]
        if rows is not None:
            point = point.new_zeros(trace.batch * trace.tokens, point.shape[1]).index_copy(0, rows, point)
        before, self._before[trace] = self._before.get(trace), point
        return None if before is None else F.cosine_similarity(point, before, dim=-1)


def cosine_rule(hat: HierarchicalTransformer, blocks: Blocks, seed: int = 0) -> Family:
    """A layer is skipped for a token if it is predicted to turn that token's residual stream little.

    After ShortGPT (Men et al. 2024, arXiv:2403.03853) and FFN-SkipLLM (Jaiswal et al. 2024, arXiv:2404.03865): a line
    fitted on ``blocks`` predicts the cosine across layer l from that across layer l - 1 or, if that layer did not run,
    from the one predicted for it. One threshold serves all layers; the first with decisions and the last always run.
    Token grain: a cosine spans the FFN and the next layer's attention.
    """
    n_layers, across, predicted = hat.config.n_layers, defaultdict(list), []
    slope, intercept = np.zeros(n_layers), np.full(n_layers, -np.inf)
    rule = Cosine(hat, slope, intercept, 1.0)

    def watch(layer, site, x, rows, trace):
        if site == rule.site and (seen := rule.turned(layer, x, rows, trace)) is not None:
            across[layer - 1].append(seen[~trace.protected.view(-1)].double().cpu().numpy())

    work_on(hat, blocks, under(hat, watch))
    if len(across) < 2:
        raise HatError(f"the cosine rule has nothing to predict in a base of {n_layers} layers")
    seen = {layer: np.concatenate(parts) for layer, parts in across.items()}
    for layer in sorted(seen)[1:]:
        slope[layer], intercept[layer] = np.polyfit(seen[layer - 1], seen[layer], 1)
        predicted.append(slope[layer] * seen[layer - 1] + intercept[layer])
    return lambda dial: Cosine(hat, slope, intercept, float(np.quantile(predicted, dial)))


CONTROLS = {"random": random_mask, "static": static_choice, "cosine": cosine_rule, "removal": layer_removal}
"""name -> what makes the family, from a model, text and seed"""


def checkpoint_family(hat: HierarchicalTransformer, checkpoint: str | Path) -> Family:
    """The method with the routers and calibration of another checkpoint, beside those of ``hat``; the dial is the
    requested capacity. Raises `HatError` if it cannot be read, has no calibration, or is of another base or grain."""
    other = read_checkpoint(checkpoint)
    other.check_base(hat.base, checkpoint)
    if other.config.granularity != hat.config.granularity:
        raise HatError(f"{checkpoint} has the {other.config.granularity} grain, expected {hat.config.granularity}")
    if other.calibration is None:
        raise HatError(f"{checkpoint} has no calibration: make one with `hat calibrate`")
    tensors = {k.removeprefix("routers."): v for k, v in other.tensors.items() if k.startswith("routers.")}
    routers = copy.deepcopy(hat.routers)
    check_tensors(tensors, dict(routers.named_parameters()), checkpoint)
    routers.load_state_dict(tensors)

    def family(dial: float) -> Policy:
        thresholds = hat.threshold_policy(other.calibration.thresholds_at(max(dial, CAPACITY_MIN)))

        def policy(layer, site, x, rows, trace):
            if site == hat.grain.sites[0]:
                hat.grain.prepare(routers, layer, x, trace, float(thresholds.sensitivity))
            return hat.grain.keep(routers, thresholds, layer, site, x, trace)

        return policy

    return family


class RandomExits:
    """At depth e, each token that may leave does so with probability ``rates[e]``, such as the gates' `exit_shares`."""

    def __init__(self, rates: Mapping[int, float], seed: int = 0):
        self.draws = {depth: Random(rate, seed + 1) for depth, rate in rates.items()}

    def __call__(self, depth: int, h: Tensor, rows: Tensor, trace: Trace) -> Tensor:
        """bool ``[n]``: which of ``rows`` leave after ``depth`` layers."""
        return self.draws[depth](depth, "ffn", h, rows, trace)


def exit_shares(states: Iterable[Trace], depths: Iterable[int]) -> dict[int, float]:
    """The share of tokens that left at each depth, of those that could: the ``rates`` of `RandomExits`."""
    depth_of = torch.cat([trace.exit_layer[trace.real & ~trace.protected] for trace in states])
    return leaving_shares(np.bincount(depth_of.cpu()), depths)


def leaving_shares(left: np.ndarray, depths: Iterable[int]) -> dict[int, float]:
    """`exit_shares`, from the number of tokens that ran so many layers, ``[L + 1]``."""
    return {depth: float(left[depth] / max(1, left[depth:].sum())) for depth in depths}
