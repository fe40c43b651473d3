"""A text token by token: what each token ran in each layer, and what base and adaptive model predict there.

    table = explain(hat, "The future of AI is")  # a notebook shows it as coloured text, `print` does so in a terminal
    table = token_table(hat, load_text("docstrings", hat.base.tokenizer))

Either reads each block twice, as the base and as the adaptive model is set. Means with intervals over such a table:
`hat_lib.evaluation.routing`. Two predictions meet at a token, so names end in the one they are about:

    ..._of_token  this token, predicted at the position before it, so from what the previous token executed
    ..._of_next   the token after it, predicted from this one's own state: what its own work was spent on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hat_lib.config import HatError, check_count, work_text
from hat_lib.evaluation.coloured_text import ansi, html, passages, visible
from hat_lib.evaluation.perplexity import SLICE
from hat_lib.model.cost import state_cost
from hat_lib.model.policies import Threshold
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.plain import check_whole
from hat_lib.text.token_classes import classes, pieces

LOSSES = ("surprisal", "entropy", "hat_surprisal", "added_loss", "kl")
"""per prediction, nats: the base's surprisal and entropy, the adaptive model's surprisal, how far that is above the
base's (negative where the adaptive model does better), and KL(base || adaptive), its mean over possible next tokens"""
LIKELIEST = 5
"""next tokens that are kept of each prediction"""
MATRICES = {"qkv": "q | k | v", "o": "o", "gate_up": "gate | up", "down": "down", "ffn": "FFN"}
"""site -> the matrices behind it"""


