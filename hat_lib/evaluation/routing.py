"""Routing patterns: which tokens get how much, where in the model, and how hard they are.

`patterns` reads a text twice, as the base and as the adaptive model, and keeps one row a token; the tables made of it
are in `hat_lib.evaluation.routing_tables`. Two predictions meet at a token, and names end in what they are about:

    ..._of_token  this token, predicted from the position before it, so by what the token before executed
    ..._of_next   the token after it, predicted from this one's own state: what its own work was spent on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.config import HatError
from hat_lib.evaluation.perplexity import SLICE
from hat_lib.model.cost import state_cost
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.token_classes import classes, pieces

LOSSES = ("surprisal", "entropy", "hat_surprisal", "added_loss", "kl")
"""per prediction, nats: the base's surprisal and entropy, the adaptive model's surprisal, how much that is above the
base's (negative where the adaptive model does better), and KL(base || adaptive), its mean over what may come"""


@dataclass(frozen=True)
class Patterns:
    """A text token by token, ``N`` in all; context that a strided window repeats is left out."""

    tokens: pd.DataFrame
    """a row per token: ``doc``, ``block`` (rank in the dataset), ``position`` (in its block, from 0), ``id``, ``text``,
    ``class`` (see `token_classes.CLASSES`), ``protected``, ``share`` (executed share, mean over the layers that it
    entered), ``model_share`` (all its work / the base's), ``exit_layer`` (layers that it entered), ``left`` (before
    the last layer), and `LOSSES`, each ``_of_token`` (nan at the beginning of a text) and ``_of_next`` (nan at the end
    of a block, where the next token is another block's)"""
    site_share: np.ndarray
    """executed share, fp32 ``[L, S, N]``; nan in layers that the token did not enter"""
    share: np.ndarray
    """the same over a layer's sites, weighted by their work, fp32 ``[L, N]``"""
    sites: tuple[str, ...]
    granularity: str
    requested_capacity: float
    requested_exit_rate: float

    @property
    def capacity(self) -> float:
        """Realised: mean share over tokens and the layers that they entered."""
        return float(np.nanmean(self.share))

    @property
    def exit_rate(self) -> float:
        """Realised share of tokens that left before the last layer."""
        return float(self.tokens["left"].mean())


def prompt_blocks(tokenizer, prompts: Mapping[str, str]) -> list[dict]:
    """Prompts as blocks for `patterns`, one each, whose ``doc`` is its name. Raises `HatError` below two tokens."""
    found = [{"input_ids": tokenizer(text).input_ids, "doc": name, "n_context": 0} for name, text in prompts.items()]
    for row in found:
        if len(row["input_ids"]) < 2:
            raise HatError(f"prompt {row['doc']!r} must have at least two tokens, got {prompts[row['doc']]!r}")
    return found


@torch.no_grad()
def patterns(hat: HierarchicalTransformer, blocks: Sequence[Mapping], *, progress: bool = True) -> Patterns:
    """Run ``hat`` as it is set, and its base, over each block.

    Args:
        blocks: rows of `load_text` or `prompt_blocks`: ``input_ids``, ``doc``, ``n_context``. One a forward, so there
            are no pads.

    Raises `HatError` for ``hat.lm`` in place of ``hat``, no blocks, and a block beyond the base's context.
    """
    if not isinstance(hat, HierarchicalTransformer):
        raise HatError(f"patterns needs a HierarchicalTransformer, got {type(hat).__name__}")
    context, lengths = hat.lm.config.max_position_embeddings, [len(row["input_ids"]) for row in blocks]
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= context:
        raise HatError(f"patterns needs blocks of 1 to {context} tokens, got lengths {sorted(set(lengths))}")
    frames, shares = [], []
    for number, row in enumerate(tqdm(blocks, desc="patterns", disable=not progress)):
        with hat.dense():
            base = _final_states(hat, row["input_ids"])
        ours = _final_states(hat, row["input_ids"])
        new = slice(row["n_context"], None)
        frame = {"doc": row["doc"], "block": number, **_texts(hat, row["input_ids"]), **token_work(hat)}
        frame |= _losses(hat.lm, base, ours, row["input_ids"])
        frames.append(pd.DataFrame(frame).iloc[new])
        shares.append(torch.cat([hat.trace.site_share[:, :, 0], hat.trace.share], dim=1).cpu().numpy()[:, :, new])
    tokens, share = pd.concat(frames, ignore_index=True), np.concatenate(shares, axis=2)
    share = np.where(np.arange(len(share))[:, None, None] < tokens["exit_layer"].to_numpy(), share, np.float32(np.nan))
    requested = hat.config.granularity, hat.capacity, hat.exit_rate
    return Patterns(tokens, share[:, :-1], share[:, -1], tuple(hat.grain.sites), *requested)


def _final_states(hat: HierarchicalTransformer, ids: Sequence[int]) -> Tensor:
    """``[T, D]``; ``hat.trace`` is of this forward."""
    tokens = torch.tensor([ids], device=hat.lm.device)
    out = hat.lm.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return out.last_hidden_state[0]


def _texts(hat: HierarchicalTransformer, ids: Sequence[int]) -> dict:
    tokenizer = hat.base.tokenizer
    texts, own = pieces(tokenizer, ids), set(tokenizer.all_special_ids)
    return {"position": range(len(ids)), "id": ids, "text": texts, "class": classes(texts, [i in own for i in ids])}


def token_work(hat: HierarchicalTransformer) -> dict[str, np.ndarray]:
    """What each token of the last forward of one row executed, ``[T]`` each; columns of `Patterns.tokens`."""
    state, cost = hat.trace, state_cost(hat, hat.trace)
    exit_layer = state.exit_layer[0].long().cpu()
    return {
        "protected": state.protected[0].cpu().numpy(),
        "share": (state.share[:, 0].double().sum(0).cpu() / exit_layer).numpy(),
        "model_share": (cost.executed / cost.dense)[0].numpy(),
        "exit_layer": exit_layer.numpy(),
        "left": (exit_layer < state.n_layers).numpy(),
    }


def _losses(lm, base: Tensor, ours: Tensor, ids: Sequence[int]) -> dict:
    """`LOSSES` of each token and of the next, nats, ``[T]``, from final states ``[T, D]``."""
    following, parts = torch.tensor([*ids[1:], 0], device=base.device), []
    for states, others, after in zip(base.split(SLICE), ours.split(SLICE), following.split(SLICE), strict=True):
        p, q = (F.log_softmax(lm.lm_head(h).float(), dim=-1) for h in (states, others))
        surprisal, hat_surprisal = (-r.gather(1, after[:, None])[:, 0] for r in (p, q))
        entropy, kl = torch.special.entr(p.exp()).sum(-1), (p.exp() * (p - q)).sum(-1)
        parts.append(torch.stack([surprisal, entropy, hat_surprisal, hat_surprisal - surprisal, kl]))
    of_next = torch.cat(parts, dim=1).double().cpu().numpy()
    of_token = np.concatenate([np.full((len(LOSSES), 1), np.nan), of_next[:, :-1]], axis=1)
    of_next[[LOSSES.index(name) for name in ("surprisal", "hat_surprisal", "added_loss")], -1] = np.nan
    both = ("token", of_token), ("next", of_next)
    return {f"{name}_of_{which}": v for which, values in both for name, v in zip(LOSSES, values, strict=True)}
