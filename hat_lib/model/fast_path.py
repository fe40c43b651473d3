"""Which forwards of ``hat.lm`` the engine runs, and with which decisions.

The engine (`hat_lib.engine`) decodes up to eight tokens at a time on a CPU. Everything else, and everything that
somebody observes or modifies (hooks, adapters, gradients, hidden states), runs on the reference path. `FastPath`
replaces ``hat.lm.forward``: a forward is run by the engine, or there is a reason why not.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import output_capturing

from hat_lib.model.modes import Mode
from hat_lib.model.policies import ExitThresholds, Forced, KeepAll, Threshold

try:
    from hat_lib.engine.arrays import DOWN, FFN, Decisions
    from hat_lib.engine.cache import GrowingLayer
    from hat_lib.engine.decoder import MAX_TOKENS, Decoder
    from hat_lib.engine.team import cores, torch_on_one_thread
    from hat_lib.engine.weights import linears, packed_bytes, unfit
    from hat_lib.model.decisions import decisions, with_exits

    LAYERS = DynamicLayer, GrowingLayer
    UNAVAILABLE = None
except Exception as error:  # numba is missing, or does not support this Python or this CPU
    UNAVAILABLE = f"numba cannot be used here ({type(error).__name__}: {error})"

WEIGHT_FORMATS = ("base", "int8", "q4")
ROPES = ("default", "linear", "llama3", "yarn")
"""rotary embeddings whose angles depend on the position alone"""
ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "cache", "use_cache", "logits_to_keep", "return_dict"}
LISTENERS = ("streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model",
             "custom_generate", "negative_prompt_ids")  # fmt: skip
"""arguments of generate that make other code, or other forwards, run between two steps"""
KEPT_DECISIONS = 32
"""of as many capacities and exit rates: entering a context at each token is then quick"""


@dataclass
class GenerateCall:
    """A call of ``generate`` under way in a thread."""

    threads: int
    """torch's number of threads when it began"""
    unobserved: bool
    """no other code runs between two steps: what was checked before one holds for the next"""
    last: tuple[Mode, Decoder, Decisions] | None = None
    """what its last step on the engine ran with"""


