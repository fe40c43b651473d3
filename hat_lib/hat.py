"""HierarchicalTransformer: routers and exit gates fitted onto a frozen base::

    hat = HierarchicalTransformer.from_pretrained("default")
    hat.capacity = 0.75
    hat.lm.generate(...)

``hat.lm`` is the base's own causal LM of transformers, so generate, pipeline, hooks, LoRA and evaluation harnesses take
it as it is; `unload` restores it. Any number of threads may run one model: each has its own ``hat.trace``, and a
context such as ``with hat.at(0.5)`` applies only to the thread that entered it. The method (`hat_lib.method`) says what
a forward computes, and `hat_lib.decoding` makes the tokens of a text fast.
"""

import copy
import threading
import warnings
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from hat_lib.base.dispatch import device_of, is_dispatched, overridden, override, restore, tensors
from hat_lib.base.families import LINEARS
from hat_lib.base.load import Base, fingerprint, load_base
from hat_lib.base.watch import Watch
from hat_lib.checkpoint import Checkpoint, Price, check_tensors, is_hat_parameter, read_checkpoint, write_checkpoint
from hat_lib.config import HatConfig, HatError
from hat_lib.contexts import Contexts
from hat_lib.decoding import steering
from hat_lib.decoding.generate import Decoding
from hat_lib.hub import push_to_hub
from hat_lib.method import head
from hat_lib.method.forward import Forward
from hat_lib.method.grain import grain_named
from hat_lib.method.layer import AdaptiveLayer
from hat_lib.method.routers import ExitGate, column_norm
from hat_lib.method.setting import Context, Setting
from hat_lib.method.thresholds import Calibration, Thresholds
from hat_lib.method.trace import Masks, Trace

# In the order in which `LlamaModel.forward` takes them.
ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")


