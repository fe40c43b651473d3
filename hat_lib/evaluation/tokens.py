"""A text token by token: what each token ran in each layer, and what base and adaptive model predict there::

    table = explain(hat, "The future of AI is")  # a notebook shows it as coloured text, `print` does so in a terminal
    table = token_table(hat, load_text("docstrings", hat.base.tokenizer))

Two predictions meet at a token, so names end in the one they are about:

- ``..._of_token``: this token, predicted at the position before it, so from what the previous token executed
- ``..._of_next``: the token after it, predicted from this one's own state: what its own work was spent on
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hat_lib.config import HatError, check_count, work_text
from hat_lib.evaluation.perplexity import SLICE
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import WorkTally, state_cost
from hat_lib.text.coloured import ansi, html, passages
from hat_lib.text.plain import check_whole
from hat_lib.text.token_classes import classes, pieces

LOSSES = ("surprisal", "entropy", "added_loss", "kl")
"""in nats: the base's surprisal and entropy, how much more surprised the adaptive model is, KL(base || adaptive)"""
LIKELIEST = 5  # next tokens that are kept of each prediction


@dataclass(frozen=True)
class TokenTable:
    """``N`` tokens, ``L`` layers, ``S`` sites; context repeated by a strided window is left out."""

    tokens: pd.DataFrame = field(repr=False)
    """a row per token: ``doc``, ``block`` (rank in the dataset), ``position`` (in its block, from 0), ``id``, ``text``,
    ``class`` (see `token_classes.CLASSES`), ``protected``, ``share`` (executed share, mean over the layers it entered),
    ``model_share`` (all its work / the base's), ``exit_layer`` (layers it entered), ``left`` (before the last layer),
    and `LOSSES`, each ``_of_token`` (nan at the start of a text) and ``_of_next`` (nan at the end of a block)"""
    share: np.ndarray = field(repr=False)  #: of each layer, fp32 ``[L, N]``; nan in layers the token did not enter
    site_share: np.ndarray = field(repr=False)  #: the same for each site, ``[L, S, N]``
    sites: tuple[str, ...]
    requested_capacity: float
    requested_exit_rate: float
    capacity: float  #: realised over these tokens, like the next three
    exit_rate: float
    model_share: float
    layer_capacity: float
    #: The likeliest next tokens of the base and of the adaptive model, ``[2, N, LIKELIEST]``, and their probabilities.
    next_ids: np.ndarray = field(repr=False)
    next_p: np.ndarray = field(repr=False)

    @property
    def work(self) -> str:
        """Capacity and exit rate, requested and realised, in words."""
        return work_text(**vars(self))

    def _repr_html_(self) -> str:
        return html(*passages(self.tokens, "model_share"), **self._scale())

    def __str__(self) -> str:
        # From nothing to all of the work, so that a subscript where there is no colour means tenths of it.
        return ansi(*passages(self.tokens, "model_share"), **self._scale() | {"low": 0.0, "high": 1.0})

    def _scale(self) -> dict:
        """Ends of the unprotected tokens: with the others, these would all look alike."""
        free = self.tokens.loc[~self.tokens["protected"], "model_share"]
        free = self.tokens["model_share"] if free.empty else free
        return {"meaning": f"{self.work}. Colour: share of the base's work", "low": free.min(), "high": free.max()}


@torch.no_grad()
def explain(hat: HierarchicalTransformer, prompt: str, *, max_new_tokens: int = 0) -> TokenTable:
    """The table of a prompt and of its greedy continuation, for ``hat`` as it is set; `HatError` if they are empty or
    exceed the base's context.

    >>> table = explain(hat, "The old keeper")
    >>> "".join(table.tokens["text"]), table.share.shape
    ('The old keeper', (4, 14))
    """
    check_count("max_new_tokens", max_new_tokens, 0)
    ids = torch.tensor([prompt_ids(hat, prompt)], device=hat.base.device)
    context = hat.lm.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > context:
        raise HatError(f"{ids.shape[1]} prompt tokens + {max_new_tokens} new ones exceed the base's context: {context}")
    if max_new_tokens:
        how = {"do_sample": False, "pad_token_id": hat.base.tokenizer.pad_token_id}
        ids = hat.lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **how)
    return token_table(hat, [{"input_ids": ids[0].tolist(), "doc": "prompt", "n_context": 0}], progress=False)


