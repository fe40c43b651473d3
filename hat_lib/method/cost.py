"""What a token costs: FLOPs and weight bytes, counted from what a forward actually ran.

A linear layer costs two FLOPs per weight that it reads (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). Parts:

- ``attention``: q, k, v and o projections, at their share
- ``ffn``: gate, up and down projections, at their share
- ``exited_kv``: K and V, dense, in each layer after the one in which a token left
- ``head``: the LM head, once per token, at its share; a prefill that needs only one token's logits spends less
- ``routers``: `Grain.router_work`, and a compare per channel and per token of the vocabulary for a shortlist
- ``corrections``: `Grain.correction_work`
- ``exits``: each gate that a token reached, and the translator of the one that it took
- ``core``: attention scores and mixing: 4 FLOPs per query channel and key seen; it reads no weights

Left out, in the dense count too: norms, activations, residual sums, softmax, RoPE, biases, the one embedding row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from hat_lib.base.families import head_size, linear_work
from hat_lib.config import HatConfig, check_capacity
from hat_lib.method.grain import SITES, grain_named
from hat_lib.method.trace import Trace, ratio

HAT_BYTES = 4  # per weight of routers, gates and translators; corrections are read in the base's dtype
PRODUCTS = {"attention": ("qkv", "o"), "ffn": ("gate_up", "down")}


@dataclass(frozen=True)
class Work:
    """Work of each token by part, fp64 tensors of the tokens' shape; bytes are those that batch-1 decode reads."""

    flops: dict[str, Tensor]
    weight_bytes: dict[str, Tensor]
    dense_flops: dict[str, Tensor]
    dense_weight_bytes: dict[str, Tensor]

    @property
    def executed(self) -> Tensor:
        """FLOPs of each token, all parts except ``core``."""
        return sum(v for part, v in self.flops.items() if part != "core")

    @property
    def dense(self) -> Tensor:
        """The base's."""
        return sum(v for part, v in self.dense_flops.items() if part != "core")

    @property
    def model_share(self) -> float:
        """Executed / dense FLOPs over all tokens, without the attention core: comparable at any context length."""
        return float(self.executed.sum() / self.dense.sum())


def work(
    lm_config: LlamaConfig, config: HatConfig, site_share: Tensor, exit_layer: Tensor, context: int | Tensor = 0, *,
    dtype: torch.dtype = torch.bfloat16, routed: bool | Tensor = True, gated: bool | Tensor = True,
    head_share: float | Tensor = 1.0, corrected: bool | Tensor = False,
) -> Work:  # fmt: skip
    """The cost of tokens, given what they executed.

    Args:
        site_share: of each site, ``[L, S, ...]`` in [0, 1]; layers that a token did not enter are ignored.
        exit_layer: layers that each token ran, ``[...]``; L where it stayed to the end.
        context: keys that each token attends to, itself included; a number or ``[...]``.
        dtype: of the base's weights.
        routed, gated, corrected: whether routers, exit gates and corrections took part.
        head_share: of the head, shortlist included.
    """
    n_layers, d, ran = config.n_layers, lm_config.hidden_size, exit_layer.double()
    head_width, zero, grain = head_size(lm_config), torch.zeros_like(ran), grain_named(config.granularity)
    depth = torch.arange(n_layers, device=ran.device).view(-1, 1, *[1] * exit_layer.dim())
    executed = torch.where(depth < exit_layer, site_share.double(), 0.0).sum(0)  # [S, ...], in whole layers
    size = linear_work(lm_config)
    layers = dict.fromkeys(size, ran)
    for site, number in zip(grain.sites, executed, strict=True):
        layers |= dict.fromkeys(SITES[site], number)

    def read(layers: dict) -> dict[str, Tensor]:
        return {part: zero + sum(size[name] * layers[name] for name in names) for part, names in PRODUCTS.items()}

    compares, router_weights = grain.router_work(lm_config, ran)
    compares = compares + (d + lm_config.vocab_size) * (head_share != 1)
    skipped = dict(zip(grain.sites, ran - executed, strict=True))
    corrections = grain.correction_work(lm_config, config.correction_rank or 0, ran, skipped) * corrected
    exited_kv = 2 * lm_config.num_key_value_heads * head_width * d * (n_layers - ran)
    head = zero + lm_config.vocab_size * d
    weights = read(layers) | {"exited_kv": exited_kv, "head": head_share * head, "corrections": zero + corrections}
    dense = read(dict.fromkeys(size, n_layers)) | {"head": head}
    reached = sum(((exit_layer >= e).double() for e in config.exit_layers), zero)
    left = (exit_layer < n_layers).double()
    exits = (reached * 2 * d + left * 2 * (config.translator_rank + 1) * d) * gated
    core = 4 * lm_config.num_attention_heads * head_width * (zero + context)  # of a layer
    router_bytes = dtype.itemsize * compares + HAT_BYTES * router_weights
    return Work(
        flops={part: 2 * w for part, w in (weights | {"exits": exits}).items()}
        | {"routers": (compares + 2 * router_weights) * routed, "core": core * ran},
        weight_bytes={part: dtype.itemsize * w for part, w in weights.items()}
        | {"exits": HAT_BYTES * exits, "routers": router_bytes * routed},
        dense_flops={part: 2 * w for part, w in dense.items()} | {"core": core * n_layers},
        dense_weight_bytes={part: dtype.itemsize * w for part, w in dense.items()},
    )


