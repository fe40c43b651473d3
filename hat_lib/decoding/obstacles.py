"""What keeps the engine from running: a kind of base, what was done to a base, a setting, a call of forward."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import output_capturing

from hat_lib.base.dispatch import is_dispatched, overridden
from hat_lib.base.families import head_size, linears, window
from hat_lib.engine.arrays import MAX_TOKENS
from hat_lib.engine.cache import GrowingLayer, holds
from hat_lib.method.setting import Setting

ROPES = ("default", "linear", "llama3", "yarn")
"""rotary embeddings whose angles depend on the position alone"""
ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "cache", "use_cache", "logits_to_keep", "return_dict",
             "tokenizer"}  # fmt: skip
"""of forward, that the engine knows or may ignore"""
FARTHEST = 1 << 18
"""position up to which the engine keeps a table of angles"""


def of_base(lm, granularity: str) -> str | None:
    """Why the engine can run no forward of a base; None if it can."""
    config, layers = lm.config, lm.model.layers
    rope = config.rope_parameters.get("rope_type", "default")
    return _first(
        (is_dispatched(lm), "the base is spread over devices"),
        (any(map(overridden, lm.modules())), "another library overrides a forward of the base"),
        (granularity not in ("channel", "token"), f"the engine does not know the {granularity} grain"),
        (config.hidden_act not in ("silu", "swish"), f"the FFN's activation is {config.hidden_act}"),
        (rope not in ROPES, f"rotary embeddings of type {rope}"),
        (head_size(config) % 2, "heads of an odd size"),
        (any(window(layer.self_attn) for layer in layers), "attention is limited to a window"),
        ({*map(type, linears(lm)), type(lm.lm_head)} != {nn.Linear}, "a linear layer of the base is not a plain one"),
        (getattr(lm.lm_head, "bias", None) is not None, "the head has a bias"),
    )


class Snapshot:
    """A base as it was when a model was attached, with the model's own forwards and ``hooks``."""

    def __init__(self, lm, n_layers: int, hooks: list[RemovableHandle]):
        self.lm, self.n_layers, self._modules = lm, n_layers, list(lm.modules())
        self._forwards = {m for m in self._modules if overridden(m)} | {lm}
        self._hooks = {id(handle.hooks_dict_ref()[handle.id]) for handle in hooks}

    def obstacle(self) -> str | None:
        """What was done to the base since then, if it keeps the engine from running."""
        lm, modules = self.lm, list(self.lm.modules())
        others = [module for module in modules if module not in self._forwards]
        everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        return _first(
            (lm.device.type != "cpu", f"the model is on {lm.device.type}"),
            (lm.dtype not in (torch.float32, torch.bfloat16), f"weights are {lm.dtype}"),
            (modules != self._modules, "a module of the base was replaced, as by an adapter"),
            (any(map(overridden, others)), "another library overrides a forward of the base"),
            (any(id(hook) not in self._hooks for m in modules for hook in _hooks(m)), "there are hooks on the base"),
            (everywhere, "there are hooks on all modules"),
            (lm.config.num_hidden_layers != self.n_layers, "drafts by some of the layers were asked for"),
            (lm.training, "the model is in training mode"),
        )


def of_setting(setting: Setting) -> str | None:
    """What in a setting keeps the engine from running."""
    return _first(
        (setting.engine is False, "asked for"),
        (setting.record or not setting.compact, "decisions are recorded, or masks multiplied"),
        (setting.decide is not None, "decisions are not the method's own"),
        (setting.leave is not None, "exits are not the method's own"),
        (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling(), "autocast or torch.compile"),
    )


def _first(*obstacles: tuple[object, str]) -> str | None:
    """The first that there is."""
    return next((why for there, why in obstacles if there), None)


def fits(cache: Cache | None, lm, batch: int) -> bool:
    """Whether the engine can write so many rows to a cache."""
    if getattr(cache, "plain", type(cache)) is not DynamicCache or len(cache.layers) != len(lm.model.layers):
        return False
    shape = batch, lm.config.num_key_value_heads, head_size(lm.config), lm.lm_head.weight.dtype
    return all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers) and holds(cache, shape)


def places(position: Tensor | None, batch: int, tokens: int | None = None) -> bool:
    """Whether the engine has the angles of these ``position_ids``, of so many tokens, if given."""
    if position is None:
        return True
    tokens = position.shape[-1] if tokens is None else tokens
    if position.dtype != torch.int64 or position.shape not in ((1, tokens), (batch, tokens)):
        return False
    return int(position.min()) >= 0 and int(position.max()) < FARTHEST


def takes(given: dict, lm) -> bool:
    """Whether a call of forward is one for the engine: a few tokens, a cache, and only logits asked for."""
    ids, cache = given.get("input_ids"), given.get("cache")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not 0 < ids.numel() <= MAX_TOKENS or ids.dtype != torch.int64:
        return False
    if not places(given.get("position_ids"), *ids.shape):
        return False
    if any(value is not None and value is not False for name, value in given.items() if name not in ARGUMENTS):
        return False
    if not fits(cache, lm, len(ids)) or given.get("use_cache") is False or given.get("return_dict") is False:
        return False
    return not (torch.is_grad_enabled() or lm.config.output_hidden_states or lm.config.output_attentions)


def _hooks(module: nn.Module) -> list:
    """A module's hooks, without those that transformers leaves once hidden states have been asked for."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__module__", None) != output_capturing.__name__]
