"""HierarchicalTransformer: routers and exit gates fitted onto a frozen Llama.

    hat = HierarchicalTransformer.from_pretrained("default")
    hat.capacity = 0.75
    hat.lm.generate(...)

``hat.lm`` is the base's own `LlamaForCausalLM`, so generate, pipeline, hooks, LoRA and evaluation harnesses take it as
it is, and ``hat.lm.save_pretrained`` writes what plain transformers loads. Its decoder layers are the same objects with
`forward` overridden on the instance (`hat_lib.model.decoder_layer`); `unload` restores them.

Any number of threads may run one model: each has its own ``hat.trace``, and a context such as ``with hat.at(0.5)``
applies only to the thread that entered it.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from hat_lib.backbone.base import Base, fingerprint, first_line, load_base
from hat_lib.backbone.shapes import LINEARS
from hat_lib.config import HatConfig, HatError, check_capacity, check_exit_rate
from hat_lib.model.checkpoint import (
    Checkpoint,
    Price,
    check_tensors,
    is_hat_parameter,
    push_to_hub,
    read_checkpoint,
    write_checkpoint,
)
from hat_lib.model.corrections import Corrections, strength
from hat_lib.model.decoder_layer import AdaptiveLayer
from hat_lib.model.fast_path import WEIGHT_FORMATS, FastPath
from hat_lib.model.forward_pass import ForwardPass
from hat_lib.model.granularity import GRAINS, column_norm, head_norm
from hat_lib.model.head import Shortlist, ShortlistHooks
from hat_lib.model.modes import Context, Mode, Modes
from hat_lib.model.policies import ExitThresholds, Forced, KeepAll, Threshold, prefixes, token_threshold_scale
from hat_lib.model.routers import ChannelRouter, ExitGate, MoERouter
from hat_lib.model.steering import move, offsets
from hat_lib.model.threshold_table import Calibration
from hat_lib.model.token_state import Masks, TokenState
from hat_lib.model.watch import Watch

POOR = (
    "skipping whole FFNs of a frozen base multiplies perplexity (see data/results); the channel grain keeps far more "
    "at equal work"
)
# In the order in which `LlamaModel.forward` takes them.
ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")


class HierarchicalTransformer(Modes, nn.Module):
    """A frozen base with routers and exit gates.

    Args:
        base: its model is adapted in place until `unload`.
        config: the method's shape; `HatConfig.default(base)` or `HatConfig.published(base)`.
        calibration: thresholds for any capacity, from `hat_lib.calibration`; without it only capacity 1.0,
            forced decisions and policies of your own are possible.

    Raises `HatError`, and leaves the base as it was, if config or calibration are for another shape, or if the base is
    already adapted.
    """

    def __init__(self, base: Base, config: HatConfig, calibration: Calibration | None = None):
        super().__init__()
        if not isinstance(base, Base):
            raise HatError(f"base must be a Base, as load_base gives it, got {type(base).__name__}")
        if not isinstance(config, HatConfig):
            raise HatError(f"config must be a HatConfig, such as HatConfig.default(base), got {type(config).__name__}")
        lm, grain, width = base.model, GRAINS[config.granularity], base.model.config.hidden_size
        if config.n_layers != lm.config.num_hidden_layers:
            raise HatError(f"the config is for {config.n_layers} layers, {base.name} has {lm.config.num_hidden_layers}")
        for name in ("translator_rank", "correction_rank"):
            if (rank := getattr(config, name) or 0) > width:
                raise HatError(f"{name} must be at most {width}, the hidden size of {base.name}, got {rank}")
        if calibration is not None:
            calibration.check(config)
        for override in filter(None, (vars(layer).get("forward") for layer in lm.model.layers)):
            if isinstance(getattr(override, "__self__", None), AdaptiveLayer):
                ways = "call its unload() first, or load the base again"
                raise HatError(f"{base.name} already carries a HierarchicalTransformer: {ways}")
            raise HatError(
                f"{base.name} has a decoder layer whose forward another library overrides: take that off first"
            )
        self.base, self.lm, self.config, self.grain = base, lm, config, grain
        self._calibration = calibration
        self.training_summary: dict | None = None
        self.prices: list[Price] = []
        """perplexity over the base's at some capacities, as the checkpoint was measured; none for a new calibration"""
        work = grain.site_work(lm.config)
        self.site_work = [work[s] / sum(work.values()) for s in grain.sites]
        """work of each site, as a fraction of a layer's routable work"""

        self.routers = nn.ModuleDict()
        for i, layer in enumerate(lm.model.layers):
            for site in grain.sites:
                router = MoERouter(width) if site == "ffn" else ChannelRouter(column_norm(layer, site))
                self.routers[f"{i}_{site}"] = router
            if config.granularity == "channel":
                self.routers[f"{i}_token"] = MoERouter(width)
        self.gates = nn.ModuleDict({str(e): ExitGate(width, config.translator_rank) for e in config.exit_layers})
        self.corrections = nn.ModuleDict()
        if config.correction_rank is not None:
            self.corrections = Corrections(lm.model.layers, config.granularity, config.correction_rank)
        for own in self._own:
            own.to(base.device)
        head = lm.config.vocab_size * width
        self.head_work = head / sum(work.values())
        """work of the head, as a multiple of a layer's routable work"""
        self._head_norm: Tensor | None = None
        self._looking = threading.Lock()
        self.eval()

        self._context = Context(SimpleNamespace(mode=Mode()))
        self._fast = FastPath(self, self._context)
        self.layers = [AdaptiveLayer(layer, i, self._context) for i, layer in enumerate(lm.model.layers)]
        self._attach()
        try:
            if calibration is not None:
                self.capacity, self.exit_rate = config.capacity, config.exit_rate
        except BaseException:
            self.unload()
            raise

    def _attach(self) -> None:
        for adaptive in self.layers:
            adaptive.attach()
        self._hooks = [
            self.lm.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.lm.model.register_forward_hook(self._end, always_call=True),
        ]
        self._hooks += ShortlistHooks(self._context).attach(self.lm.lm_head)
        if self.corrections:
            self._hooks += self.corrections.attach(self.lm.model.layers, self._context)
        self._fast.attach()
        self._watches = Watch(self.lm), Watch(*self._own)

    def _detach(self) -> None:
        self._fast.detach()
        for attached in self._hooks:
            attached.remove()
        for adaptive in self.layers:
            adaptive.detach()
        for module in self.lm.modules():  # also what was copied along, as when an adapter copies the head
            for calls in (module._forward_pre_hooks, module._forward_hooks, vars(module)):
                for name in [name for name, call in calls.items() if self._is_ours(call)]:
                    del calls[name]

    def _is_ours(self, call) -> bool:
        return getattr(getattr(call, "__self__", call), "context", None) is self._context

    def unload(self) -> Base:
        """Take everything off and return the base, as it was before. The model cannot be used afterwards."""
        if self.layers:
            self.refresh()
        self._detach()
        self.layers = []
        return self.base

    def forward(self, *args, **kwargs):
        raise HatError("a HierarchicalTransformer is not called itself: call hat.lm, a LlamaForCausalLM")

    @property
    def _own(self) -> tuple[nn.Module, ...]:
        """The modules that are not the base's."""
        return self.routers, self.gates, self.corrections

    def _check_loaded(self) -> None:
        if not self.layers:
            raise HatError("this model was unloaded from its base: attach a new HierarchicalTransformer")

    def _check_masks(self, masks: Masks) -> None:
        """Raise `HatError` unless this model has each mask's site or exit, with as many channels."""
        if not isinstance(masks, Masks):
            raise HatError(f"masks must be Masks, as hat.trace.masks holds them, got {type(masks).__name__}")
        sites = product(range(self.config.n_layers), self.grain.sites)
        channels = {(i, s): () if s == "ffn" else self.routers[f"{i}_{s}"].log_scale.shape for i, s in sites}
        channels |= dict.fromkeys(self.config.exit_layers, ())
        for place, mask in (masks.keep | masks.exits).items():
            if place not in channels:
                grain, exits = self.config.granularity, list(self.config.exit_layers)
                known = f"{self.config.n_layers} layers, sites {', '.join(self.grain.sites)} and exits {exits}"
                raise HatError(f"masks of a {grain} model must be of its {known}, got one of {place!r}")
            if mask.dtype != torch.bool or mask.dim() < 2 or mask.shape[2:] != channels[place]:
                expected = ", ".join(["B", "T", *map(str, channels[place])])
                raise HatError(f"the mask of {place!r} must be bool [{expected}], got {mask.dtype} {list(mask.shape)}")

    def _apply(self, fn, recurse=True):
        """Move or cast the base; routers and gates move along and stay fp32. If that fails, all stays as it was."""
        self._check_loaded()
        self._fast.forget()
        own = [t for module in self._own for t in _tensors(module)]
        # Rotary frequencies stay fp32 in every dtype, as in a base loaded in that dtype.
        exact = {id(t) for t in (*own, *_tensors(self.lm.model.rotary_emb))}
        before = [(t, t.data) for t in (*own, *_tensors(self.lm))]
        try:
            for t, data in before:
                moved = fn(data)
                t.data = data.to(moved.device) if id(t) in exact else moved
        except BaseException as error:
            for t, data in before:
                t.data = data
            if isinstance(error, Exception):
                raise HatError(f"the model could not be moved, and is as it was: {first_line(error)}") from error
            raise
        self.lm.config.dtype = self.lm.dtype
        self._watches = Watch(self.lm), Watch(*self._own)
        return self

    def __deepcopy__(self, memo) -> HierarchicalTransformer:
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
        twin._calibration, twin.training_summary = self.calibration, copy.deepcopy(self.training_summary)
        twin.prices = list(self.prices)
        twin._context.mode = twin._decided(Mode(self.capacity, self.exit_rate), self.calibration)
        return twin

    def __reduce_ex__(self, protocol):
        raise HatError("a HierarchicalTransformer is never pickled: use save_pretrained, or state_dict with torch.save")

    # -- capacity and exits, at run time -----------------------------------------------------------

    @property
    def calibration(self) -> Calibration | None:
        """The tables behind capacity and exit rate. A new one takes effect at once, at the current capacity."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        self._check_loaded()
        if calibration is not None:
            calibration.check(self.config)
        frames = self._context.frames
        decided = [self._decided(frame.mode, calibration) for frame in frames]  # raises before anything is changed
        for frame, mode in zip(frames, decided, strict=True):
            frame.mode = mode
        self._calibration, self.prices = calibration, []

    @property
    def capacity(self) -> float:
        """Requested executed / routable work, 0.1-1.0. Setting it needs no retraining."""
        return self._context.mode.capacity

    @capacity.setter
    def capacity(self, value: float) -> None:
        self._check_loaded()
        value, mode = check_capacity(value), self._context.mode
        if value < 1.0 and self.config.granularity == "token":
            warnings.warn(f"token grain at capacity {value}: {POOR}", stacklevel=3)
        self._context.mode = self._decided(replace(mode, capacity=value), self.calibration)

    @property
    def exit_rate(self) -> float:
        """Requested share of tokens that leave before the last layer, 0-1; 0 turns exits off."""
        return self._context.mode.exit_rate

    @exit_rate.setter
    def exit_rate(self, value: float) -> None:
        self._check_loaded()
        mode = replace(self._context.mode, exit_rate=check_exit_rate(value))
        self._context.mode = self._decided(mode, self.calibration)

    def _decided(self, mode: Mode, calibration: Calibration | None) -> Mode:
        """``mode`` with the method's own decisions at its capacity and exit rate; raises if there are none."""
        capacity, exit_rate, policy, exits, shortlist = mode.capacity, mode.exit_rate, KeepAll(), None, None
        layers = capacity
        if capacity < 1.0:
            if calibration is None:
                hint = "run `hat calibrate`, or load a checkpoint"
                raise HatError(f"capacity {capacity} needs calibrated thresholds: {hint}")
            policy = self.threshold_policy(calibration.thresholds_at(capacity))
            layers = calibration.layer_capacity_at(capacity, self.site_work)
            if (head := calibration.head_at(capacity)) is not None:
                shortlist = self.shortlist(*head)
        if exit_rate > 0.0:
            if not self.gates:
                raise HatError(f"exit rate {exit_rate} asked of a model without exit layers")
            if calibration is None or calibration.exit_rates is None:
                raise HatError(f"exit rate {exit_rate} needs trained exit gates; this checkpoint has none (use 0)")
            exits = ExitThresholds(self.gates, calibration.exit_thresholds(exit_rate, capacity))
        how = {"corrected": self.correction_strength(capacity), "shortlist": shortlist, "layer_capacity": layers}
        return replace(mode, own_policy=policy, own_exits=exits, **how)

    def threshold_policy(self, thresholds: dict[tuple[int, str], float]) -> Threshold:
        """The method's own decisions at these thresholds on the routers' scores, by (layer, site)."""
        return Threshold(self.routers, thresholds)

    def correction_strength(self, capacity: float) -> float:
        """Strength of the corrections at a capacity; 0 if there are none."""
        return strength(capacity, self.config.granularity) if self.corrections else 0.0

    @property
    def gates_head(self) -> bool:
        """Whether the head is gated at capacities below 1.0."""
        return self.calibration is not None and self.calibration.head_thresholds is not None

    def shortlist(self, threshold: float, margin: float, share: float = 1.0) -> Shortlist:
        """The head's decision at a threshold on its channels' scores and a margin in nats; ``share`` is the share of
        its work that it is expected to run."""
        if self._head_norm is None:
            self._head_norm = head_norm(self.lm)
        return Shortlist(threshold / self._head_norm, margin, share)

    @property
    def weight_format(self) -> str:
        """How the engine keeps the weights that it reads for each token: "base", as the base has them; "int8", with a
        scale per output (half the memory of bfloat16); or "q4", four bits with a scale and a minimum per 32 channels
        (a third), for bases whose widths are multiples of 32. The last two only approximate the base. Prefill reads
        the base's own weights."""
        return self._fast.form

    @weight_format.setter
    def weight_format(self, value: str) -> None:
        self._check_loaded()
        self._check_weight_format(value)
        if value != self._fast.form:
            self._fast.forget()
        self._fast.form = value

    def _check_weight_format(self, value: str) -> None:
        if value not in WEIGHT_FORMATS:
            raise HatError(f"weight format must be one of {', '.join(WEIGHT_FORMATS)}, got {value!r}")
        if why := self._fast.unfit(value):
            raise HatError(f"weight format {why}")

    @property
    def packed_bytes(self) -> int:
        """Bytes that the engine's weights take besides the base's: a copy of the layers, and of the head where it is
        gated or read in fewer bits, for each format in use, with and without corrections. 0 before its first use."""
        return self._fast.packed_bytes

    @property
    def decoding(self) -> str:
        """What would run the next decode step of ``lm.generate``, and why."""
        self._check_loaded()
        return self._fast.describe()

    @property
    def trace(self) -> TokenState | None:
        """What the last forward of this thread decided, or the one under way; None before the first."""
        return self._context.trace

    # -- what calibration needs --------------------------------------------------------------------

    def scores(self, layer: int, site: str, x: Tensor) -> Tensor:
        """The router's scores inside a forward, with token sensitivity applied: ``x [n, C] -> [n, C]`` or ``[n]``."""
        router = self.routers[f"{layer}_{site}"]
        if site == "ffn":
            return router.score(x)
        return router.score(x, token_threshold_scale(self.routers, layer, site, x, self.trace))

    @contextmanager
    def watching(self, see: Callable[[int, str, Tensor, Tensor], None]) -> Iterator[None]:
        """Context: call ``see(layer, site, x, activation)`` after each site that runs.

        ``x`` is what the router reads, ``activation`` what is zeroed where the router skips: that same input
        (channel grain) or the FFN's output (token grain). Both are tensors of the graph, ``[..., C]``.
        """
        hooks = []
        for i, layer in enumerate(self.lm.model.layers):
            for site in self.grain.sites:

                def watch(module, args, out, i=i, site=site):
                    see(i, site, args[0], out if site == "ffn" else args[0])

                module = layer.mlp if site == "ffn" else layer.get_submodule(LINEARS[site][0])
                hooks.append(module.register_forward_hook(watch))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # -- around each forward -----------------------------------------------------------------------

    @torch.compiler.disable
    def _begin(self, module, args, kwargs):
        """Pre-hook on the model: a fresh `TokenState` from the 2-D mask, the positions and the cache's length."""
        passes, mode = self._context.passes, self._context.mode
        passes.append(None)  # `_end` is called whatever happens, and pops it
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        cache = given.get("cache", given.get("past_key_values"))
        if cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
            raise HatError("static KV caches are not supported: leave cache_implementation unset (dynamic)")
        if self.lm.device != next(self.routers.parameters()).device:
            raise HatError("the base was moved under the model: use hat.to(...), not hat.lm.to(...)")
        ours = zip(self.layers, self.lm.model.layers, strict=False)
        if odd := [a.index for a, layer in ours if a.layer is not layer or not a.intact]:
            raise HatError(
                f"layer {odd[0]}, its attention or its FFN is another module than when the model was attached: "
                "replace modules before attaching; wrapping single linear layers (LoRA) is fine at any time"
            )
        start = cache.get_seq_length() if cache is not None else 0
        if not start:
            self.refresh()
            mode = self._context.mode
        places = TokenState.places(tokens, given.get("attention_mask"), given.get("position_ids"), start)
        state = self.new_state(*places, start, cache)
        state.prefix = prefixes(torch.zeros_like(state.position) if tokens.dim() > 2 else tokens, state, cache)
        passes[-1] = ForwardPass(mode, state, self.grain.sites, self.gates, self.corrections, cache)

    def refresh(self) -> None:
        """Follow changes to the base's weights and to what is trained; done at each prompt. What was derived from them
        (norms in scores, packed copies, the base's fingerprint) is made anew. Warns if the base has changed."""
        with self._looking:
            base, own = [watch.changed() for watch in self._watches]
            if base or own:
                self._fast.forget()
            if not base:
                return
            for name, router in self.routers.items():
                if isinstance(router, ChannelRouter):
                    layer, site = name.split("_", 1)
                    router.column_norm.copy_(column_norm(self.lm.model.layers[int(layer)], site).clamp(min=1e-12))
            before, self._head_norm = self.base.fingerprint, None
            self.base = replace(self.base, fingerprint=fingerprint(self.lm))
            self.calibration = self.calibration  # the head's decision depends on its norms
        if self.base.fingerprint != before:
            what = "scores, packed weights and fingerprint follow; thresholds were set on the weights before"
            warnings.warn(f"weights of the base were changed under the model: {what}", stacklevel=2)

    def new_state(
        self, real: Tensor, position: Tensor, start: int, cache: Cache | None = None, protected: Tensor | None = None
    ) -> TokenState:
        """A state for a forward to fill in, of tokens at these `TokenState.places`, which say who is protected."""
        mode = self._context.mode
        if protected is None:
            protected = real & (position < self.config.protected_tokens)
        state = TokenState(real, position, protected, self.site_work, self.config.n_layers, start)
        for decides in (mode.policy, mode.exits):
            if isinstance(decides, Forced):
                decides.check(state)
        state.routed, state.gated = not isinstance(mode.policy, KeepAll), mode.exits is not None
        if mode.shortlist is not None:
            state.head_work, state.expected_head_share = self.head_work, mode.shortlist.share
        state.masks, state.corrected = Masks() if mode.record else None, mode.corrected > 0
        if mode.steer:
            scale = np.exp(offsets(cache, state.batch)).repeat(state.tokens)
            state.steering = torch.from_numpy(scale).to(real.device)
        return state

    def finish(self, state: TokenState, cache: Cache | None) -> None:
        """Called when a forward has run to its end."""
        mode = self._context.mode
        if mode.steer and mode.capacity < 1 and mode.control is None:
            move(cache, state, mode.layer_capacity, mode.steer)
        self._context.done(state)

    @torch.compiler.disable
    def _end(self, module, args, output):
        ended = self._context.passes.pop()
        if ended is not None and output is not None:
            self.finish(ended.state, ended.cache)
        elif ended is not None:
            self._context.done(ended.state, whole=False)

    # -- checkpoints -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder, base=None, *, dtype=None, device=None) -> HierarchicalTransformer:
        """Load a checkpoint onto its base.

        Args:
            folder: as written by `save_pretrained`; a name in data/checkpoints such as "default"; or ``owner/name`` on
                the Hub.
            base: a loaded `Base`, or the name of one; by default the name that the checkpoint carries.
            dtype, device: for the base; see `load_base`.

        Raises `HatError` if a file, a key, a shape or the base is not as expected; a given base is left as it was.
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

    def save_pretrained(self, folder) -> None:
        """Write routers, gates, config and calibration; never the base. See `hat_lib.model.checkpoint`."""
        write_checkpoint(folder, self.checkpoint())

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Upload what `save_pretrained` writes; see `hat_lib.model.checkpoint.push_to_hub`."""
        return push_to_hub(self.checkpoint(), repo_id, **options)

    def checkpoint(self) -> Checkpoint:
        """What `save_pretrained` writes."""
        if self.layers:
            self.refresh()
        parts = self.config, self.base.name, self.base.fingerprint, self.hat_parameters()
        return Checkpoint(*parts, self.calibration, self.training_summary, self.prices)

    def hat_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: all that a checkpoint saves."""
        return {n: p for n, p in self.named_parameters() if is_hat_parameter(n)}


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, their gradients, and buffers."""
    parameters = list(module.parameters())
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *module.buffers()]
