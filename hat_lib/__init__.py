"""Hierarchical Adaptive Transformer: per-token compute for a frozen Llama.

Axis letters, used everywhere: ``B`` batch, ``T`` tokens, ``D`` hidden, ``F`` FFN width, ``L`` layers,
``S`` sites of a layer, ``E`` exits, ``K`` cached keys, ``V`` vocabulary. The packages and the order in which they
import each other: docs/architecture.md. The method itself is `hat_lib.method`.
"""

from importlib import import_module

__version__ = "0.4.0"

_PUBLIC = {
    "HatConfig": "config",
    "HatError": "config",
    "load_base": "base.load",
    "load_text": "text.blocks",
    "HierarchicalTransformer": "hat",
    "AdaptiveInference": "decoding.inference",
    "explain": "evaluation.tokens",
    "sweep": "evaluation.sweep",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    # Imported on first use: `hat --help` and the version must not wait for torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
