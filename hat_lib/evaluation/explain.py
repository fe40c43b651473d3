"""What each token of a prompt got: ``explain(hat, "The future of AI is")``.

One forward at the capacity the model is set to. For losses next to the work, and tables with intervals, see
`hat_lib.evaluation.routing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hat_lib.config import HatError, check_count
from hat_lib.evaluation.coloured_text import Passage, ansi, html
from hat_lib.evaluation.routing import token_work
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.plain import check_whole
from hat_lib.text.token_classes import pieces


@dataclass(frozen=True)
class Explanation:
    """A prompt token by token. A notebook shows the coloured text, as does `print` in a terminal."""

    frame: pd.DataFrame = field(repr=False)
    """a row per token and layer: ``token`` (its text), ``position``, ``layer``, ``share`` (executed share of the
    layer's routable work; nan in layers it did not enter), ``exit`` (layers it ran; all of them if it stayed to the
    end)"""
    tokens: pd.DataFrame = field(repr=False)
    """a row per token: ``token``, ``position``, ``id``, ``new`` (generated here), ``protected`` (runs in full),
    ``share`` (mean over the layers it entered), ``model_share`` (all its work / the base's), ``exit``"""
    requested_capacity: float
    capacity: float
    """realised"""
    requested_exit_rate: float
    exit_rate: float
    """realised"""

    def html(self, low: float | None = None, high: float | None = None) -> str:
        """The text as HTML; each token's background shows its share of the base's work."""
        return html(self._passage(), **self._scale(low, high))

    def ansi(self, colours: bool | None = None) -> str:
        """The same for a terminal; without colours, subscripts give tenths of the scale."""
        return ansi(self._passage(), colours=colours, **self._scale())

    def layer_map(self) -> pd.DataFrame:
        """A row per layer and token: the executed share, and its difference from the layer's mean over this prompt."""
        table = self.frame.rename(columns={"token": "text", "position": "token", "exit": "exit_layer"})
        protected = self.tokens["protected"].to_numpy().repeat(self.frame["layer"].nunique())
        usual = table["share"].where(~protected).groupby(table["layer"]).transform("mean")
        return table.assign(difference=table["share"] - usual, protected=protected)

    def __str__(self) -> str:
        return self.ansi()

    def _repr_html_(self) -> str:
        return self.html()

    def _passage(self) -> Passage:
        title = f"capacity {self.requested_capacity:.2f} requested, {self.capacity:.3f} realised"
        if self.requested_exit_rate or self.exit_rate:
            title += f"; exit rate {self.requested_exit_rate:.2f} requested, {self.exit_rate:.3f} realised"
        if self.capacity < 1:
            title += " (thresholds were set on other text, and the first tokens run in full)"
        return Passage(title, self.tokens["token"].tolist(), self.tokens["model_share"].tolist())

    def _scale(self, low: float | None = None, high: float | None = None) -> dict:
        """Leaves protected tokens out of the range: with them, the other tokens would all look alike."""
        free = self.tokens.loc[~self.tokens["protected"], "model_share"]
        free = self.tokens["model_share"] if free.empty else free
        low, high = free.min() if low is None else low, free.max() if high is None else high
        return {"meaning": "share of the base's work that a token got", "low": low, "high": high}


@torch.no_grad()
def explain(hat: HierarchicalTransformer, prompt: str, *, max_new_tokens: int = 0) -> Explanation:
    """What ``hat``, as it is set, runs for each token of a prompt and, with ``max_new_tokens``, of its greedy
    continuation. Raises `HatError` for an empty prompt or one beyond the base's context."""
    check_count("max_new_tokens", max_new_tokens, 0)
    ids = prompt_ids(hat, prompt, max_new_tokens)
    given = ids.shape[1]
    if max_new_tokens:
        how = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": hat.base.tokenizer.pad_token_id}
        ids = hat.lm.generate(ids, attention_mask=torch.ones_like(ids), **how)
    with hat.at():
        hat.lm.model(ids, use_cache=False)
        return explained(hat, ids, given)


def prompt_ids(hat: HierarchicalTransformer, prompt: str, room: int = 0) -> Tensor:
    """A prompt as int64 ``[1, T]``; `HatError` unless it is text and ``room`` more tokens fit into the context."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise HatError(f"a prompt must be text, got {prompt!r}")
    check_whole("the prompt", prompt)
    ids = hat.base.tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.to(hat.base.device)
    given, context = ids.shape[1], hat.lm.config.max_position_embeddings
    if given + room > context:
        raise HatError(f"{given} prompt tokens + {room} new ones exceed the context of the base: {context}")
    return ids


def explained(hat: HierarchicalTransformer, ids: Tensor, given: int) -> Explanation:
    """Explain the last forward of ``hat``, over ``ids [1, T]``, the first ``given`` of which are the prompt."""
    work, share, ids = token_work(hat), hat.trace.share[:, 0].cpu().numpy(), ids[0].tolist()
    exits, (n_layers, length) = work["exit_layer"], share.shape
    tokens = pd.DataFrame({"token": pieces(hat.base.tokenizer, ids), "position": range(length), "id": ids})
    tokens["new"] = tokens["position"] >= given
    tokens = tokens.assign(**{name: work[name] for name in ("protected", "share", "model_share")}, exit=exits)
    frame = tokens[["token", "position"]].loc[tokens.index.repeat(n_layers)].reset_index(drop=True)
    frame["layer"] = np.tile(np.arange(n_layers), length)
    frame["share"] = np.where(np.arange(n_layers)[:, None] < exits, share, np.float32(np.nan)).T.ravel()
    frame["exit"] = exits.repeat(n_layers)
    return Explanation(frame, tokens, hat.capacity, hat.trace.capacity, hat.exit_rate, hat.trace.exit_rate)