def prompt_ids(hat: HierarchicalTransformer, prompt: object) -> list[int]:
    """The tokens of a prompt; `HatError` unless it is text."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise HatError(f"a prompt must be text, got {prompt!r}")
    check_whole("the prompt", prompt)
    return hat.base.tokenizer(prompt, verbose=False).input_ids


def prompt_blocks(tokenizer: PreTrainedTokenizerBase, prompts: Mapping[str, str]) -> list[dict]:
    """Prompts as blocks for `token_table`, one each, with its name as ``doc``."""
    ids = {name: tokenizer(text, verbose=False).input_ids for name, text in prompts.items()}
    return [{"input_ids": found, "doc": name, "n_context": 0} for name, found in ids.items()]


@torch.no_grad()
def token_table(
    hat: HierarchicalTransformer, blocks: Sequence[Mapping], *, base_states: dict | None = None, progress: bool = True
) -> TokenTable:
    """Read each block, a row of `load_text` or `prompt_blocks`, with the base and with ``hat`` as it is set.

    ``base_states`` keeps the base's final states, ``[T, D]`` a block, for the next table of the same blocks. Raises
    `HatError` if given ``hat.lm`` instead of ``hat``, no blocks, or a block beyond the base's context.
    """
    if not isinstance(hat, HierarchicalTransformer):
        raise HatError(f"expected a HierarchicalTransformer, got {type(hat).__name__}")
    context, lengths = hat.lm.config.max_position_embeddings, [len(row["input_ids"]) for row in blocks]
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= context:
        raise HatError(f"expected blocks of 1 to {context} tokens, got lengths {sorted(set(lengths))}")
    special, spent = set(hat.base.tokenizer.all_special_ids), WorkTally(hat)
    frames, arrays, base_states = [], [], {} if base_states is None else base_states
    for number, row in enumerate(tqdm(blocks, desc="tokens", disable=not progress)):
        ids, n_context = row["input_ids"], row["n_context"]
        if number not in base_states:
            with hat.dense():
                base_states[number] = _final_states(hat, ids)
        losses, best = _predictions(hat, base_states[number], _final_states(hat, ids), ids)
        # Now the trace, of the second of these forwards, also holds what the head read.
        trace, cost = hat.trace, state_cost(hat, hat.trace)
        exit_layer, share = trace.exit_layer[0].long().cpu().numpy(), trace.share[:, 0]
        texts = pieces(hat.base.tokenizer, ids)
        columns = {"doc": row["doc"], "block": number, "position": range(len(ids)), "id": ids, "text": texts}
        columns["class"] = classes(texts, [i in special for i in ids])
        columns["protected"] = trace.protected[0].cpu().numpy()
        columns["share"] = share.double().sum(0).cpu().numpy() / exit_layer
        columns["model_share"] = (cost.executed / cost.dense)[0].numpy()
        columns |= {"exit_layer": exit_layer, "left": exit_layer < trace.n_layers}
        frames.append(pd.DataFrame(columns | losses).iloc[n_context:])
        shares = torch.cat([trace.site_share[:, :, 0].mT, share[..., None]], dim=2).cpu().numpy()
        shares[np.arange(len(shares))[:, None] >= exit_layer] = np.nan  # layers that a token did not enter
        arrays.append([values[:, n_context:] for values in (shares, *best)])
        trace.real[:, :n_context] = False  # counted in the block before
        spent.add(trace)
    share, next_ids, next_p = (np.concatenate(part, axis=1) for part in zip(*arrays, strict=True))
    tokens, site_share = pd.concat(frames, ignore_index=True), np.moveaxis(share[:, :, :-1], 2, 1)
    settings = tuple(hat.grain.sites), hat.capacity, hat.exit_rate, *spent.shares, spent.layer_capacity
    return TokenTable(tokens, share[:, :, -1], site_share, *settings, next_ids, next_p)


def _final_states(hat: HierarchicalTransformer, ids: Sequence[int]) -> Tensor:
    """``[T, D]``; ``hat.trace`` is of this forward."""
    return hat.lm.model(input_ids=torch.tensor([ids], device=hat.base.device), use_cache=False).last_hidden_state[0]


def _predictions(hat, base: Tensor, ours: Tensor, ids: Sequence[int]) -> tuple[dict, tuple[np.ndarray, np.ndarray]]:
    """`LOSSES` of each token and of the next one, nats, ``[T]``, from final states ``[T, D]``; and the `LIKELIEST` next
    tokens of both models, ids and probabilities, ``[2, T, LIKELIEST]``."""
    following = torch.tensor([*ids[1:], 0], device=base.device)
    losses, best = [], []
    for states, others, after in zip(base.split(SLICE), ours.split(SLICE), following.split(SLICE), strict=True):
        with hat.dense():
            p = F.log_softmax(hat.logits(states).float(), dim=-1)
        q = F.log_softmax(hat.logits(others).float(), dim=-1)
        surprisal, hat_surprisal = (-r.gather(1, after[:, None])[:, 0] for r in (p, q))
        entropy = torch.special.entr(p.exp()).sum(-1)
        kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        losses.append(torch.stack([surprisal, entropy, hat_surprisal - surprisal, kl]))
        best.append(torch.stack([p, q]).topk(LIKELIEST))
    columns = {}
    for name, of_next in zip(LOSSES, torch.cat(losses, dim=1).double().cpu().numpy(), strict=True):
        columns[f"{name}_of_token"] = np.concatenate([[np.nan], of_next[:-1]])
        if name in ("surprisal", "added_loss"):  # which need the next token itself
            of_next[-1] = np.nan
        columns[f"{name}_of_next"] = of_next
    p, likeliest = (torch.cat(part, dim=1).cpu() for part in zip(*best, strict=True))
    return columns, (likeliest.numpy(), p.exp().numpy())