@dataclass(frozen=True)
class TokenTable:
    """``N`` tokens, ``L`` layers, ``S`` sites; context repeated by a strided window is left out."""

    tokens: pd.DataFrame = field(repr=False)
    """a row per token: ``doc``, ``block`` (rank in the dataset), ``position`` (in its block, from 0), ``id``, ``text``,
    ``class`` (see `token_classes.CLASSES`), ``protected``, ``share`` (executed share, mean over the layers it
    entered), ``model_share`` (all its work / the base's), ``exit_layer`` (layers it entered), ``left`` (before
    the last layer), and `LOSSES`, each ``_of_token`` (nan at the beginning of a text) and ``_of_next`` (nan at the end
    of a block). From `explain` also ``new``: whether it was generated."""
    share: np.ndarray = field(repr=False)
    """executed share of each layer, fp32 ``[L, N]``; nan in layers the token did not enter"""
    site_share: np.ndarray = field(repr=False)
    """the same for each site, ``[L, S, N]``"""
    sites: tuple[str, ...]
    requested_capacity: float
    requested_exit_rate: float
    head_work: float = 0.0
    """the head's work, in units of a layer's routable work, if the head skips; else 0"""
    head_share: float = 1.0
    """executed share of the head, mean over tokens"""
    next_ids: np.ndarray = field(repr=False, default=None)
    """the likeliest next tokens of the base and of the adaptive model, int ``[2, N, LIKELIEST]``"""
    next_p: np.ndarray = field(repr=False, default=None)
    """their probabilities"""
    tokenizer: PreTrainedTokenizerBase = field(repr=False, default=None)
    score: np.ndarray | None = field(repr=False, default=None)
    """a token's mean score over the threshold (channel grain) or less the threshold (token grain), ``[L, S, N]``; nan
    where nothing was decided. Only from `explain` with ``scores``"""

    @property
    def layer_capacity(self) -> float:
        """Realised in the layers: mean share over tokens and the layers they entered."""
        return float(np.nanmean(self.share))

    @property
    def capacity(self) -> float:
        """Realised: executed / routable work, in the layers and, if it skips, in the head."""
        ran, head = np.isfinite(self.share).sum(), self.head_work * len(self.tokens)
        return float((self.layer_capacity * ran + self.head_share * head) / (ran + head))

    @property
    def exit_rate(self) -> float:
        """Realised share of tokens that left before the last layer."""
        return float(self.tokens["left"].mean())

    @property
    def work(self) -> str:
        """Capacity and exit rate, requested and realised, in words."""
        share = float(self.tokens["model_share"].mean())
        return work_text(self.requested_capacity, self.capacity, self.requested_exit_rate, self.exit_rate, share)

    @property
    def frame(self) -> pd.DataFrame:
        """A row per token and layer: the columns of `tokens`, ``token`` (its row there), ``layer``, and as ``share``
        that of the layer (nan in layers it did not enter)."""
        n_layers = len(self.share)
        rows = self.tokens.rename_axis("token").reset_index()
        rows = rows.loc[rows.index.repeat(n_layers)].reset_index(drop=True)
        return rows.assign(layer=np.tile(np.arange(n_layers), len(self.tokens)), share=self.share.T.ravel())

    # -- in words and colours ----------------------------------------------------------------------------

    def html(self, **scale) -> str:
        """The text, coloured by ``model_share``; ``low`` and ``high`` are the ends of the scale. By default those of
        the unprotected tokens: with the others, these would all look alike."""
        return html(*passages(self.tokens, "model_share"), **self._scale() | scale)

    def _repr_html_(self) -> str:
        return self.html()

    def __str__(self) -> str:
        return ansi(*passages(self.tokens, "model_share"), **self._scale())

    def _scale(self) -> dict:
        free = self.tokens.loc[~self.tokens["protected"], "model_share"]
        free = self.tokens["model_share"] if free.empty else free
        return {"meaning": f"{self.work}. Colour: share of the base's work", "low": free.min(), "high": free.max()}

    @property
    def score_meaning(self) -> str:
        """What `score` is."""
        return "score − threshold" if self.sites == ("ffn",) else "score / threshold"

    def headline(self, row: int) -> str:
        return f"token {row}: {quoted(self.tokens['text'].iloc[row])}"

    def lines(self, row: int) -> list[str]:
        """The facts of a token, one sentence each."""
        token, n_layers = self.tokens.iloc[row], len(self.share)
        depth = f"stayed for all {n_layers} layers"
        if token["protected"]:
            depth = "protected: it runs in full in every layer and never leaves"
        elif token["left"]:
            depth = f"left after {token['exit_layer']} of {n_layers} layers"
        work = f"{token['share']:.1%} of the layers that it entered, {token['model_share']:.1%} of the base's work"
        entropy = token["entropy_of_next"]
        alike = f"as unsure as among {np.exp(entropy):,.0f} equally likely tokens"
        return [depth, f"executed {work}", f"the base's entropy of what comes next: {entropy:.2f} nats, {alike}"]

    def matrices(self, row: int, layer: int | None = None) -> pd.DataFrame:
        """A row per site: executed share over the layers the token entered and, for a ``layer``, share and score."""
        shares = self.site_share[:, :, row]
        table = pd.DataFrame({"site": [MATRICES[site] for site in self.sites]})
        table["mean"] = [_number(v, ".1%") for v in np.nanmean(shares, axis=0)]
        if layer is not None:
            table[f"layer {layer}"] = [_number(v, ".1%") for v in shares[layer]]
            if self.score is not None:
                table[self.score_meaning] = [_number(v, ".2f") for v in self.score[layer, :, row]]
        return table

    def next_tokens(self, row: int) -> pd.DataFrame:
        """The likeliest next tokens of base and adaptive model: ``base``, ``base_p``, ``adaptive``, ``adaptive_p``."""
        # A tokenizer may drop a space at what it takes for the beginning of a text, so each is decoded after another.
        decode, first = self.tokenizer.decode, int(self.tokens["id"].iloc[row])
        start = len(decode([first], clean_up_tokenization_spaces=False))
        columns = {}
        for name, ids, p in zip(("base", "adaptive"), self.next_ids[:, row], self.next_p[:, row], strict=True):
            texts = [decode([first, i], clean_up_tokenization_spaces=False)[start:] for i in ids.tolist()]
            columns |= {name: [quoted(text) for text in texts], f"{name}_p": p}
        return pd.DataFrame(columns)

    def about(self, row: int, layer: int | None = None) -> str:
        """Everything about a token, as text."""
        tables = self.matrices(row, layer), self.next_tokens(row).rename(columns={"base_p": "p", "adaptive_p": "p "})
        texts = [table.to_string(index=False, float_format="{:.1%}".format) for table in tables]
        return "\n".join([self.headline(row), *self.lines(row), *texts])


