"""HierarchicalTransformer: routers and exit gates fitted onto a frozen Llama.

    hat = HierarchicalTransformer.from_pretrained("data/checkpoints/calibrated")
    hat.capacity = 0.75
    hat.lm.generate(...)

``hat.lm`` is the base's own `LlamaForCausalLM`, so generate, pipeline and evaluation harnesses take it
as it is. Its decoder layers are the same objects with `forward` overridden on the instance; `unload`
gives them back bit for bit.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from hat_lib.backbone.base import Base, load_base
from hat_lib.config import HatConfig, HatError, check_capacity, check_exit_rate
from hat_lib.engine.packed import Layout, TiedEmbedding, TiledLinear
from hat_lib.engine.products import FEW
from hat_lib.model.checkpoint import Checkpoint, check_tensors, is_hat_parameter, read_checkpoint, write_checkpoint
from hat_lib.model.decoder_layer import AdaptiveLayer
from hat_lib.model.exit_gate import ExitGate
from hat_lib.model.granularity import GRAINS
from hat_lib.model.hub import local_folder, push_to_hub
from hat_lib.model.modes import Modes
from hat_lib.model.policies import Gated, KeepAll, Policy, Threshold
from hat_lib.model.routers import ChannelRouter, MoERouter, token_threshold_scale
from hat_lib.model.thresholds import Calibration
from hat_lib.model.token_state import Masks, TokenState


class HierarchicalTransformer(Modes, nn.Module):
    """A frozen base with routers and exit gates.

    Args:
        base: a `hat_lib.backbone.base.Base`; its model is adapted in place until `unload`.
        config: the method's shape; `HatConfig.default(base)` or `HatConfig.published(base)`.
        calibration: thresholds for any capacity, from `hat_lib.calibration.capacity`; without it only capacity 1.0
            and forced decisions are possible.
    """

    def __init__(self, base: Base, config: HatConfig, calibration: Calibration | None = None):
        super().__init__()
        lm = base.model
        if config.n_layers != lm.config.num_hidden_layers:
            raise HatError(f"the config is for {config.n_layers} layers, {base.name} has {lm.config.num_hidden_layers}")
        if any("forward" in vars(layer) for layer in lm.model.layers):
            raise HatError(f"{base.name} already carries a HierarchicalTransformer: call its unload() first")
        self.base, self.config, self.calibration = base, config, calibration
        self.training_summary: dict | None = None
        self.lm = lm
        self.grain = GRAINS[config.granularity]
        work = self.grain.site_work(lm.config)
        self.site_work = [work[s] / sum(work.values()) for s in self.grain.sites]
        self.trace: TokenState | None = None
        self.compact = True
        self.dropped: Tensor | None = None  # bool [L, B]: layers left out for a sequence, in training
        self._states: list[TokenState] | None = None
        self._record = False
        self._attach()

        d = lm.config.hidden_size
        self.routers = nn.ModuleDict()
        for i, layer in enumerate(self.layers):
            for site in self.grain.sites:
                self.routers[f"{i}_{site}"] = self._new_router(layer, site)
            if config.granularity == "channel":
                self.routers[f"{i}_token"] = MoERouter(d)
        self.gates = nn.ModuleDict({str(e): ExitGate(d, config.translator_rank) for e in config.exit_layers})
        for module in (self.routers, self.gates):
            module.to(base.device)
        self.eval()
        self._policy: Policy = KeepAll()
        self._exit_policy = None
        self._capacity, self._exit_rate = 1.0, 0.0
        if calibration is not None:
            self.capacity = config.capacity
            if config.exit_rate:
                self.exit_rate = config.exit_rate

    # -- attaching ---------------------------------------------------------------------------------

    def _new_router(self, layer: AdaptiveLayer, site: str):
        if self.config.granularity == "token":
            return MoERouter(self.lm.config.hidden_size)
        return ChannelRouter(layer.grain.linears[site].column_norm())

    def _attach(self) -> None:
        self.layers = [AdaptiveLayer(self, i, self.grain(layer)) for i, layer in enumerate(self.lm.model.layers)]
        for adaptive in self.layers:
            adaptive.grain.layer.forward = adaptive
        self._head = TiledLinear(self.lm.lm_head)
        embedding = self.lm.model.embed_tokens
        tied = embedding.weight is self.lm.lm_head.weight
        self._embedding = TiedEmbedding(embedding, self._head.fused) if tied else None
        self._layout = Layout([*(m for a in self.layers for m in a.grain.matrices()), self._head.fused])
        self._hooks = [
            self.lm.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.lm.model.register_forward_hook(self._end),
            self.lm.register_state_dict_pre_hook(lambda *_: self._layout.rows()),
        ]

    def train(self, mode: bool = True) -> HierarchicalTransformer:
        if mode:  # training sees many rows at a time
            self._layout.rows()
        return super().train(mode)

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for adaptive in self.layers:
            del adaptive.grain.layer.forward
            adaptive.grain.release()
        self._head.release()
        if self._embedding is not None:
            self._embedding.release()
        self.layers = []

    def unload(self) -> Base:
        """Take everything off and return the base, its forwards, layout and weights bit for bit as before."""
        if self.layers:
            self._detach()
        return self.base

    def _apply(self, fn, recurse=True):
        # Moving or casting must see the base's own weights, not views of fused storage.
        self._detach()
        super()._apply(fn, recurse)
        self.routers.float()  # scores stay fp32 whatever the base's dtype
        self.gates.float()
        for router in self.routers.values():
            router.set_threshold(router.threshold)
        self._attach()
        return self

    # -- capacity and exits, at run time -----------------------------------------------------------

    @property
    def capacity(self) -> float:
        """Requested executed / routable work, 0.1-1.0. Setting it needs no retraining."""
        return self._capacity

    @capacity.setter
    def capacity(self, value: float) -> None:
        value = check_capacity(value)
        if value < 1.0:
            if self.calibration is None:
                raise HatError(
                    f"capacity {value} needs calibrated thresholds: run `hat calibrate`, or load a checkpoint"
                )
            if self.config.granularity == "token":
                warnings.warn(
                    f"token grain at capacity {value}: skipping whole FFNs of a frozen base multiplies perplexity "
                    "(see data/results); the channel grain keeps far more at equal work",
                    stacklevel=2,
                )
            self.set_thresholds(self.calibration.thresholds_at(value))
        self._capacity = value
        self._set_policy()
        if self._exit_rate and self.calibration is not None:  # else thresholds were set by hand, and stay
            self._set_gates()

    @property
    def exit_rate(self) -> float:
        """Requested share of tokens that leave before the last layer, 0-1; 0 turns exits off."""
        return self._exit_rate

    @exit_rate.setter
    def exit_rate(self, value: float) -> None:
        value = check_exit_rate(value)
        if value > 0.0:
            if not self.gates:
                raise HatError(f"exit rate {value} asked of a model without exit layers")
            if self.calibration is None or self.calibration.exit_rates is None:
                raise HatError(f"exit rate {value} needs trained exit gates; this checkpoint has none (use 0)")
        self._exit_rate = value
        if value > 0.0:
            self._set_gates()

    def _set_gates(self) -> None:
        thresholds = self.calibration.exit_thresholds(self._exit_rate, self._capacity)
        for gate, threshold in zip(self.gates.values(), thresholds, strict=True):
            gate.threshold = threshold

    def set_thresholds(self, thresholds: dict[tuple[int, str], float]) -> None:
        """One threshold per (layer, site), on the routers' scores."""
        for (layer, site), t in thresholds.items():
            self.routers[f"{layer}_{site}"].set_threshold(t)

    def threshold_policy(self) -> Threshold:
        """The method's own decisions, at the thresholds that the routers carry now."""
        return Threshold(self.routers)

    def threshold_scale(self, layer: int, site: str, x: Tensor) -> Tensor | float | None:
        """`token_threshold_scale` in the forward that is under way; None at the token grain."""
        token = f"{layer}_token"
        return token_threshold_scale(self.routers[token], site, x, self.trace) if token in self.routers else None

    def scores(self, layer: int, site: str, x: Tensor, threshold_scale: Tensor | float | None) -> Tensor:
        """The router's scores, ``x [n, C] -> [n, C]`` or ``[n]``; ``threshold_scale`` as `threshold_scale` gives it."""
        router = self.routers[f"{layer}_{site}"]
        return router.score(x) if threshold_scale is None else router.score(x, threshold_scale)

    def _set_policy(self) -> None:
        self._policy = KeepAll() if self._capacity == 1.0 else self.threshold_policy()

    # -- what the layers ask -----------------------------------------------------------------------

    def decide(self, layer: int, site: str, x: Tensor, rows: Tensor | None) -> Tensor | None:
        """Keep mask of one site for the given rows, protected tokens included. None keeps everything."""
        state, index = self.trace, self.grain.sites.index(site)
        # Layer 0's FFN carries the whole model (skipping it alone destroys the output): never a whole skip.
        fixed = site == "ffn" and layer == 0
        keep = None if fixed else self._policy(layer, site, x, rows, state)
        if isinstance(keep, Gated):
            state.note(layer, index, keep.keep)
            return keep
        if keep is not None and state.any_protected:
            protected = state.protected.view(-1) if rows is None else state.protected.view(-1)[rows]
            protected = protected if keep.dim() == 1 else protected[:, None]
            keep = keep | protected if keep.dtype == torch.bool else torch.where(protected, 1.0, keep)
        state.note(layer, index, keep)
        if state.masks is not None:
            whole = x.shape[:1] if site == "ffn" else x.shape
            state.note_mask(layer, site, keep if keep is not None else x.new_ones(whole, dtype=torch.bool))
        return keep

    def exit(self, depth: int, h: Tensor) -> Tensor:
        """Let finished tokens leave after ``depth`` layers; returns ``h [N, D]`` with their state translated."""
        if depth not in self.config.exit_layers or not (self._exit_rate or self._exit_policy):
            return h
        state, gate = self.trace, self.gates[str(depth)]
        rows = state.alive if state.alive is not None else torch.arange(len(h), device=h.device)
        if not len(rows):
            return h
        if self._exit_policy is not None:
            leave = self._exit_policy.exits(depth, rows, state)
            leave = torch.zeros(len(rows), dtype=torch.bool, device=h.device) if leave is None else leave
        else:
            leave = gate.score(h[rows]) > gate.threshold
        leave = leave & state.real.view(-1)[rows] & ~state.protected.view(-1)[rows]
        if state.masks is not None:
            left = torch.zeros(len(h), dtype=torch.bool, device=h.device).index_copy(0, rows, leave)
            state.masks.exits[depth] = left.view(state.batch, state.tokens)
        leaving = rows[leave]
        if len(leaving):
            h = h.index_copy(0, leaving, gate.translate(h[leaving]))
            state.leave(leaving, depth)
        return h

    # -- around each forward -----------------------------------------------------------------------

    def _begin(self, module, args, kwargs):
        """Pre-hook on the model: a fresh `TokenState` from the 2-D mask and the cache's length."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = tokens if tokens is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if torch.compiler.is_compiling():
            raise HatError("compiled generate is not supported: skipping branches on data; call generate uncompiled")
        if cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
            raise HatError("static KV caches are not supported: leave cache_implementation unset (dynamic)")
        if not self.layers[0].grain.intact():
            raise HatError("the base was moved or cast under the model: use hat.to(...), not hat.lm.to(...)")
        start = cache.get_seq_length() if cache is not None else 0
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        self.trace = TokenState.begin(
            tokens, mask, start, self.config.protected_tokens, self.site_work, self.config.n_layers
        )
        if self._record:
            self.trace.masks = Masks()
        few = self.trace.real.numel() <= FEW
        self._layout.follow(few and self.compact and self.base.device.type == "cpu")

    def _end(self, module, args, output):
        if self._states is not None:
            self._states.append(self.trace)

    # -- checkpoints -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder, base=None, *, dtype=None, device=None) -> HierarchicalTransformer:
        """Load a checkpoint onto its base.

        Args:
            folder: as `save_pretrained` wrote it; ``owner/name``, if there is no such folder, is one on the Hub.
            base: a loaded `Base`, or the name of one; by default the name that the checkpoint carries.
            dtype, device: for the base; see `load_base`.

        Raises `HatError` if a file, a key, a shape or the base is not the expected one.
        """
        checkpoint = read_checkpoint(local_folder(folder))
        if not isinstance(base, Base):
            base = load_base(base or checkpoint.base, dtype=dtype, device=device)
        checkpoint.check_base(base, folder)
        hat = cls(base, checkpoint.config)
        try:
            hat.load_adapter(checkpoint, folder)
            hat.calibration, hat.training_summary = checkpoint.calibration, checkpoint.training
            if checkpoint.calibration is not None:
                hat.capacity, hat.exit_rate = checkpoint.config.capacity, checkpoint.config.exit_rate
        except BaseException:  # whatever went wrong, the base is as it was
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
        for router in self.routers.values():  # what they precompute from their parameters
            router.set_threshold(router.threshold)

    def save_pretrained(self, folder) -> None:
        """Write routers, gates, config and calibration; never the base. See `hat_lib.model.checkpoint`."""
        parts = self.config, self.base.name, self.base.fingerprint, self.hat_parameters()
        write_checkpoint(folder, Checkpoint(*parts, self.calibration, self.training_summary))

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Upload what `save_pretrained` writes; see `hat_lib.model.hub.push_to_hub` for the options."""
        return push_to_hub(self, repo_id, **options)

    # -- counting ----------------------------------------------------------------------------------

    def hat_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: all that a checkpoint saves."""
        return {n: p for n, p in self.named_parameters() if is_hat_parameter(n)}
