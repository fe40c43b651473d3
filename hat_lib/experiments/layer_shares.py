"""What each layer executes at many settings of one model: ``data/results/layer_shares.csv``.

`hat_lib.experiments.quality` keeps a number for the whole model; the view of the frontier shows where in it the work is
done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch

from hat_lib.config import HatError
from hat_lib.model.transformer import HierarchicalTransformer


@torch.no_grad()
def layer_shares(
    hat: HierarchicalTransformer, blocks: Sequence[Mapping], settings: Iterable[tuple[float, float]]
) -> pd.DataFrame:
    """Run ``hat`` over each block at each setting; it is left as it was.

    Args:
        blocks: rows of `load_text`; all of their ``input_ids`` count. One a forward, so there are no pads.
        settings: capacity and exit rate, as requested.

    Returns:
        A row per setting and layer: ``capacity``, ``exit_rate``, ``layer``, ``executed`` (of the layer's routable work,
        over all tokens), ``entered`` (share of tokens that had not left before it), ``tokens``.

    Raises `HatError` without blocks, and for a setting that ``hat`` cannot take.
    """
    if not len(blocks):
        raise HatError("layer shares need at least one block of text")
    depth = torch.arange(hat.config.n_layers, device=hat.lm.device)[:, None, None]
    parts = []
    for capacity, exit_rate in settings:
        executed = entered = tokens = 0
        with hat.at(capacity, exit_rate):
            for row in blocks:
                ids = torch.tensor([row["input_ids"]], device=hat.lm.device)
                hat.lm.model(input_ids=ids, use_cache=False)
                executed = executed + hat.trace.share.double().sum((1, 2))
                entered = entered + (depth < hat.trace.exit_layer).sum((1, 2))
                tokens += ids.numel()
        columns = {"executed": (executed / tokens).tolist(), "entered": (entered / tokens).tolist(), "tokens": tokens}
        parts.append(pd.DataFrame({"layer": range(len(depth)), **columns}))
        parts[-1].insert(0, "exit_rate", exit_rate)
        parts[-1].insert(0, "capacity", capacity)
    if not parts:
        raise HatError("layer shares need at least one setting")
    return pd.concat(parts, ignore_index=True)