class FastPath:
    """Replaces ``lm.forward`` while a model is attached.

    Args:
        hat: a `HierarchicalTransformer`. Its base is packed when the engine is first used, and again if it changes.
        context: shared by the model and its layers.
    """

    def __init__(self, hat, context):
        self.hat, self.lm, self.context = hat, hat.lm, context
        self.form = "base"
        """of the packed weights, one of `WEIGHT_FORMATS`"""
        self._decoders: dict[tuple[str, float, bool], Decoder] = {}
        """by form, the strength of corrections in its products, and whether it can make a shortlist"""
        self._decisions: dict[tuple, Decisions] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self.never = self._why_never()

    def attach(self) -> None:
        """Replace ``lm.forward``, once the model's own hooks and forwards are in place."""
        if self.never:
            return
        modules = list(self.lm.modules())
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks_before = [*map(dict, self._hooks)]
        self._contents = [contents for m in modules for contents in (m._modules, m._parameters) if contents]
        self._contents_before = [*map(dict, self._contents)]
        self._without_forward = [vars(m) for m in modules if m is not self.lm and "forward" not in vars(m)]
        self._reference, original = self.lm.forward, self.lm.generate

        @functools.wraps(self._reference)  # generate reads its signature
        def forward(*args, **kwargs):
            return self.forward(*args, **kwargs)

        @functools.wraps(original)
        def generate(*args, **kwargs):
            before, threads = self._call, torch.get_num_threads()
            observed = len(args) > 1 or any(kwargs.get(name) is not None for name in LISTENERS)
            self._local.call = GenerateCall(threads, not observed)
            try:
                return original(*args, **kwargs)
            finally:
                torch.set_num_threads(threads)
                self._local.call = before

        self.lm.forward, self.lm.generate = forward, generate

    def detach(self) -> None:
        if not self.never:
            for name in ("forward", "generate"):
                vars(self.lm).pop(name, None)
        self.forget()

    def forget(self) -> None:
        """Drop packed weights and decisions; they are made again when next needed. Waits for a thread that is making
        some: it would keep what it made of weights as they were."""
        with self._lock:
            self._decoders, self._decisions = {}, {}

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights, not counting the base's own memory."""
        return sum(packed_bytes(decoder.weights) for decoder in self._decoders.values())

    def unfit(self, form: str) -> str | None:
        """Why the engine cannot keep this base's weights in a form, or None."""
        return None if self.never else unfit(self.lm, form)

    def describe(self) -> str:
        """Which path decodes, in words."""
        if (why := self.why_not()) is not None:
            return f"reference path ({why})"
        threads = max(1, min(torch.get_num_threads(), cores()))
        form = self.context.mode.weights or self.form
        form = str(self.lm.dtype).removeprefix("torch.") if form == "base" else form
        return f"engine ({form}, {threads} thread{'s' if threads > 1 else ''})"

    # -- whether ------------------------------------------------------------------------------------

    def _why_never(self) -> str | None:
        """Why the engine can run no forward of this base; None if it can."""
        config = self.lm.config
        if UNAVAILABLE:
            return UNAVAILABLE
        if any("forward" in vars(m) for m in self.lm.modules()):
            return "another library overrides a forward of the base"
        if self.hat.config.granularity not in ("channel", "token"):
            return f"the engine does not know the {self.hat.config.granularity} grain"
        if config.hidden_act not in ("silu", "swish"):
            return f"the FFN's activation is {config.hidden_act}"
        if config.rope_parameters.get("rope_type", "default") not in ROPES:
            return f"rotary embeddings of type {config.rope_parameters['rope_type']}"
        if any(type(linear) is not nn.Linear for linear in (*linears(self.lm), self.lm.lm_head)):
            return "a linear layer of the base is not a plain one"
        if self.lm.lm_head.bias is not None:
            return "the head has a bias"
        return None

    def why_not(self) -> str | None:
        """Why the next decode step would run on the reference path, as things stand; None if it would not."""
        lm, mode = self.lm, self.context.mode
        if self.never:
            return self.never
        if mode.reference:
            return "asked for"
        if lm.device.type != "cpu":
            return f"the model is on {lm.device.type}"
        if lm.dtype not in (torch.float32, torch.bfloat16):
            return f"weights are {lm.dtype}"
        if mode.record or mode.dropped is not None or not mode.compact:
            return "decisions are recorded, or layers dropped, or masks multiplied"
        if type(mode.policy) not in (KeepAll, Threshold, Forced):
            return "decisions are not the method's own"
        if mode.exits is not None and type(mode.exits) not in (ExitThresholds, Forced):
            return "exits are not the method's own"
        if torch_module._has_any_global_hook() or self._has_new_hooks():
            return "there are hooks on the base"
        if not self._same_contents():
            return "a module or a parameter of the base was replaced, as by an adapter"
        if lm.config.num_hidden_layers != self.hat.config.n_layers:
            return "drafts by some of the layers were asked for"
        if any("forward" in attributes for attributes in self._without_forward):
            return "another library overrides a forward of the base"
        if lm.training or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return "training, autocast or torch.compile"
        return None

    def _has_new_hooks(self) -> bool:
        """Whether there are hooks that were not there when the model was attached, apart from those that transformers
        leaves once hidden states have been asked for."""
        if self._hooks == self._hooks_before:
            return False
        for hooks, before in zip(self._hooks, self._hooks_before, strict=True):
            for key, hook in hooks.items():
                if key not in before and getattr(hook, "__module__", None) != output_capturing.__name__:
                    return True
        return False

    def _same_contents(self) -> bool:
        try:
            return self._contents == self._contents_before
        except RuntimeError:  # a tensor was replaced: comparing the numbers of two gives no single truth value
            return False

    def _takes(self, given: dict) -> bool:
        """Whether this call is one for the engine: a few tokens, a cache, and only logits asked for."""
        ids, cache, mask = given.get("input_ids"), given.get("cache"), given.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.device.type != "cpu":
            return False
        if not 0 < ids.numel() <= MAX_TOKENS:
            return False
        if any(value is not None and value is not False for name, value in given.items() if name not in ARGUMENTS):
            return False
        if type(cache) is not DynamicCache or given.get("use_cache") is False or given.get("return_dict") is False:
            return False
        if len(cache.layers) != self.hat.config.n_layers or any(type(layer) not in LAYERS for layer in cache.layers):
            return False
        if type(self.context.mode.policy) is Forced and self.hat.config.granularity == "channel" and ids.numel() > 1:
            return False
        if torch.is_grad_enabled() or self.lm.config.output_hidden_states or self.lm.config.output_attentions:
            return False
        return mask is None or mask.dim() == 2 and mask.shape == (len(ids), cache.get_seq_length() + ids.shape[1])

    # -- how ----------------------------------------------------------------------------------------

    @property
    def _call(self) -> GenerateCall | None:
        return getattr(self._local, "call", None)

    def forward(self, *args, **kwargs):
        """Like `LlamaForCausalLM.forward`."""
        call, given = self._call, dict(kwargs)
        if args:
            given["input_ids"] = args[0]
        if "past_key_values" in given:  # transformers' earlier name for it
            given["cache"] = given.pop("past_key_values")
        out = self._step(call, given) if len(args) < 2 and self._takes(given) else None
        if out is None:
            if call is not None:
                torch.set_num_threads(call.threads)
            return self._reference(*args, **kwargs)
        if call is not None:
            torch_on_one_thread(call.threads)
        return out

    def _step(self, call: GenerateCall | None, given: dict) -> CausalLMOutputWithPast | None:
        """Run what the engine `_takes`; None if it may not."""
        known = call is not None and call.unobserved and call.last is not None and call.last[0] is self.context.mode
        if not known:
            if not given["cache"].get_seq_length() or call is not None and call.last is None:
                self.hat.refresh()  # as the reference path does for the prompts that it runs
            if self.why_not() is not None:
                return None
        return self._decode(call, known, **{name: given.get(name) for name in ARGUMENTS})

    def _decode(self, call, known, input_ids, attention_mask, position_ids, cache, logits_to_keep, **_):
        # In numpy: after a step the CPU's caches hold nothing of torch, and its operations cost several times as much.
        mode, (b, t), start = self.context.mode, input_ids.shape, cache.get_seq_length()
        first = np.zeros(b, np.int64)
        position = rank = np.arange(start, start + t)[None].repeat(b, 0)
        if attention_mask is not None and not (mask := attention_mask.numpy() != 0).all():
            first = mask.argmax(1)
            if not np.array_equal(mask.sum(1), start + t - first) or not mask[:, -t:].all():
                return None  # holes, or padding on the right
            rank = rank - first[:, None]
        if position_ids is not None:
            position = position_ids.numpy().repeat(b // len(position_ids), 0)
            rank = np.minimum(rank, position)
        kept = logits_to_keep.numpy() if isinstance(logits_to_keep, Tensor) else slice(-(logits_to_keep or 0), None)
        if (logit_rows := np.arange(b * t).reshape(b, t)[:, kept]).size > b * t:
            return None  # logits asked for twice
        protected = rank < self.hat.config.protected_tokens
        real, rank, guarded = map(torch.from_numpy, (np.ones((b, t), bool), rank, protected))
        state = self.hat.new_state(real, rank, start, cache, guarded)
        if known:
            _, decoder, decide = call.last
        else:
            with self._lock:
                decoder = self.decoder
                decide = self._decide(mode, decoder, slice(start, start + t))
            if call is not None and Forced not in (type(mode.policy), type(mode.exits)):
                call.last = mode, decoder, decide
        logits, executed, depth, head = decoder.step(
            input_ids.numpy(),
            cache,
            decide,
            position=position,
            first=first,
            protected=protected,
            scale=None if state.steering is None else state.steering.numpy(),
            logit_rows=logit_rows,
            threads=None if call is None else call.threads,
        )
        token = self.hat.config.granularity == "token"
        executed = executed[:, FFN:] if token else executed[:, : DOWN + 1] / decoder.channels
        state.executed = torch.from_numpy(executed.astype(np.float32))
        state.exit_layer = torch.from_numpy(depth.astype(np.int16))
        if mode.shortlist is not None:
            vocabulary, width = decoder.weights.head.shape
            channels, candidates = head.reshape(2, -1).sum(1)
            state.count_head(float(channels / width + candidates / vocabulary), logit_rows.size)
        self.hat.finish(state, cache)
        return CausalLMOutputWithPast(logits=logits, cache=cache)

    @property
    def decoder(self) -> Decoder:
        """The packed base, as its weights were at the last prompt."""
        mode = self.context.mode
        # Where adaptive forwards are corrected, the uncorrected copy serves the dense model.
        gates_head = self.hat.has_shortlist and bool(mode.corrected) == bool(len(self.hat.corrections))
        merged = mode.corrected if self.hat.config.granularity == "channel" else 0.0
        key = mode.weights or self.form, merged, gates_head or mode.shortlist is not None
        if key not in self._decoders:
            for other in [k for k in self._decoders if merged and k[0] == key[0] and k[1]]:
                del self._decoders[other]  # of another strength: there is only one corrected copy per form
            corrections = self.hat.corrections if merged else None
            self._decoders[key] = Decoder(self.lm, key[0], corrections, strength=merged, preview=key[2])
        return self._decoders[key]

    def _decide(self, mode: Mode, decoder: Decoder, window: slice) -> Decisions:
        """The mode's decisions as arrays, for tokens at these positions in the cache."""
        if type(mode.policy) is Forced:  # they differ between positions
            return decisions(self.hat, decoder.keep_everything(), mode, window)
        if type(mode.exits) is Forced:
            rest = self._decide(replace(mode, own_exits=None, exit_control=None), decoder, window)
            return with_exits(self.hat, rest, mode.exits, window)
        thresholds = [tuple(p.thresholds.values()) if hasattr(p, "thresholds") else None
                      for p in (mode.policy, mode.exits)]  # fmt: skip
        key = mode.shortlist, mode.corrected, *thresholds
        if key not in self._decisions:
            while len(self._decisions) >= KEPT_DECISIONS:
                del self._decisions[next(iter(self._decisions))]  # the oldest
            self._decisions[key] = decisions(self.hat, decoder.keep_everything(), mode, window)
        return self._decisions[key]


def warm() -> None:
    """Compile the decode step for bases in float32 and bfloat16, unless already cached; takes some twenty seconds."""
    if UNAVAILABLE is None:
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
        )
        for dtype in (torch.float32, torch.bfloat16):
            decoder, one = Decoder(LlamaForCausalLM(config).to(dtype)), np.zeros((1, 1), np.int64)
            cache, everything = DynamicCache(config=config), decoder.keep_everything()
            decoder.step(one, cache, everything, position=one, first=one[0], protected=one.astype(bool))
