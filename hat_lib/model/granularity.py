"""Granularity: what a router decides about.

``channel``  each input channel of every linear layer, per token (the default). Four sites, since matrices that read the
             same input share one decision: q|k|v, o, gate|up, down.
``token``    the whole FFN, per token (the published method). One site.

A `Grain` is all that the rest of the library asks about one: where it decides, what shape its decisions have, which
routers score them, and what replaces what is skipped. Another grain is a subclass in `GRAINS`, with a recipe in
`hat_lib.training.recipe`; `tests/model/test_third_grain.py` has one, of whole attention heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hat_lib.backbone.shapes import LINEARS
from hat_lib.config import HatConfig, HatError
from hat_lib.model.corrections import FULL, Correction
from hat_lib.model.routers import ChannelRouter, MoERouter
from hat_lib.model.token_state import TokenState

SITES = {name: (name,) for name in LINEARS} | {"ffn": ("gate_up", "down")}
"""where `hat_lib.model.decoder_layer` lets a grain decide: units of the input of linear layers, or the whole FFN; with
the keys of `LINEARS` whose work is then skipped"""


class Grain:
    """One granularity. As it stands, it zeroes units of a linear layer's input, whose scores are magnitudes.

    A unit is one or several adjacent channels. A decision is bool ``[n, units]`` for n rows, or ``[n]`` for the FFN.
    """

    name: str
    sites: tuple[str, ...]
    """of `SITES`, in the order in which a layer reaches them"""
    logits = False
    """whether scores are logits, trained from nothing, and not magnitudes, which need no training"""
    scales_thresholds = False
    """whether a token has a factor on its thresholds: token sensitivity and steering"""
    has_shortlist = False
    """whether the head is calibrated as one more site (`hat_lib.model.head`)"""
    warning = ""
    """what a person should know who asks for less than capacity 1"""

    def config(self, base, **changes) -> HatConfig:
        """The config of a new model of this grain."""
        return HatConfig.default(base, **{"granularity": self.name, **changes})

    def always_runs(self, layer: int, site: str) -> bool:
        """Whether a site is never asked: layer 0's FFN is never skipped whole, since that alone destroys the output."""
        return site == "ffn" and layer == 0

    def mask_shape(self, lm_config, site: str) -> tuple[int, ...]:
        """Shape of one row's decision."""
        return (input_widths(lm_config)[site],)

    def site_work(self, lm_config) -> dict[str, int]:
        """Weights that each site of one layer reads for a token."""
        work = linear_work(lm_config)
        return {site: sum(work[name] for name in SITES[site]) for site in self.sites}

    def router_work(self, lm_config, layers: Tensor) -> tuple[Tensor, Tensor]:
        """Compares, and weights read, by the routers of tokens that ran so many ``layers``."""
        units = sum(self.mask_shape(lm_config, site)[0] for site in self.sites)
        return units * layers, torch.zeros_like(layers)

    def router(self, layer: nn.Module, site: str) -> nn.Module:
        """A new router for a site of a decoder layer."""
        return ChannelRouter(column_norm(layer, site))

    def routers(self, layer: nn.Module) -> dict[str, nn.Module]:
        """All new routers of a decoder layer, by site."""
        return {site: self.router(layer, site) for site in self.sites}

    def score(self, routers: nn.ModuleDict, layer: int, site: str, x: Tensor, state: TokenState) -> Tensor:
        """Scores of the running rows, fp32, shaped like the decision; ``x`` is ``[n, C]``."""
        return routers[f"{layer}_{site}"].score(x)

    def keep(self, routers: nn.ModuleDict, layer: int, site: str, x: Tensor, threshold: float, state) -> Tensor:
        """``score > threshold``."""
        return routers[f"{layer}_{site}"].keep(x, threshold)

    def correction(self, layer: nn.Module, index: int, site: str, rank: int) -> Correction | None:
        """A new correction for a site of layer ``index``: added to the output of its linear layers."""
        linears = [layer.get_submodule(name) for name in LINEARS[site]]
        return Correction(linears[0].in_features, [linear.out_features for linear in linears], rank)

    def correction_strength(self, capacity: float) -> float:
        """0 at capacity 1, rising with the square of what is dropped to 1 at `FULL`, as does what corrections can
        compensate for."""
        return 0.0 if capacity >= 1 else min(1.0, (1 - capacity) / (1 - FULL)) ** 2

    def correction_work(self, lm_config, rank: int, skipped: dict[str, Tensor]) -> Tensor | float:
        """Weights read by corrections, from the number of layers in which each site was skipped: merged, they read
        none."""
        return 0.0


