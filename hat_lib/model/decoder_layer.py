"""The adaptive decoder layer: one forward for prefill, decode, any batch, with skipping and exits.

It replaces `LlamaDecoderLayer.forward` on the instance; the loop over layers stays transformers' own.
One rule for every token, in every mode: a token that has exited keeps a frozen hidden state and still
gets K and V in each later layer, computed from that state; no query, attention output or FFN. So the
cache stays dense and a token's future neighbours see the same keys whether it was decoded alone or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hat_lib.model.granularity import Grain
    from hat_lib.model.transformer import HierarchicalTransformer


class AdaptiveLayer:
    """Callable with the signature of `LlamaDecoderLayer.forward` in transformers 5.24."""

    def __init__(self, hat: HierarchicalTransformer, index: int, grain: Grain):
        self.hat, self.index, self.grain = hat, index, grain
        layer = grain.layer
        self.norm_in, self.norm_ffn = layer.input_layernorm, layer.post_attention_layernorm
        self.head_dim, self.scaling = layer.self_attn.head_dim, layer.self_attn.scaling

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        """``[B, T, D] -> [B, T, D]``; reads and updates ``hat.trace``, the state of this forward."""
        hat, state, grain, compact = self.hat, self.hat.trace, self.grain, self.hat.compact
        shape = hidden_states.shape
        h = hidden_states.reshape(-1, shape[-1])
        h = hat.exit(self.index, h)

        q, k, v = grain.qkv(rms_norm(self.norm_in, h), state, self.decide, compact)
        alive = state.alive if compact else None
        if alive is None:  # one rotation for queries and keys
            q, k = self._rope(torch.cat((q, k), 1), position_embeddings, None).split(
                [q.shape[1] // self.head_dim, k.shape[1] // self.head_dim], dim=1
            )
        else:
            q, k = self._rope(q, position_embeddings, alive), self._rope(k, position_embeddings, None)
        k, v = (x.view(*shape[:2], -1, self.head_dim).transpose(1, 2) for x in (k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        if alive is not None and not len(alive):
            return h.view(shape)

        mixed = self._attend(q, k, v, attention_mask, alive)
        running = h if alive is None else h[alive]
        running = running + grain.output(mixed, state, self.decide, compact)
        update = grain.ffn(rms_norm(self.norm_ffn, running), state, self.decide, compact)
        if update is not None:
            running = running + update

        if alive is not None:
            running = h.index_copy(0, alive, running)
        elif state.alive is not None:  # the masked reference computes exited rows and drops the result
            running = torch.where((state.exit_layer.view(-1, 1) < state.n_layers), h, running)
        if hat.dropped is not None:
            running = torch.where(hat.dropped[self.index].repeat_interleave(shape[1])[:, None], h, running)
        return running.view(shape)

    def decide(self, site: str, x: Tensor, rows: Tensor | None) -> Tensor | None:
        """The keep mask for one site, protected tokens included; noted in the trace."""
        return self.hat.decide(self.index, site, x, rows)

    def _rope(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], rows: Tensor | None) -> Tensor:
        """Rotary embedding of ``[n, heads*h] -> [n, heads, h]``; the base's formula, same rounding.

        ``rotate_half(x) * sin`` is written as a roll by half a head times a sine whose first half is negated.
        """
        state = self.hat.trace
        if state.rotation is None:  # one for all layers
            flat = [x.expand(state.batch, state.tokens, -1).flatten(0, 1)[:, None] for x in position_embeddings]
            first, second = flat[1].chunk(2, -1)
            state.rotation = flat[0], torch.cat((-first, second), -1)
        cos, sin = state.rotation
        if rows is not None:
            cos, sin = cos[rows], sin[rows]
        x = x.view(len(x), x.shape[1] // self.head_dim, self.head_dim)
        return x * cos + x.roll(self.head_dim // 2, -1) * sin

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alive: Tensor | None) -> Tensor:
        """``q [n, H, h], k and v [B, G, K, h] -> [n, H*h]``, n = B*T or the alive rows."""
        state = self.hat.trace
        b, t, groups = state.batch, state.tokens, k.shape[1]
        if t == 1:
            # One query per sequence: the query heads that share a K/V head attend as that head's rows.
            # Exited sequences of a batch ride along, and their output is dropped.
            if alive is not None and len(alive) < b:
                q = q.new_zeros(b, *q.shape[1:]).index_copy(0, alive, q)
            out = F.scaled_dot_product_attention(
                q.view(b, groups, -1, self.head_dim), k, v, attn_mask=mask, scale=self.scaling
            ).reshape(b, -1)
            return out if alive is None else out[alive]
        if alive is not None:
            return self._attend_alive(q, k, v, mask, alive)
        q = q.view(b, t, -1, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scaling, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(b * t, -1)

    def _attend_alive(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alive: Tensor) -> Tensor:
        """Attention for the alive rows alone, each sequence padded to the longest count of them."""
        state = self.hat.trace
        b, t, keys = state.batch, state.tokens, k.shape[2]
        row, column = alive // t, alive % t
        counts = torch.bincount(row, minlength=b)
        slot = torch.arange(len(alive), device=row.device) - (counts.cumsum(0) - counts)[row]
        width = int(counts.max())
        padded = q.new_zeros(b, width, *q.shape[1:]).index_put((row, slot), q)
        if mask is None:  # plain causal, queries are the last t keys
            mask = torch.ones(t, keys, dtype=torch.bool, device=q.device).tril(keys - t).expand(b, 1, t, keys)
        # Slots beyond a sequence's count repeat its first query's row of the mask; nothing reads them.
        where = torch.zeros(b, width, dtype=torch.long, device=q.device).index_put((row, slot), column)
        rows = mask.expand(b, -1, -1, -1).gather(2, where[:, None, :, None].expand(b, mask.shape[1], width, keys))
        out = F.scaled_dot_product_attention(
            padded.transpose(1, 2), k, v, attn_mask=rows, scale=self.scaling, enable_gqa=True
        )
        return out.transpose(1, 2)[row, slot].flatten(1)


def rms_norm(norm, x: Tensor) -> Tensor:
    """`LlamaRMSNorm` in fewer operations; rounds to the input's dtype before the weight, as the base does."""
    if x.shape[0] == 1 and x.device.type == "cpu" and not x.requires_grad:
        # One row: the scale is one number, and the product with a number is rounded once, like the base's.
        mean_square = float(torch.linalg.vector_norm(x, dtype=torch.float32)) ** 2 / x.shape[1]
        return x * (mean_square + norm.variance_epsilon) ** -0.5 * norm.weight
    return F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon) * norm.weight