class HierarchicalTransformer(Contexts, nn.Module):
    """A frozen base with routers and exit gates.

    Args:
        base: its model is adapted in place until `unload`.
        config: the method's shape; `HatConfig.default(base)` or `HatConfig.published(base)`.
        calibration: thresholds for any capacity; without it only capacity 1.0 and policies of your own are possible.

    Raises `HatError`, and leaves the base as it was, if these do not fit each other, or the base is already adapted.

    >>> hat = HierarchicalTransformer(base, HatConfig.default(base))
    >>> hat.lm is base.model, hat.capacity
    (True, 1.0)
    """

    def __init__(self, base: Base, config: HatConfig, calibration: Calibration | None = None):
        super().__init__()
        if not isinstance(base, Base):
            raise HatError(f"base must be a Base, as load_base gives it, got {type(base).__name__}")
        lm, grain, width = base.model, grain_named(config.granularity), base.model.config.hidden_size
        layers = lm.model.layers
        if config.n_layers != len(layers):
            raise HatError(f"the config is for {config.n_layers} layers, {base.name} has {len(layers)}")
        if any(map(overridden, layers)):
            raise HatError(f"layers of {base.name} are already adapted: call unload() first, or load the base again")
        self.base, self.lm, self.config, self.grain = base, lm, config, grain
        self.training_summary: dict | None = None
        self.prices: list[Price] = []
        """perplexity over the base's at some capacities, as the checkpoint was measured; none for a new calibration"""
        work = grain.site_work(lm.config)
        self.site_work = [work[s] / sum(work.values()) for s in grain.sites]
        """work of each site, as a fraction of a layer's routable work"""
        self.head_work = lm.config.vocab_size * width / sum(work.values())
        """work of the head, as a multiple of a layer's routable work"""
        self.mask_shapes = {site: grain.mask_shape(lm.config, site) for site in grain.sites}
        """shape of one token's decision, by site"""

        self.routers = nn.ModuleDict(self._new_routers())
        self.gates = nn.ModuleDict({str(e): ExitGate(width, config.translator_rank) for e in config.exit_layers})
        places, rank = [(i, site) for i in range(len(layers)) for site in grain.sites], config.correction_rank
        found = {(i, s): grain.correction(layers[i], i, s, rank) for i, s in places if rank is not None}
        self.corrections = nn.ModuleDict({f"{i}_{s}": new for (i, s), new in found.items() if new is not None})
        self._own = self.routers, self.gates, self.corrections
        for own in self._own:  # by layer, and where that layer is: a base may be spread over devices
            for name, module in own.items():
                module.to(device_of(layers[int(name.split("_")[0])].input_layernorm))
        self.eval()

        self._refreshing = threading.Lock()
        capacity, exit_rate = (config.capacity, config.exit_rate) if calibration else (1.0, 0.0)
        shared = [Setting(self._dense._replace(capacity=capacity, exit_rate=exit_rate))]
        self._context = Context(shared, ContextVar("forwards", default=()))
        self._decoding = Decoding(self, self._context)
        self.layers = [AdaptiveLayer(layer, i, self._context, layer is layers[-1]) for i, layer in enumerate(layers)]
        self.calibration = calibration
        self._attach()
        self.capacity = capacity  # warns about a grain that loses much

    def _new_routers(self) -> dict[str, nn.Module]:
        layers = enumerate(self.lm.model.layers)
        return {f"{i}_{name}": router for i, layer in layers for name, router in self.grain.routers(layer).items()}

    def _attach(self) -> None:
        context, layers = self._context, self.lm.model.layers
        for adaptive in self.layers:
            adaptive.attach()
        self._hooks = head.attach(self.lm.lm_head, lambda: context.reading)
        for name, correction in self.corrections.items():
            layer, site = name.split("_", 1)
            linears = [layers[int(layer)].get_submodule(linear) for linear in LINEARS.get(site, ())]
            self._hooks += correction.attach(linears, lambda: context.forward.strength if context.forward else 0.0)
        self._foreign = overridden(self.lm.model)
        override(self.lm.model, self._run_layers)
        self._decoding.attach(self._hooks)
        self._watches = Watch(self.lm), Watch(*self._own)

    def _detach(self) -> None:
        self._decoding.detach()
        for hook in self._hooks:
            hook.remove()
        override(self.lm.model, self._foreign) if self._foreign else restore(self.lm.model)
        for adaptive in self.layers:
            adaptive.detach()

    def unload(self) -> Base:
        """Take everything off and return the base, as it was before. The model cannot be used afterwards."""
        if self.layers:
            self.refresh()
            self._detach()
            self.layers = []
            self._context.shared[:] = [Setting(self._dense)]  # for hooks that an adapter copied along with a module
        return self.base

    def __repr__(self) -> str:
        if not self.layers:
            return f"HierarchicalTransformer ({self.grain.name} grain), unloaded from {self.base.name}"
        count = sum(parameter.numel() for parameter in self.hat_parameters().values())
        return (
            f"HierarchicalTransformer ({self.grain.name} grain) on {self.base}\n"
            f"  {count:,} parameters, exits {list(self.gates)}, corrections of rank {self.config.correction_rank}\n"
            f"  capacity {self.capacity}, exit rate {self.exit_rate}; decoding: {self.decoding}"
        )

    def forward(self, *args, **kwargs):
        """Raises `HatError`: ``hat.lm`` is what one calls."""
        raise HatError("a HierarchicalTransformer is not called itself: call hat.lm, a LlamaForCausalLM")

    def _check_loaded(self) -> None:
        if not self.layers:
            raise HatError("this model was unloaded from its base: attach a new HierarchicalTransformer")

    def _apply(self, fn, recurse=True):
        """Move or cast the base; routers and gates move along and stay fp32."""
        if is_dispatched(self.lm):
            raise HatError("the base is spread over devices and cannot be moved or cast: load it again as it should be")
        self._decoding.forget()
        # Rotary frequencies stay fp32 in every dtype, as in a base loaded in that dtype.
        exact = {id(t) for module in (*self._own, self.lm.model.rotary_emb) for t in tensors(module)}
        for t in tensors(self):
            moved = fn(t.data)
            t.data = t.data.to(moved.device) if id(t) in exact else moved
        self.lm.config.dtype = self.lm.dtype
        self._watches = Watch(self.lm), Watch(*self._own)
        return self

    def __deepcopy__(self, memo) -> Self:
        """An independent model on a copy of the base, with this one's settings; not while another thread runs."""
        self._check_loaded()
        if any(id(module) in memo for module in self.lm.modules()):
            raise HatError("hat.lm cannot be copied without its routers: use copy.deepcopy(hat), or copy hat.unload()")
        self._detach()
        try:
            base = replace(self.base, model=copy.deepcopy(self.lm, memo))
        finally:
            self._attach()
        twin = memo[id(self)] = HierarchicalTransformer(base, self.config)
        twin.load_state_dict(self.state_dict())
        twin.calibration, twin.training_summary = self.calibration, copy.deepcopy(self.training_summary)
        twin.prices, own = list(self.prices), Setting(twin._dense, weight_format=self.weight_format)
        twin._context.setting = twin._at(own, self.calibration, capacity=self.capacity, exit_rate=self.exit_rate)
        for module, copied in zip(self.modules(), twin.modules(), strict=True):
            copied.training = module.training
        for parameter, copied in zip(self.parameters(), twin.parameters(), strict=True):
            copied.requires_grad_(parameter.requires_grad)
        return twin

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def weight_format(self) -> str:
        """How the engine keeps its weights: "base", as the base has them; or, approximately, "int8", with a scale per
        output, or "q4", with a scale and an offset per 32 channels, both with inputs rounded to eight bits. Prefill
        reads the base's own."""
        return self._context.setting.weight_format

    @weight_format.setter
    def weight_format(self, value: str) -> None:
        self._decoding.check_format(value)
        if value != self.weight_format:
            self._decoding.forget()
        self._context.setting = self._context.setting.holding(weight_format=value)

    @property
    def packed_bytes(self) -> int:
        """Bytes that the engine's weights take besides the base's; 0 before its first use."""
        return self._decoding.packed_bytes

    @property
    def decoding(self) -> str:
        """What would run the next decode step of ``lm.generate``, and why."""
        return self._decoding.describe()

    @property
    def text_traces(self) -> list[Trace]:
        """Of the forwards that read the text of this thread's last ``lm.generate``, its prompt's first; without those
        that a logits processor or a streamer made meanwhile."""
        return self._decoding.traces

    def prepare(self) -> float:
        """Pack and compile now what ``lm.generate`` needs as the model is set, so that the first text does not wait for
        it; returns the seconds that it took."""
        return self._decoding.prepare()

    @torch.inference_mode()
    def replay(self, ids: Tensor, cache: Cache, mask: Tensor | None = None) -> None:
        """Decode a known text, int64 ``[B, T]``, a token at a time, as ``lm.generate`` decodes its own: to time it, or
        to see its trace. ``mask [B, T in the cache and here]`` is 0 at left padding."""
        self._decoding.replay(ids, cache, mask)

    # -- what happens in a forward -----------------------------------------------------------------

    @property
    def trace(self) -> Trace | None:
        """What the last forward of this thread decided, or the one under way; None before the first."""
        return self._context.trace

    def scores(self, layer: int, site: str, x: Tensor) -> Tensor:
        """The router's scores inside a forward, token sensitivity applied: ``x [n, C] -> [n, units]`` or ``[n]``."""
        return self.grain.score(self.routers, layer, site, x, self.trace)

    def keeps(self, layer: int, site: str, x: Tensor) -> Tensor | None:
        """What the method itself keeps, for a policy that changes some of it: bool, like `scores`; None for all."""
        if (forward := self._context.forward) is None:
            raise HatError("keeps answers a policy, inside a forward: with hat.using(policy)")
        return forward.keep(layer, site, x)

    def new_forward(self, setting: Setting | None = None) -> Forward:
        """One that decides by a setting; None for that of this moment."""
        return Forward(setting or self._context.setting, self.grain, self.routers, self.gates, self.corrections)

    @torch.compiler.disable(recursive=False)
    def _run_layers(self, *args, **kwargs):
        """The forward of ``lm.model``: the base's own loop over layers, which decide by the setting of this moment or,
        if the whole causal LM runs, of the moment at which that began."""
        context, model = self._context, self.lm.model
        own = self._foreign or type(model).forward.__get__(model)
        whole = context.forwards and context.forwards[-1].trace is None
        forward = context.forwards[-1] if whole else self.new_forward()

        def run_layers():
            self._begin_layers(forward, args, kwargs)
            out = own(*args, **kwargs)
            forward.in_layers, forward.trace.text = False, None
            forward.reading = self._reading(forward.setting.thresholds, forward.trace)
            return out

        if whole:
            return run_layers()
        out = context.run(forward, run_layers)
        self.end(forward)
        return out

    def _begin_layers(self, forward: Forward, args: tuple, kwargs: dict) -> None:
        """Give it a fresh trace, from the 2-D mask, the positions and the cache's length."""
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        cache = given.get("cache", given.get("past_key_values"))
        if cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
            raise HatError("static KV caches are not supported: leave cache_implementation unset (dynamic)")
        if device_of(self.lm.model.layers[0].input_layernorm) != next(self.routers.parameters()).device:
            raise HatError("the base was moved under the model: use hat.to(...), not hat.lm.to(...)")
        for ours, layer in zip(self.layers, self.lm.model.layers, strict=False):
            if (ours.layer, ours.attn, ours.mlp) != (layer, layer.self_attn, layer.mlp):
                raise HatError(f"layer {ours.index}, its attention or its FFN was replaced: do so before attaching")
        start = cache.get_seq_length() if cache is not None else 0
        if not start:
            self.refresh()
        places = Trace.places(tokens, given.get("attention_mask"), given.get("position_ids"), start)
        forward.trace, forward.cache = self.new_trace(forward.setting, *places, start, cache), cache
        forward.trace.text = (tokens if tokens.dim() == 2 else torch.zeros_like(places[1])), cache
        forward.any_protected = bool(forward.trace.protected.any())
        forward.in_layers = True

    def logits(self, states: Tensor) -> Tensor:
        """``[..., V]``: what the head now makes of the last forward's final states ``[..., D]``; its trace counts that.
        Called by hand, ``hat.lm.lm_head`` is the base's head."""
        forward = self.new_forward()
        forward.reading = self._reading(forward.setting.thresholds, self._context.last)
        return self._context.run(forward, self.lm.lm_head, states)

    def _reading(self, thresholds: Thresholds, trace: Trace | None) -> head.Reading | None:
        if not thresholds.shortlist:
            return None
        return head.Reading(thresholds, self.head_norm, trace.note_head if trace else lambda share: None)

    @cached_property
    def head_norm(self) -> Tensor:
        """Of the head's columns, fp32 ``[D]``: what the scores of its channels are weighted by."""
        return column_norm(self.lm.lm_head)

    def refresh(self) -> None:
        """Make anew what was derived from weights (norms, packed copies, the base's fingerprint) if these have
        changed; done at each prompt. Warns if the base has changed."""
        changed = False
        with self._refreshing:
            base, own = self._watches
            if (weights := base.look()) != base.seen:
                for name, router in self._new_routers().items():
                    for buffer, fresh in zip(self.routers[name].buffers(), router.buffers(), strict=True):
                        buffer.copy_(fresh)
                vars(self).pop("head_norm", None)
                identity = fingerprint(self.lm)
                if changed := identity != self.base.fingerprint:
                    self.prices = []
                    self.base = replace(self.base, fingerprint=identity)
            if (weights, trained := own.look()) != (base.seen, own.seen):
                self._decoding.forget()
            # Last, so that what an interrupt cut off is made again at the next prompt.
            base.seen, own.seen = weights, trained
        if changed:
            what = "weights of the base were changed under the model: scores follow, thresholds do not"
            warnings.warn(what, stacklevel=2)

    def new_trace(self, setting: Setting, real: Tensor, position: Tensor, start: int, cache: Cache | None) -> Trace:
        """A trace for a forward to fill in, of tokens at these `Trace.places`, which say who is protected."""
        protected, thresholds = real & (position < self.config.protected_tokens), setting.thresholds
        trace = Trace(real, position, protected, self.site_work, self.config.n_layers, start)
        trace.mask_shapes, trace.masks = self.mask_shapes, Masks() if setting.record else None
        trace.routed = setting.decide is not None or thresholds.skips
        trace.gated = setting.leave is not None or thresholds.leaves
        trace.corrected = thresholds.correction > 0
        if thresholds.shortlist:
            trace.head_work, trace.expected_head_share = self.head_work, thresholds.head_share
        if setting.gain:
            scale = np.exp(steering.offsets(cache, trace.batch, start)).repeat(trace.tokens)
            trace.steering = torch.from_numpy(scale).to(real.device)
        return trace

    def end(self, forward: Forward) -> None:
        """Steer by what a forward ran, and keep its trace."""
        steering.move(forward.cache, forward.trace, forward.setting.thresholds, forward.setting.moving)
        self.note(forward.trace)

    def note(self, trace: Trace) -> None:
        """Keep the trace of a forward that has ended."""
        self._context.last = trace
        for traces in self._context.collectors:
            traces.append(trace)

    # -- checkpoints -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: Base | str | Path | None = None, *, dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Self:  # fmt: skip
        """Load a checkpoint onto its base.

        Args:
            folder: as for `find_checkpoint`.
            base: a loaded `Base`, or the name of one; by default the name that the checkpoint carries.
            dtype, device: for the base; see `load_base`.

        Raises `HatError` if a file, a key, a shape or the base is not as expected; a given base is left as it was.

        >>> hat.save_pretrained("mine")
        >>> HierarchicalTransformer.from_pretrained("mine").config == hat.config
        True
        """
        checkpoint = read_checkpoint(folder)
        if not isinstance(base, Base):
            base = load_base(base or checkpoint.base, dtype=dtype, device=device)
        checkpoint.check_base(base, folder)
        hat = cls(base, checkpoint.config, checkpoint.calibration)
        hat.training_summary, hat.prices = checkpoint.training, checkpoint.prices
        try:
            hat.load_adapter(checkpoint, folder)
        except BaseException:
            hat.unload()
            raise
        return hat

    def load_adapter(self, checkpoint: Checkpoint, where: str | Path = "the checkpoint") -> None:
        """Copy a checkpoint's routers and gates; nothing is copied unless all of it fits (`HatError`)."""
        parameters = self.hat_parameters()
        check_tensors(checkpoint.tensors, parameters, where)
        with torch.no_grad():
            for name, tensor in checkpoint.tensors.items():
                parameters[name].copy_(tensor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write routers, gates, config and calibration; never the base."""
        write_checkpoint(folder, self.checkpoint())

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Upload what `save_pretrained` writes; see `hat_lib.hub.push_to_hub`."""
        return push_to_hub(self.checkpoint(), repo_id, **options)

    def checkpoint(self) -> Checkpoint:
        """What `save_pretrained` writes."""
        if self.layers:
            self.refresh()
        parts = self.base.name, self.base.fingerprint, self.hat_parameters(), self.calibration
        return Checkpoint(self.config, *parts, self.training_summary, self.prices)

    def hat_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: all that a checkpoint saves."""
        return {n: p for n, p in self.named_parameters() if is_hat_parameter(n)}