class ChannelGrain(Grain):
    name = "channel"
    sites = tuple(LINEARS)
    scales_thresholds = has_shortlist = True

    def router_work(self, lm_config, layers):
        compares, _ = super().router_work(lm_config, layers)
        return compares, lm_config.hidden_size * layers

    def routers(self, layer):
        return super().routers(layer) | {"token": MoERouter(layer.hidden_size)}

    def score(self, routers, layer, site, x, state):
        return routers[f"{layer}_{site}"].score(x, self.threshold_scale(routers, layer, site, x, state))

    def keep(self, routers, layer, site, x, threshold, state):
        scale = self.threshold_scale(routers, layer, site, x, state)
        return routers[f"{layer}_{site}"].keep(x, threshold, scale)

    def threshold_scale(self, routers: nn.ModuleDict, layer: int, site: str, x: Tensor, state: TokenState) -> Tensor:
        """What multiplies the running rows' thresholds in this layer, ``[n, 1]``: each token's own factor
        (`MoERouter.threshold_scale`, computed at the first site) times that of steering."""
        if site == self.sites[0]:
            state.threshold_scale = routers[f"{layer}_token"].threshold_scale(x)
            if (steering := state.steering) is not None:
                steering = steering if len(x) == len(steering) else steering[state.alive]
                state.threshold_scale = state.threshold_scale * steering[:, None]
        return state.threshold_scale


class TokenGrain(Grain):
    name = "token"
    sites = ("ffn",)
    logits = True
    warning = (
        "skipping whole FFNs of a frozen base multiplies perplexity (see data/results); the channel grain keeps far "
        "more at equal work"
    )

    def config(self, base, **changes):
        return HatConfig.published(base, **changes)

    def mask_shape(self, lm_config, site):
        return ()

    def router_work(self, lm_config, layers):
        return torch.zeros_like(layers), lm_config.hidden_size * (layers - 1)  # layer 0's router is never asked

    def router(self, layer, site):
        return MoERouter(layer.hidden_size)

    def correction(self, layer, index, site, rank):
        """What stands in for an FFN that is skipped."""
        if self.always_runs(index, site):
            return None
        return Correction(layer.hidden_size, [layer.hidden_size], rank)

    def correction_strength(self, capacity):
        return float(capacity < 1)

    def correction_work(self, lm_config, rank, skipped):
        return 2 * lm_config.hidden_size * rank * skipped["ffn"]


GRAINS: dict[str, Grain] = {grain.name: grain for grain in (ChannelGrain(), TokenGrain())}


def grain_named(name: str) -> Grain:
    if name not in GRAINS:
        raise HatError(f"granularity must be one of {', '.join(GRAINS)}, got {name!r}")
    return GRAINS[name]


def input_widths(lm_config) -> dict[str, int]:
    """Channels of each input of a decoder layer's linear layers, C, by the keys of `LINEARS`."""
    d = lm_config.hidden_size
    heads = lm_config.num_attention_heads * lm_config.head_dim
    return {"qkv": d, "o": heads, "gate_up": d, "down": lm_config.intermediate_size}


def linear_work(lm_config) -> dict[str, int]:
    """Weights of one decoder layer of a Llama with this config, by the input that they share."""
    d, f, head = lm_config.hidden_size, lm_config.intermediate_size, lm_config.head_dim
    q, kv = lm_config.num_attention_heads * head, lm_config.num_key_value_heads * head
    return {"qkv": d * (q + 2 * kv), "o": q * d, "gate_up": 2 * d * f, "down": f * d}


def column_norm(layer: nn.Module, site: str) -> Tensor:
    """``||W[:, i]||`` of input channel i over all outputs that read it at a site, fp32 ``[C]``."""
    return _column_norm([layer.get_submodule(name).weight for name in LINEARS[site]])


def head_norm(lm: nn.Module) -> Tensor:
    """The same for the head, clamped so that it can be divided by, fp32 ``[D]``."""
    return _column_norm([lm.lm_head.weight]).clamp(min=1e-12)


def _column_norm(weights: list[Tensor]) -> Tensor:
    # In slices: a whole matrix of a large base in fp32 would waste memory.
    parts = [rows.float().norm(dim=0) for w in weights for rows in w.detach().split(1024)]
    return torch.stack(parts).norm(dim=0)