@torch.no_grad()
def explain(hat: HierarchicalTransformer, prompt: str, *, max_new_tokens: int = 0, scores: bool = False) -> TokenTable:
    """The table of a prompt and, with ``max_new_tokens``, of its greedy continuation, for ``hat`` as it is set.

    With ``scores`` it also says how far each token's scores lie from the thresholds; a control set by ``hat.using`` is
    then not asked. Raises `HatError` for an empty prompt or one beyond the base's context.
    """
    check_count("max_new_tokens", max_new_tokens, 0)
    if not isinstance(prompt, str) or not prompt.strip():
        raise HatError(f"a prompt must be text, got {prompt!r}")
    check_whole("the prompt", prompt)
    tokenizer, context = hat.base.tokenizer, hat.lm.config.max_position_embeddings
    ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.to(hat.base.device)
    given = ids.shape[1]
    if given + max_new_tokens > context:
        raise HatError(f"{given} prompt tokens + {max_new_tokens} new ones exceed the context of the base: {context}")
    if max_new_tokens:
        how = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        ids = hat.lm.generate(ids, attention_mask=torch.ones_like(ids), **how)
    block = {"input_ids": ids[0].tolist(), "doc": "prompt", "n_context": 0}
    if scores and hat.capacity < 1:
        recorder = _Scores(hat, len(block["input_ids"]))
        with hat.using(recorder):
            table = replace(token_table(hat, [block], progress=False), score=recorder.out.cpu().numpy())
    else:
        table = token_table(hat, [block], progress=False)
    return replace(table, tokens=table.tokens.assign(new=table.tokens["position"] >= given))


def prompt_blocks(tokenizer, prompts: Mapping[str, str]) -> list[dict]:
    """Prompts as blocks for `token_table`, one each, with its name as ``doc``. `HatError` below two tokens."""
    found = [{"input_ids": tokenizer(text).input_ids, "doc": name, "n_context": 0} for name, text in prompts.items()]
    for row in found:
        if len(row["input_ids"]) < 2:
            raise HatError(f"prompt {row['doc']!r} must have at least two tokens, got {prompts[row['doc']]!r}")
    return found


@torch.no_grad()
def token_table(hat: HierarchicalTransformer, blocks: Sequence[Mapping], *, progress: bool = True) -> TokenTable:
    """Read each block, a row of `load_text` or `prompt_blocks`, with the base and with ``hat`` as it is set.

    Raises `HatError` if given ``hat.lm`` instead of ``hat``, no blocks, or a block beyond the base's context.
    """
    if not isinstance(hat, HierarchicalTransformer):
        raise HatError(f"expected a HierarchicalTransformer, got {type(hat).__name__}")
    context, lengths = hat.lm.config.max_position_embeddings, [len(row["input_ids"]) for row in blocks]
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= context:
        raise HatError(f"expected blocks of 1 to {context} tokens, got lengths {sorted(set(lengths))}")
    special = set(hat.base.tokenizer.all_special_ids)
    frames, shares, next_ids, next_p, head_shares = [], [], [], [], []
    for number, row in enumerate(tqdm(blocks, desc="tokens", disable=not progress)):
        ids, new = row["input_ids"], slice(row["n_context"], None)
        with hat.dense():
            base = _final_states(hat, ids)
        ours = _final_states(hat, ids)
        losses, best_ids, best_p = _predictions(hat, base, ours, ids)  # now the trace also holds what the head read
        texts = pieces(hat.base.tokenizer, ids)
        frame = {"doc": row["doc"], "block": number, "position": range(len(ids)), "id": ids, "text": texts}
        frame |= {"class": classes(texts, [i in special for i in ids]), **_work(hat), **losses}
        frames.append(pd.DataFrame(frame).iloc[new])
        shares.append(torch.cat([hat.trace.site_share[:, :, 0], hat.trace.share], dim=1).cpu().numpy()[:, :, new])
        next_ids.append(best_ids[:, new])
        next_p.append(best_p[:, new])
        head_shares += [hat.trace.head_share] * len(frames[-1])
    tokens, share = pd.concat(frames, ignore_index=True), np.concatenate(shares, axis=2)
    entered = np.arange(len(share))[:, None, None] < tokens["exit_layer"].to_numpy()
    share = np.where(entered, share, np.float32(np.nan))
    return TokenTable(
        tokens,
        share[:, -1],
        share[:, :-1],
        tuple(hat.grain.sites),
        hat.capacity,
        hat.exit_rate,
        hat.trace.head_work,
        float(np.mean(head_shares)),
        np.concatenate(next_ids, axis=1),
        np.concatenate(next_p, axis=1),
        hat.base.tokenizer,
    )


