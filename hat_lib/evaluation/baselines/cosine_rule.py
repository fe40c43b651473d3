"""The cosine-similarity rule: skip a layer for a token if it is predicted to turn that token little."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hat_lib.config import HatError
from hat_lib.evaluation.baselines.equal_compute import Blocks, for_site, matched, realised_capacity, text_tensors
from hat_lib.model.policies import Policy
from hat_lib.model.token_state import TokenState
from hat_lib.model.transformer import HierarchicalTransformer


class StreamCosine:
    """How little the residual stream of each token has turned since one layer before: cosine, fp32 ``[n]``.

    What a router reads is an RMSNorm's output: the stream times one positive number per token, which a cosine does
    not see, times the norm's weights, which are divided out here. So it is the cosine of the stream itself,
    between the places where it enters two layers (channel grain) or their FFNs (token grain). It is remembered
    by forward and row, and no longer than the forward's state is.
    """

    def __init__(self, hat: HierarchicalTransformer):
        name = "post_attention_layernorm" if hat.config.granularity == "token" else "input_layernorm"
        weights = [getattr(layer, name).weight.detach().float() for layer in hat.lm.model.layers]
        self.inverse = [torch.where(w == 0, 0.0, 1 / w) for w in weights]
        self._before: WeakKeyDictionary[TokenState, Tensor] = WeakKeyDictionary()

    def __call__(self, layer: int, x: Tensor, rows: Tensor | None, state: TokenState) -> Tensor | None:
        """None in the first layer of a forward that is asked; rows that have left are never asked again."""
        point = x.detach().float() * self.inverse[layer]
        if rows is not None:
            point = point.new_zeros(state.batch * state.tokens, point.shape[1]).index_copy(0, rows, point)
        before, self._before[state] = self._before.get(state), point
        if before is None:
            return None
        cosine = F.cosine_similarity(point, before, dim=-1)
        return cosine if rows is None else cosine[rows]


class Cosine:
    """Skip layer l for a token whose predicted cosine across it exceeds ``threshold``; see `cosine_rule`.

    Args:
        mean, std, r: of the cosine across each layer, on held-out text, ``[L]`` each; ``r`` is its correlation with
            the cosine across the layer before. ``mean`` is -inf for a layer that always runs.
    """

    def __init__(self, hat: HierarchicalTransformer, mean, std, r, threshold: float):
        self.cosine, self.site = StreamCosine(hat), hat.grain.sites[0]
        self.mean, self.std, self.r, self.threshold = mean.tolist(), std.tolist(), r.tolist(), threshold
        # By forward: who keeps the present layer, and the deviation expected of each row; bool and fp32 ``[B * T]``.
        self._decided: WeakKeyDictionary[TokenState, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def __call__(self, layer, site, x, rows, state):
        if site == self.site:  # the layer's other sites follow
            self._decided[state] = self._decide(layer, x, rows, state)
        keep = self._decided[state][0]
        return for_site(keep if rows is None else keep[rows], site, x)

    def _decide(self, layer: int, x: Tensor, rows: Tensor | None, state: TokenState) -> tuple[Tensor, Tensor]:
        """In new tensors: the trace keeps those it was given."""
        cosine, n = self.cosine(layer, x, rows, state), state.batch * state.tokens
        if cosine is None:
            return torch.ones(n, dtype=torch.bool, device=x.device), torch.zeros(n, device=x.device)
        keep, deviation = self._decided[state]
        at = torch.arange(n, device=x.device) if rows is None else rows
        seen = (cosine - self.mean[layer - 1]) / self.std[layer - 1]
        # A layer that did not run turns nothing, which is no news: the deviation expected of it stands.
        expected = self.r[layer] * torch.where(keep[at], seen, deviation[at])
        runs = self.mean[layer] + self.std[layer] * expected <= self.threshold
        return keep.index_copy(0, at, runs), deviation.index_copy(0, at, expected)


def cosine_rule(hat: HierarchicalTransformer, blocks: Blocks, capacity: float, seed: int = 0) -> Policy:
    """A layer is skipped for a token if it is predicted to turn that token's residual stream little.

    ShortGPT (Men et al. 2024, arXiv:2403.03853) removes the layers of least Block Influence, 1 - mean cos(stream
    before, stream after); FFN-SkipLLM (Jaiswal et al. 2024, arXiv:2404.03865) skips a token's next FFNs once its
    cosine is high. Here both speak: the cosine across layer l is predicted by a line fitted on held-out text, from
    the cosine across layer l - 1; where that did not run, from the one predicted for it. One threshold
    for all layers, so layers find their own shares. All is known when layer l decides, from this token alone.
    (The last cosine alone, against a threshold, never lets a token run again: a skipped layer's cosine is 1.)

    Always run: the first layer that is asked (0; at the token grain 1, as nobody asks layer 0), and the last,
    whose cosine no later layer sees. Channel grain: the decision holds for all four sites, and a token that skips a
    layer leaves K and V of zero there. Token grain: a cosine spans the FFN and the next layer's attention.
    ``seed`` is unused.
    """
    texts, cosine, n_layers = text_tensors(hat, blocks), StreamCosine(hat), hat.config.n_layers
    across: dict[int, list[Tensor]] = {}

    def watch(layer, site, x, rows, state):
        if site == hat.grain.sites[0] and (seen := cosine(layer, x, rows, state)) is not None:
            across.setdefault(layer - 1, []).append(seen[~state.protected.view(-1)])

    realised_capacity(hat, watch, texts)
    if len(across) < 2:
        raise HatError(f"the cosine rule has nothing to predict in a base of {n_layers} layers")
    mean, std, r = np.full(n_layers, -np.inf), np.zeros(n_layers), np.zeros(n_layers)
    deviation, predicted = {}, []
    for layer, cosines in sorted(across.items()):
        seen = torch.cat(cosines).double().cpu().numpy()
        mean[layer], std[layer] = seen.mean(), max(seen.std(), 1e-9)
        deviation[layer] = (seen - mean[layer]) / std[layer]
        if layer - 1 in deviation:
            r[layer] = np.mean(deviation[layer] * deviation[layer - 1])
            predicted.append(mean[layer] + std[layer] * r[layer] * deviation[layer - 1])

    def family(dial: float) -> Policy:
        return Cosine(hat, mean, std, r, float(np.quantile(predicted, dial)))

    return matched(hat, family, texts, capacity)