def state_cost(hat, trace: Trace) -> Work:
    """The cost of a forward of a model, or of several joined by `Trace.cat`: ``[B, T]`` on the CPU, 0 at pads. A
    control is charged for the routers and gates that it stands in for."""
    took_part = {name: torch.as_tensor(getattr(trace, name)).cpu() for name in ("routed", "gated", "corrected")}
    tokens = trace.site_share.cpu(), trace.exit_layer.cpu().long(), trace.position.cpu() + 1
    head_share, real = trace.head_shares.cpu(), trace.real.cpu()
    cost = work(hat.lm.config, hat.config, *tokens, dtype=hat.lm.dtype, head_share=head_share, **took_part)
    return Work(*({part: v * real for part, v in parts.items()} for parts in vars(cost).values()))


def ideal_speedup(lm_config: LlamaConfig, config: HatConfig, capacity: float = 1.0) -> float:
    """``1 / model_share``: the speedup if time were proportional to linear work and every token ran at ``capacity``,
    without exits. Raises `HatError` for a capacity outside [0.1, 1]."""
    share = torch.full((config.n_layers, len(grain_named(config.granularity).sites)), check_capacity(capacity))
    return (
        1 / work(lm_config, config, share, torch.tensor(config.n_layers), routed=capacity < 1, gated=False).model_share
    )


class WorkTally:
    """Work summed over forwards of ``hat``. Shares are ratios of sums over all real tokens, not means over forwards."""

    def __init__(self, hat):
        self.hat = hat
        self._work = np.zeros((4, 2))  # executed and possible: of layers, head, exits and the whole model
        self.exits = np.zeros(hat.config.n_layers + 1, dtype=np.int64)  # number of tokens by layers run, [L + 1]

    def add(self, trace: Trace) -> None:
        """Add a forward."""
        cost, depths = state_cost(self.hat, trace), trace.exit_layer[trace.real].cpu().numpy()
        left, whole = int((depths < trace.n_layers).sum()), (float(cost.executed.sum()), float(cost.dense.sum()))
        self._work += np.array([*trace.work, (left, len(depths)), whole])
        self.exits += np.bincount(depths, minlength=len(self.exits))

    @property
    def shares(self) -> tuple[float, float, float]:
        """Realised capacity, exit rate and model share."""
        layers, head, exits, whole = self._work
        return ratio(layers + head), ratio(exits), ratio(whole)

    @property
    def layer_capacity(self) -> float:
        """Realised capacity of the layers alone."""
        return ratio(self._work[0])
