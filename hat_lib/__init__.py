"""Hierarchical Adaptive Transformer: per-token compute for a frozen Llama.

Axis letters, everywhere: ``B`` batch, ``T`` tokens, ``D`` hidden, ``F`` FFN width, ``L`` layers,
``S`` gated sites in a layer, ``E`` exits, ``K`` cached keys, ``V`` vocabulary. The modules, in the
order in which data flows, are listed in `MODULES`; each imports only from those before it.
"""

MODULES = (
    "config",
    "wheels",
    "shapes",
    "base",
    "corpora",
    "text",
    "self_text",
    "token_classes",
    "coloured",
    "state",
    "relax",
    "router",
    "tiles",
    "linears",
    "grains",
    "exit_gate",
    "thresholds",
    "schema",
    "checkpoint",
    "hub",
    "layer",
    "modes",
    "model",
    "fisher",
    "needs",
    "calibrate",
    "calibrate_exits",
    "losses",
    "recipe",
    "objective",
    "training_text",
    "train_log",
    "trainer",
    "train",
    "cost",
    "spent",
    "evaluate",
    "analyze",
    "layer_shares",
    "pattern_tables",
    "documents",
    "harness",
    "matching",
    "cosine_rule",
    "controls",
    "rows",
    "benchmark",
    "lossless",
    "speed",
    "inference",
    "prompts",
    "lossless_runs",
    "targets",
    "step_cost",
    "foundation",
    "quality",
    "sweep",
    "promise",
    "ablations",
    "plots",
    "curves",
    "frontier",
    "trained_frontier",
    "pattern_plots",
    "text_plots",
    "inference_plots",
    "findings",
    "notebook_files",
    "notebook_runs",
    "batch",
    "batch_engines",
    "report",
    "widget_parts",
    "widget_frontier",
    "widget_generate",
    "widget_routing",
    "widgets",
    "arguments",
    "given",
    "console",
    "evaluating",
    "results",
    "sweeps",
    "analyzing",
    "runs",
    "cli",
    "workbook",
)

__version__ = "0.1.0"

_PUBLIC = {
    "HatConfig": "config",
    "HatError": "config",
    "load_base": "base",
    "load_text": "text",
    "HierarchicalTransformer": "model",
}
__all__ = [*_PUBLIC, "MODULES", "__version__"]


def __getattr__(name: str):
    # Imported on first use: `hat --help` and the version must not wait for torch.
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
