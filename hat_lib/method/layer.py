"""The adaptive decoder layer: one rule for prefill, decode and any batch. This is the method's definition.

It overrides `forward` on the decoder layer of one of the `families`, its attention and its FFN; the loop over layers,
linear layers and norms stay the base's own, so hooks and LoRA see the base's class. The grain decides at some of five
sites: the inputs "qkv", "o", "gate_up" and "down" of linear layers, of which `Forward.skip` zeroes what is skipped, and
"ffn", the whole FFN. Rows that do not run are gathered out: linear layers then see ``[1, n, ...]``.

A token that has exited keeps a frozen hidden state and still gets K and V in each later layer, computed from that
state, but no query, attention output or FFN. So the cache stays dense, and later tokens see a key for every token.
"""

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, eager_attention_forward, rotate_half

from hat_lib.base.dispatch import override, restore
from hat_lib.base.families import head_norms, rotates, window
from hat_lib.method.forward import Forward
from hat_lib.method.setting import Context


class AdaptiveLayer:
    """Replaces the forwards of a decoder layer of transformers, from `attach` to `detach`."""

    def __init__(self, layer: nn.Module, index: int, context: Context, last: bool = False):
        self.layer, self.index, self.context, self.last = layer, index, context, last
        self.attn, self.mlp = layer.self_attn, layer.mlp
        self.modules = layer, self.attn, self.mlp
        self.q_norm, self.k_norm = head_norms(layer) or (nn.Identity(), nn.Identity())
        self.rotates, self.window = rotates(layer.self_attn), window(layer.self_attn)

    def attach(self) -> None:
        for module, forward in zip(self.modules, (self.forward, self.attention, self.feed_forward), strict=True):
            override(module, forward)

    def detach(self) -> None:
        for module in self.modules:
            restore(module)

    @property
    def run(self) -> Forward | None:
        """The model's forward that is under way; None if a part is called by hand: it then acts as the base's."""
        return self.context.forward

    @torch.compiler.disable  # it branches on what each token needs
    def forward(self, hidden_states: Tensor, **given) -> Tensor:
        """``[B, T, D] -> [B, T, D]``; ``given`` is what attention takes besides the hidden states."""
        run, layer = self.run, self.layer
        if run is None:
            return type(layer).forward(layer, hidden_states, **given)
        if run.last_only and self.last and hidden_states.shape[1] > 1:
            return self._last_token(hidden_states, **given)
        h = run.exit(self.index, hidden_states)
        mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **given)
        if not mixed.numel():
            return h
        out = run.scatter(self._ffn(run.gather(h) + mixed), h)
        if run.trace.alive is not None and not run.setting.compact:  # exited rows were computed too: discard them
            out = torch.where(run.trace.exited[..., None].to(h.device), h, out)
        return out

    def attention(self, hidden_states: Tensor, position_embeddings, attention_mask=None, cache=None, **kwargs):
        """Normed ``[B, T, D]`` -> attention output for the running rows, ``[B, T, D]`` or ``[1, n, D]``; weights."""
        run, attn = self.run, self.attn
        if run is None:
            return type(attn).forward(attn, hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        x = run.skip(self.index, "qkv", run.gather(hidden_states))
        everyone, q = run.scatter(x, hidden_states), attn.q_proj(x)
        # Exited rows of a batch get a query of zeros, whose result nobody reads.
        q = run.scatter(q, q.new_zeros(*hidden_states.shape[:2], q.shape[-1]))
        q, k, v = map(self._heads, (q, attn.k_proj(everyone), attn.v_proj(everyone)))
        q = self._placed(q, self.q_norm, *position_embeddings)
        k = self._placed(k, self.k_norm, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, attn.layer_idx, kwargs=kwargs)
        if not x.numel():
            return x, None
        mixed, weights = self._attend(q, k, v, attention_mask, **kwargs)
        return attn.o_proj(run.skip(self.index, "o", run.gather(mixed.flatten(2)))), weights

    def feed_forward(self, x: Tensor) -> Tensor:
        """The gated FFN, SwiGLU in a Llama; ``[..., D] -> [..., D]``."""
        run, mlp = self.run, self.mlp
        if run is None:
            return type(mlp).forward(mlp, x)
        x = run.skip(self.index, "gate_up", x)
        return mlp.down_proj(run.skip(self.index, "down", mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))

    def _last_token(self, h: Tensor, position_embeddings, attention_mask=None, cache=None, **kwargs) -> Tensor:
        """The base's layer for the last token of each sequence; the others, whose outputs nobody reads, get K and V."""
        run, attn, (cos, sin) = self.run, self.attn, position_embeddings
        x = run.skip(self.index, "qkv", self.layer.input_layernorm(h))
        k, v = map(self._heads, (attn.k_proj(x), attn.v_proj(x)))
        k, v = cache.update(self._placed(k, self.k_norm, cos, sin), v, attn.layer_idx, kwargs=kwargs)
        q = self._placed(self._heads(attn.q_proj(x[:, -1:])), self.q_norm, cos[:, -1:], sin[:, -1:])
        mixed, _ = self._attend(q, k, v, None if attention_mask is None else attention_mask[..., -1:, :], **kwargs)
        last = h[:, -1:] + attn.o_proj(run.skip(self.index, "o", mixed.flatten(2)))
        return torch.cat([h[:, :-1], self._ffn(last)], dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs):
        attn = self.attn
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager_attention_forward)
        return attend(attn, q, k, v, mask, dropout=0.0, scaling=attn.scaling, sliding_window=self.window, **kwargs)

    def _ffn(self, h: Tensor) -> Tensor:
        """``h`` plus the FFN of its norm, for the rows that keep it; ``[..., D] -> [..., D]``."""
        run, layer = self.run, self.layer
        x = layer.post_attention_layernorm(h)
        keep = run.decide(self.index, "ffn", x.view(-1, x.shape[-1]))
        if keep is None:
            return h + layer.mlp(x)
        if not run.setting.compact:
            keep, stand_in = keep.view(*x.shape[:-1], 1).to(x.dtype), run.stand_in(self.index, x)
            out = h + layer.mlp(x) * keep
            return out if stand_in is None else out + stand_in * (1 - keep)
        flat, out = x.view(-1, x.shape[-1]), h.view(-1, h.shape[-1])
        kept, left = keep.nonzero().view(-1), (~keep).nonzero().view(-1)
        if len(kept):
            out = out.index_add(0, kept, layer.mlp(flat[kept][None])[0].to(h.dtype))  # autocast gives another dtype
        if len(left) and (stand_in := run.stand_in(self.index, flat[left])) is not None:
            out = out.index_add(0, left, stand_in.to(h.dtype))
        return out.view(h.shape)

    def _placed(self, heads: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys, ``[B, heads, T, h]``, with their norm and rotary embedding, if the layer has them."""
        heads = norm(heads)
        return heads * cos[:, None] + rotate_half(heads) * sin[:, None] if self.rotates else heads

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, T, heads*h] -> [B, heads, T, h]``."""
        return x.view(*x.shape[:-1], -1, self.attn.head_dim).transpose(1, 2)
