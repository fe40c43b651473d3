"""The method written anew from its definition, in plain torch, against the library: decisions, perplexity, capacity.

`Definition` takes a base's weights and the two files of a checkpoint, and no code of the library. Read it to learn what
a forward computes at the channel grain; exits and steering aside, it is all there.

Where a score is within rounding of its threshold, two correct computations may decide differently, and from there on
agree only on average. So decisions are compared one by one, and those within `MARGIN` are taken from the library.
"""

import json
from math import exp, inf

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hat_lib.config import DATA
from hat_lib.evaluation.perplexity import score
from hat_lib.hat import HierarchicalTransformer
from hat_lib.text.blocks import load_text

CHECKPOINT, CAPACITY = DATA / "checkpoints" / "default", 0.6
MARGIN = 1e-3
"""relative distance of a score from its threshold below which rounding may decide"""
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class Definition:
    """A Llama under a checkpoint of the channel grain, at a capacity below 1. One document, ``T`` tokens; all in fp32.
    ``weights`` is the state dict of a `LlamaForCausalLM` with this ``lm_config``, ``folder`` the checkpoint's."""

    def __init__(self, weights, lm_config, folder, capacity):
        checkpoint = json.loads((folder / "hat_config.json").read_text())
        self.table, self.protected = checkpoint["calibration"], checkpoint["config"]["protected_tokens"]
        self.trained = load_file(folder / "hat_adapter.safetensors")
        self.weights, self.lm, self.capacity = weights, lm_config, capacity
        self.strength = min(1, (1 - capacity) / (1 - 0.45)) ** 2  # of corrections: in full from 0.45 down
        self.executed = self.routable = 0.0  # weights read for a token: mean over tokens, summed over matrices

    def at_capacity(self, column):
        """What the calibration has for this capacity, on straight lines between those that were measured."""
        return float(np.interp(self.capacity, self.table["capacities"], column))

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.lm.rms_norm_eps) * self.weights[f"{name}.weight"]

    def decide(self, layer, site, score, threshold):
        """The channels that are kept: ``[T, C]``, ``[T, 1]`` -> bool ``[T, C]``."""
        return score > threshold

    def product(self, layer, site, x, sensitivity):
        """``(W + s BA) x + s c`` of the channels of ``x [T, C]`` that are kept, W all matrices that read x."""
        w = torch.cat([self.weights[f"model.layers.{layer}.{name}.weight"] for name in SITES[site]])
        score = x.abs() * w.norm(dim=0) * self.trained[f"routers.{layer}_{site}.log_scale"].exp()
        thresholds = self.table["thresholds"][layer][self.table["sites"].index(site)]
        threshold = self.at_capacity(thresholds) * torch.exp(-sensitivity[:, None])
        threshold[: self.protected] = -inf  # the first tokens keep everything
        keep = self.decide(layer, site, score, threshold)
        self.count(keep.float().mean(), w)
        x = x * keep
        a, b, c = (self.trained[f"corrections.{layer}_{site}.{part}"] for part in ("down", "up", "shift"))
        return x @ w.T + self.strength * (x @ a.T @ b.T + c)  # corrections are for every token, protected or not

    def attention(self, q, k, v):
        """Causal, with rotary positions and shared K and V: ``[T, heads * h]`` each -> ``[T, D]``."""
        t, h = len(q), self.lm.head_dim
        angle = torch.arange(t)[:, None] * self.lm.rope_parameters["rope_theta"] ** (-torch.arange(0, h, 2) / h)
        cos, sin = angle.cos(), angle.sin()
        q, k, v = (x.view(t, -1, h).transpose(0, 1) for x in (q, k, v))  # [heads, T, h]
        halves = (x.chunk(2, -1) for x in (q, k))
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in halves)
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        future = torch.ones(t, t).triu(1).bool()
        mixed = (q @ k.mT / h**0.5).masked_fill(future, -inf).softmax(-1) @ v
        return mixed.transpose(0, 1).reshape(t, -1)

    def layer(self, i, x):
        """``[T, D] -> [T, D]``."""
        name, kv = f"model.layers.{i}", self.lm.num_key_value_heads * self.lm.head_dim
        normed = self.norm(x, f"{name}.input_layernorm")
        sensitivity = normed @ self.trained[f"routers.{i}_token.weight"] + self.trained[f"routers.{i}_token.bias"]
        sensitivity = sensitivity.clamp(-3, 3)  # of each token, for all sites of the layer
        q, k, v = self.product(i, "qkv", normed, sensitivity).split([self.lm.hidden_size, kv, kv], -1)
        x = x + self.product(i, "o", self.attention(q, k, v), sensitivity)
        normed = self.norm(x, f"{name}.post_attention_layernorm")
        gate, up = self.product(i, "gate_up", normed, sensitivity).chunk(2, -1)
        return x + self.product(i, "down", F.silu(gate) * up, sensitivity)

    def head(self, x):
        """Final states ``[n, D]`` -> logits ``[n, V]``: a preview, read again in full for the shortlist. No protected
        tokens here, no sensitivity, no corrections."""
        w = self.weights["lm_head.weight"]
        keep = x.abs() * w.norm(dim=0) > self.at_capacity(self.table["head_thresholds"])
        preview = (x * keep) @ w.T
        shortlist = preview >= preview.amax(-1, keepdim=True) - self.at_capacity(self.table["head_margins"])
        self.count(keep.float().mean() + shortlist.float().mean(), w)
        return (x @ w.T).where(shortlist, preview)

    def count(self, share, w):
        self.executed, self.routable = self.executed + float(share) * w.numel(), self.routable + w.numel()

    def losses(self, ids):
        """Nats of each of ``ids [T]`` but the first, ``[T - 1]``."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for i in range(self.lm.num_hidden_layers):
            x = self.layer(i, x)
        return F.cross_entropy(self.head(self.norm(x, "model.norm")[:-1]), ids[1:], reduction="none")


class Following(Definition):
    """Takes the library's decisions, ``masks``, having checked that it would take the same beyond `MARGIN`."""

    near = decisions = 0

    def decide(self, layer, site, score, threshold):
        own, theirs = super().decide(layer, site, score, threshold), self.masks[layer, site][0]
        near = (score / threshold - 1).abs() < MARGIN
        assert torch.equal(own | near, theirs | near), f"another decision in layer {layer}, {site}"
        self.near, self.decisions = self.near + int(near.sum()), self.decisions + near.numel()
        return theirs