def _final_states(hat: HierarchicalTransformer, ids: Sequence[int]) -> Tensor:
    """``[T, D]``; ``hat.trace`` is of this forward."""
    return hat.lm.model(input_ids=torch.tensor([ids], device=hat.lm.device), use_cache=False).last_hidden_state[0]


def _work(hat: HierarchicalTransformer) -> dict[str, np.ndarray]:
    """What each token executed in the last forward of a single row, ``[T]`` each."""
    state, cost = hat.trace, state_cost(hat, hat.trace)
    exit_layer = state.exit_layer[0].long().cpu()
    return {
        "protected": state.protected[0].cpu().numpy(),
        "share": (state.share[:, 0].double().sum(0).cpu() / exit_layer).numpy(),
        "model_share": (cost.executed / cost.dense)[0].numpy(),
        "exit_layer": exit_layer.numpy(),
        "left": (exit_layer < state.n_layers).numpy(),
    }


def _predictions(hat, base: Tensor, ours: Tensor, ids: Sequence[int]) -> tuple[dict, np.ndarray, np.ndarray]:
    """`LOSSES` of each token and of the next one, nats, ``[T]``, from final states ``[T, D]``; and the `LIKELIEST` next
    tokens of both models, ``[2, T, LIKELIEST]``."""
    following = torch.tensor([*ids[1:], 0], device=base.device)
    parts, best_ids, best_p = [], [], []
    for states, others, after in zip(base.split(SLICE), ours.split(SLICE), following.split(SLICE), strict=True):
        with hat.dense():
            p = F.log_softmax(hat.lm.lm_head(states).float(), dim=-1)
        q = F.log_softmax(hat.lm.lm_head(others).float(), dim=-1)
        surprisal, hat_surprisal = (-r.gather(1, after[:, None])[:, 0] for r in (p, q))
        entropy, kl = torch.special.entr(p.exp()).sum(-1), (p.exp() * (p - q)).sum(-1)
        parts.append(torch.stack([surprisal, entropy, hat_surprisal, hat_surprisal - surprisal, kl]))
        best = [r.topk(LIKELIEST) for r in (p, q)]
        best_ids.append(torch.stack([top.indices for top in best]))
        best_p.append(torch.stack([top.values.exp() for top in best]))
    of_next = torch.cat(parts, dim=1).double().cpu().numpy()
    of_token = np.concatenate([np.full((len(LOSSES), 1), np.nan), of_next[:, :-1]], axis=1)
    of_next[[LOSSES.index(name) for name in ("surprisal", "hat_surprisal", "added_loss")], -1] = np.nan
    losses = {f"{name}_of_token": values for name, values in zip(LOSSES, of_token, strict=True)}
    losses |= {f"{name}_of_next": values for name, values in zip(LOSSES, of_next, strict=True)}
    return losses, torch.cat(best_ids, 1).cpu().numpy(), torch.cat(best_p, 1).cpu().numpy()


class _Scores(Threshold):
    """The method's own decisions, which also notes how far the scores are from the thresholds in ``out [L, S, T]``."""

    def __init__(self, hat: HierarchicalTransformer, length: int):
        super().__init__(hat.grain, hat.routers, hat.calibration.thresholds_at(hat.capacity))
        self.hat = hat
        self.out = torch.full((hat.config.n_layers, len(hat.grain.sites), length), torch.nan, device=hat.base.device)

    def __call__(self, layer, site, x, rows, state):
        keep, score = super().__call__(layer, site, x, rows, state), self.hat.scores(layer, site, x)
        threshold = self.thresholds[layer, site]
        score = score - threshold if self.grain.logits else score.mean(-1) / threshold
        self.out[layer, self.hat.grain.sites.index(site), slice(None) if rows is None else rows] = score.float()
        return keep


def quoted(text: str) -> str:
    """A token in quotation marks, so that its spaces show."""
    return f"“{visible(text).replace(chr(10), '')}”" if text else "(part of a character)"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if np.isfinite(value) else "–"
