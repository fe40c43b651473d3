"""Granularity: what a router decides about, named by the sites of a layer where it decides.

``channel``  each input channel of every linear layer, per token (the default). Four sites, since matrices that read the
             same input share one decision: q|k|v, o, gate|up, down.
``token``    the whole FFN, per token (the published method). One site.

What a site does in a forward is defined in `hat_lib.model.decoder_layer`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hat_lib.backbone.shapes import LINEARS


class Grain(NamedTuple):
    """One granularity: its name and its sites, in the order in which a layer reaches them."""

    name: str
    sites: tuple[str, ...]

    def site_work(self, lm_config) -> dict[str, int]:
        """Weights that each routable site of one layer reads for a token."""
        work = linear_work(lm_config)
        return work if self.name == "channel" else {"ffn": work["gate_up"] + work["down"]}


GRAINS = {"channel": Grain("channel", tuple(LINEARS)), "token": Grain("token", ("ffn",))}


def linear_work(lm_config) -> dict[str, int]:
    """Weights of one decoder layer of a Llama with this config, by the input that they share."""
    d, f, head = lm_config.hidden_size, lm_config.intermediate_size, lm_config.head_dim
    q, kv = lm_config.num_attention_heads * head, lm_config.num_key_value_heads * head
    return {"qkv": d * (q + 2 * kv), "o": q * d, "gate_up": 2 * d * f, "down": f * d}


def column_norm(layer: nn.Module, site: str) -> Tensor:
    """``||W[:, i]||`` of input channel i over all outputs that read it at a site of the channel grain, fp32 ``[C]``."""
    return _column_norm([layer.get_submodule(name).weight for name in LINEARS[site]])


def head_norm(lm: nn.Module) -> Tensor:
    """The same for the head, clamped so that it can be divided by, fp32 ``[D]``."""
    return _column_norm([lm.lm_head.weight]).clamp(min=1e-12)


def _column_norm(weights: list[Tensor]) -> Tensor:
    # In slices: a whole matrix of a large base in fp32 would waste memory.
    parts = [rows.float().norm(dim=0) for w in weights for rows in w.detach().split(1024)]
    return torch.stack(parts).norm(dim=0)