@pytest.mark.slow
@torch.no_grad()
def test_the_library_computes_what_the_definition_says(bundled):
    rows = load_text("docstrings", bundled.tokenizer, split="test", block_size=256, max_tokens=400)
    weights, ours, theirs, tokens = bundled.model.state_dict(), 0.0, 0.0, 0
    hat = HierarchicalTransformer.from_pretrained(CHECKPOINT, bundled)
    try:
        for row in rows:
            with hat.at(CAPACITY), hat.record():
                found = score(hat, [row], progress=False)
            definition = Following(weights, bundled.model.config, CHECKPOINT, CAPACITY)
            definition.masks = hat.trace.masks.keep
            losses = definition.losses(torch.tensor(row["input_ids"]))
            assert definition.near < 1e-3 * definition.decisions
            assert found.capacity == pytest.approx(definition.executed / definition.routable, abs=1e-4)
            assert found.tokens[0] == len(losses)
            ours, theirs, tokens = ours + float(losses.sum()), theirs + float(found.nll[0]), tokens + len(losses)
    finally:
        hat.unload()
    assert len(rows) > 1 and tokens > 350 and found.capacity == pytest.approx(CAPACITY, abs=0.03)
    assert exp(theirs / tokens) == pytest.approx(exp(ours / tokens), rel=2e-5)
