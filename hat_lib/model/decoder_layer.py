"""The adaptive decoder layer: one rule for prefill, decode and any batch. This is the method's definition.

It overrides `forward` on the instances of a `LlamaDecoderLayer`, its attention and its FFN; the loop over layers stays
transformers' own, and every linear layer and norm is the base's own module, so forward hooks, LoRA and interpretability
tools see a Llama. The grain decides at some of five sites: the inputs "qkv", "o", "gate_up" and "down" of linear layers
(`ForwardPass.skip` zeroes what is skipped) and "ffn", the whole FFN. Rows that do not run are gathered out: modules
then see ``[1, n, ...]`` for the n rows that do, and otherwise ``[B, T, ...]`` as usual.

A token that has exited keeps a frozen hidden state and still gets K and V in each later layer, computed from that
state, but no query, attention output or FFN. So the cache stays dense, and later tokens see a key for every token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from hat_lib.backbone.shapes import LINEARS
from hat_lib.model.forward_pass import ForwardPass
from hat_lib.model.modes import Context


class AdaptiveLayer:
    """Replaces the forwards of a `LlamaDecoderLayer` of transformers 5.24, from `attach` to `detach`."""

    def __init__(self, layer: nn.Module, index: int, context: Context):
        self.layer, self.index, self.context = layer, index, context
        self.attn, self.mlp = layer.self_attn, layer.mlp

    def attach(self) -> None:
        self.layer.forward, self.attn.forward, self.mlp.forward = self.forward, self.attention, self.feed_forward

    def detach(self) -> None:
        for module in (self.layer, self.attn, self.mlp):
            vars(module).pop("forward", None)

    def watch(self, site: str, see: Callable[[int, str, Tensor, Tensor], None]) -> RemovableHandle:
        """Hook a site; ``see`` is as in `HierarchicalTransformer.watching`."""

        def hook(module, args, out):
            see(self.index, site, args[0], out if site == "ffn" else args[0])

        module = self.mlp if site == "ffn" else self.layer.get_submodule(LINEARS[site][0])
        return module.register_forward_hook(hook)

    @property
    def intact(self) -> bool:
        """False if the layer's attention or FFN module has been replaced by another."""
        return self.layer.self_attn is self.attn and self.layer.mlp is self.mlp

    @property
    def run(self) -> ForwardPass | None:
        """The model's forward that is under way; None if a part is called by hand: it then acts as the base's."""
        return self.context.passes[-1] if self.context.passes else None

    @torch.compiler.disable  # it branches on what each token needs
    def forward(self, hidden_states: Tensor, **given) -> Tensor:
        """``[B, T, D] -> [B, T, D]``; ``given`` is what attention takes besides the hidden states."""
        run, layer = self.run, self.layer
        if run is None:
            return type(layer).forward(layer, hidden_states, **given)
        h = run.exit(self.index, hidden_states)
        mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **given)
        rows = run.rows
        if rows is None:
            out = self._ffn(h + mixed)
        elif not len(rows):
            return h
        else:
            flat = h.view(-1, h.shape[-1])
            out = flat.index_copy(0, rows, self._ffn(flat[rows][None] + mixed)[0]).view(h.shape)
        if run.state.alive is not None and rows is None:  # exited rows were computed too: discard them
            out = torch.where(run.state.exited[..., None], h, out)
        if run.mode.dropped is not None:
            out = torch.where(run.mode.dropped[self.index, :, None, None], h, out)
        return out

    def attention(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask=None,
        cache=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Normed ``[B, T, D]`` -> attention output for the running rows, ``[B, T, D]`` or ``[1, n, D]``."""
        run, attn = self.run, self.attn
        if run is None:
            return type(attn).forward(attn, hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        if run.rows is not None:
            return self._attention_of_rows(hidden_states, *position_embeddings, attention_mask, cache, kwargs), None
        x = run.skip(self.index, "qkv", hidden_states)
        q, k, v = (self._heads(project(x)) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, attn.layer_idx, kwargs=kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(attn, q, k, v, attention_mask, dropout=0.0, scaling=attn.scaling, **kwargs)
        return attn.o_proj(run.skip(self.index, "o", mixed.reshape(*x.shape[:-1], -1))), weights

    def _attention_of_rows(self, hidden_states, cos, sin, mask, cache, kwargs) -> Tensor:
        """The same when some rows have exited: K and V of all rows, attention output of the others, ``[1, n, D]``."""
        run, attn, rows = self.run, self.attn, self.run.rows
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        q_input = run.skip(self.index, "qkv", flat[rows][None]) if len(rows) else flat[rows][None]
        kv_input = flat.index_copy(0, rows, q_input[0]).view(hidden_states.shape)
        k, v = self._heads(attn.k_proj(kv_input)), self._heads(attn.v_proj(kv_input))
        k = k * cos[:, None] + rotate_half(k) * sin[:, None]
        if cache is not None:
            k, v = cache.update(k, v, attn.layer_idx, kwargs=kwargs)
        if not len(rows):
            return q_input
        cos, sin = (x.expand(*hidden_states.shape[:2], -1).flatten(0, 1)[rows] for x in (cos, sin))
        q = self._heads(attn.q_proj(q_input))
        q = q * cos + rotate_half(q) * sin
        mixed = self._attend(q[0].transpose(0, 1), k, v, mask)[None]
        return attn.o_proj(run.skip(self.index, "o", mixed))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The gated FFN, SwiGLU in a Llama; ``[..., D] -> [..., D]``."""
        run, mlp = self.run, self.mlp
        if run is None:
            return type(mlp).forward(mlp, x)
        x = run.skip(self.index, "gate_up", x)
        return mlp.down_proj(run.skip(self.index, "down", mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))

    def _ffn(self, h: Tensor) -> Tensor:
        """``h`` plus the FFN of its norm, for the rows that keep it; ``[..., D] -> [..., D]``."""
        run, layer = self.run, self.layer
        x = layer.post_attention_layernorm(h)
        keep = run.decide(self.index, "ffn", x.view(-1, x.shape[-1]))
        if keep is None:
            return h + layer.mlp(x)
        if not run.mode.compact:
            keep = keep.view(*x.shape[:-1], 1).to(x.dtype)
            out, instead = h + layer.mlp(x) * keep, run.stand_in(self.index, x)
            return out if instead is None else out + instead * (1 - keep)
        flat, out = x.view(-1, x.shape[-1]), h.view(-1, h.shape[-1])
        kept, left = keep.nonzero().view(-1), (~keep).nonzero().view(-1)
        if len(kept):
            out = out.index_add(0, kept, layer.mlp(flat[kept][None])[0].to(h.dtype))  # autocast gives another dtype
        if len(left) and (instead := run.stand_in(self.index, flat[left])) is not None:
            out = out.index_add(0, left, instead.to(h.dtype))
        return out.view(h.shape)

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, T, heads*h] -> [B, heads, T, h]``."""
        return x.view(*x.shape[:-1], -1, self.attn.head_dim).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention for the running rows only, each sequence padded to the largest count.

        ``q [n, H, h]``, k and v ``[B, G, K, h]``, mask ``[B or 1, 1, T, K]`` or None, causal -> ``[n, H*h]``.
        """
        state, rows = self.run.state, self.run.rows
        b, t, keys = state.batch, state.tokens, k.shape[2]
        row, column = rows // t, rows % t
        counts = torch.bincount(row, minlength=b)
        slot = torch.arange(len(rows), device=row.device) - (counts.cumsum(0) - counts)[row]
        width = int(counts.max())
        padded = q.new_zeros(b, width, *q.shape[1:]).index_put((row, slot), q)
        if mask is None:  # plain causal: queries are at the last t keys
            mask = torch.ones(t, keys, dtype=torch.bool, device=q.device).tril(keys - t).expand(b, 1, t, keys)
        # Slots beyond a sequence's count repeat the mask of its first token; nothing reads them.
        where = torch.zeros(b, width, dtype=torch.long, device=q.device).index_put((row, slot), column)
        seen = mask.expand(b, -1, -1, -1).gather(2, where[:, None, :, None].expand(b, mask.shape[1], width, keys))
        out = F.scaled_dot_product_attention(
            padded.transpose(1, 2), k, v, attn_mask=seen, scale=self.attn.scaling, enable_gqa=True
        )
        return out.transpose(1, 2)[row, slot].flatten(1)
