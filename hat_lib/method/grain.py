"""Grains: what a router decides about, per token.

- ``channel``: each input channel of every linear layer (the default); matrices that read the same input share it
- ``token``: the whole FFN (the published method)

All else asks a `Grain`: where it decides, in what shape, which routers score, what replaces what is skipped. Another
one is a subclass in `GRAINS`, with a recipe in `hat_lib.training.recipe`: see `tests/method/test_third_grain.py`.
"""

import numpy as np
import torch
from torch import Tensor, nn

from hat_lib.base.families import LINEARS, input_widths, linear_work
from hat_lib.config import HatConfig, HatError
from hat_lib.method.corrections import FULL, Correction
from hat_lib.method.routers import ChannelRouter, MoERouter, column_norm
from hat_lib.method.thresholds import Thresholds
from hat_lib.method.trace import Trace

# Where a layer lets a grain decide -> the keys of `LINEARS` whose work is then skipped.
SITES = {name: (name,) for name in LINEARS} | {"ffn": ("gate_up", "down")}


class Grain:
    """One granularity; by default it zeroes units, one or several adjacent channels, of a linear layer's input.

    A decision is bool ``[n, units]`` for n rows, or ``[n]`` for the whole FFN. Routers are by "{layer}_{site}".
    """

    name: str
    sites: tuple[str, ...]  #: of `SITES`, in the order in which a layer reaches them
    logits = False  # whether scores are logits, trained from nothing, rather than magnitudes
    scales_thresholds = False  # whether a token has a factor on its thresholds: token sensitivity and steering
    has_shortlist = False  # whether the head is calibrated as one more site (`hat_lib.method.head`)
    warning = ""  # what a person should know who asks for less than capacity 1

    def config(self, base, **changes) -> HatConfig:
        """The config of a new model of this grain."""
        return HatConfig.default(base, **{"granularity": self.name, **changes})

    def always_runs(self, layer: int, site: str) -> bool:
        """Whether a site is never asked: skipping layer 0's whole FFN alone destroys the output."""
        return site == "ffn" and layer == 0

    def mask_shape(self, lm_config, site: str) -> tuple[int, ...]:
        """Shape of one row's decision."""
        return (input_widths(lm_config)[site],)

    def site_work(self, lm_config) -> dict[str, int]:
        """Weights that each site of one layer reads for a token."""
        work = linear_work(lm_config)
        return {site: sum(work[name] for name in SITES[site]) for site in self.sites}

    def router_work(self, lm_config, layers: Tensor) -> tuple[Tensor, Tensor | float]:
        """Compares, and weights read, by the routers of tokens that ran so many ``layers``."""
        return layers * sum(self.mask_shape(lm_config, site)[0] for site in self.sites), 0.0

    def linears(self, layer: nn.Module, site: str) -> list[nn.Module]:
        """The linear layers that read a site's input."""
        return [layer.get_submodule(name) for name in LINEARS[site]]

    def router(self, layer: nn.Module, site: str) -> nn.Module:
        """A new router for a site of a decoder layer."""
        return ChannelRouter(column_norm(*self.linears(layer, site)))

    def routers(self, layer: nn.Module) -> dict[str, nn.Module]:
        """All new routers of a decoder layer, by site."""
        return {site: self.router(layer, site) for site in self.sites}

    def prepare(self, routers: nn.ModuleDict, layer: int, x: Tensor, trace: Trace, strength: float) -> None:
        """At a layer's first site, with its input ``x [n, C]``, before any decision in that layer."""

    def score(self, routers: nn.ModuleDict, layer: int, site: str, x: Tensor, trace: Trace) -> Tensor:
        """Scores of the running rows ``x [n, C]``, fp32, shaped like the decision."""
        return routers[f"{layer}_{site}"].score(x, *_scale(trace))

    def keep(
        self, routers: nn.ModuleDict, thresholds: Thresholds, layer: int, site: str, x: Tensor, trace: Trace
    ) -> Tensor | None:
        """The method: which units of the running rows ``x [n, C]`` score above a site's threshold; None for all."""
        threshold = thresholds.site[layer, self.sites.index(site)]
        if threshold == -np.inf:
            return None
        return routers[f"{layer}_{site}"].keep(x, float(threshold), *_scale(trace))

    def correction(self, layer: nn.Module, index: int, site: str, rank: int) -> Correction | None:
        """A new correction for a site of layer ``index``: added to the output of its linear layers."""
        linears = self.linears(layer, site)
        return Correction(linears[0].in_features, [linear.out_features for linear in linears], rank)

    def correction_strength(self, capacity: float) -> float:
        """0 at capacity 1, rising with the square of what is dropped to 1 at `FULL`."""
        return 0.0 if capacity >= 1 else min(1.0, (1 - capacity) / (1 - FULL)) ** 2

    def correction_work(self, lm_config, rank: int, layers: Tensor, skipped: dict[str, Tensor]) -> Tensor:
        """Weights read by the corrections of tokens that ran so many ``layers``, and ``skipped`` each site in some."""
        widths, work = input_widths(lm_config), linear_work(lm_config)
        return layers * rank * sum(widths[site] + work[site] // widths[site] for site in self.sites)


class ChannelGrain(Grain):
    name = "channel"
    sites = tuple(LINEARS)
    scales_thresholds = has_shortlist = True

    def router_work(self, lm_config, layers):
        return super().router_work(lm_config, layers)[0], lm_config.hidden_size * layers

    def routers(self, layer):
        return super().routers(layer) | {"token": MoERouter(layer.hidden_size)}  # of token sensitivity

    def prepare(self, routers, layer, x, trace, strength):
        """Set what multiplies the running rows' thresholds in this layer, ``[n, 1]``: sensitivity, at this strength,
        times steering. Sensitivity reads the input of the first site, and serves all of them."""
        trace.threshold_scale = routers[f"{layer}_token"].threshold_scale(x, strength)
        if (steering := trace.steering) is not None:
            steering = steering if len(x) == len(steering) else steering[trace.alive]
            trace.threshold_scale = trace.threshold_scale * steering[:, None].to(x.device)


class TokenGrain(Grain):
    name = "token"
    sites = ("ffn",)
    logits = True
    warning = "skipping whole FFNs of a frozen base multiplies perplexity; the channel grain keeps far more"

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
        return None if self.always_runs(index, site) else Correction(layer.hidden_size, [layer.hidden_size], rank)

    def correction_strength(self, capacity):
        return float(capacity < 1)

    def correction_work(self, lm_config, rank, layers, skipped):
        return 2 * lm_config.hidden_size * rank * skipped["ffn"]


GRAINS: dict[str, Grain] = {grain.name: grain for grain in (ChannelGrain(), TokenGrain())}


def grain_named(name: str) -> Grain:
    if name not in GRAINS:
        raise HatError(f"granularity must be one of {', '.join(GRAINS)}, got {name!r}")
    return GRAINS[name]


def _scale(trace: Trace) -> list[Tensor]:
    """The factor on thresholds, where the grain has one."""
    return [] if trace.threshold_scale is None else [trace.threshold_scale]
