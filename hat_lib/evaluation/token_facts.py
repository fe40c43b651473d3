"""A prompt token by token: what each ran, by layer and matrix, and what base and adaptive model predict next.

    facts = token_facts(hat, "The future of AI is")
    print(facts.about(4))

It takes two forwards, one of the base and one of the model as it is set. The map in notebooks shows this, and its
still twin prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hat_lib.config import HatError, work_text
from hat_lib.evaluation.coloured_text import visible
from hat_lib.evaluation.explain import Explanation, explained, prompt_ids
from hat_lib.model.cost import state_cost
from hat_lib.model.policies import Threshold
from hat_lib.model.transformer import HierarchicalTransformer

MOST = 128
"""tokens of a prompt; a map of more would be unreadable"""
LIKELIEST = 5
MATRICES = {"qkv": "q | k | v", "o": "o", "gate_up": "gate | up", "down": "down", "ffn": "FFN"}
"""site -> the matrices behind it"""


@dataclass(frozen=True)
class TokenFacts:
    """``T`` tokens, ``L`` layers, ``S`` sites."""

    explanation: Explanation
    """the work of each token, with a figure of the map"""
    work: str
    """capacity and exit rate, requested and realised, in words"""
    sites: tuple[str, ...]
    """their names in `MATRICES`"""
    share: np.ndarray = field(repr=False)
    """executed share of the layer, fp32 ``[L, T]``; nan in layers the token did not enter"""
    site_share: np.ndarray = field(repr=False)
    """the same for each site, ``[L, S, T]``"""
    score: np.ndarray = field(repr=False)
    """a token's mean score relative to the threshold, ``[L, S, T]``: divided by it (channel grain) or less it (token
    grain); nan where nothing was decided"""
    entropy: np.ndarray = field(repr=False)
    """of the base's prediction of the next token, nats ``[T]``"""
    base_next: list[list[tuple[str, float]]] = field(repr=False)
    """the `LIKELIEST` next tokens and their probabilities, for each token of the prompt"""
    hat_next: list[list[tuple[str, float]]] = field(repr=False)

    @property
    def scored(self) -> str:
        """What `score` is."""
        return "score − threshold" if self.sites == (MATRICES["ffn"],) else "score / threshold"

    def headline(self, position: int) -> str:
        token = self.explanation.tokens.iloc[position]
        return f"token {position}: {quoted(token['token'])}"

    def lines(self, position: int) -> list[str]:
        """A token's facts, one sentence each."""
        token, n_layers = self.explanation.tokens.iloc[position], len(self.share)
        if token["protected"]:
            depth = "protected: it runs in full in every layer and never leaves"
        elif token["exit"] < n_layers:
            depth = f"left after {token['exit']} of {n_layers} layers"
        else:
            depth = f"stayed for all {n_layers} layers"
        work = f"{token['share']:.1%} of the layers that it entered, {token['model_share']:.1%} of the base's work"
        entropy = self.entropy[position]
        alike = f"as unsure as among {np.exp(entropy):,.0f} equally likely tokens"
        return [depth, f"executed {work}", f"the base's entropy of what comes next: {entropy:.2f} nats, {alike}"]

    def matrices(self, position: int, layer: int | None = None) -> pd.DataFrame:
        """A row per matrix: executed share over the layers the token entered and, for a ``layer``, share and score."""
        shares = self.site_share[:, :, position]
        table = pd.DataFrame({"site": self.sites, "mean": [_percent(v) for v in np.nanmean(shares, axis=0)]})
        if layer is not None:
            table[f"layer {layer}"] = [_percent(v) for v in shares[layer]]
            table[self.scored] = [_number(v) for v in self.score[layer, :, position]]
        return table

    def next_tokens(self, position: int) -> pd.DataFrame:
        """The likeliest next tokens of the base and the adaptive model, side by side."""
        base, ours = self.base_next[position], self.hat_next[position]
        columns = {"base": [quoted(t) for t, _ in base], "p": [_percent(p) for _, p in base]}
        return pd.DataFrame(columns | {"adaptive": [quoted(t) for t, _ in ours], "p ": [_percent(p) for _, p in ours]})

    def about(self, position: int, layer: int | None = None) -> str:
        """Everything about a token, as text."""
        tables = self.matrices(position, layer), self.next_tokens(position)
        said = [self.headline(position), *self.lines(position)]
        return "\n".join([*said, *(table.to_string(index=False) for table in tables)])


@torch.inference_mode()
def token_facts(hat: HierarchicalTransformer, prompt: str) -> TokenFacts:
    """The facts of a prompt of at most `MOST` tokens, read by the base and by ``hat`` as it is set. Raises `HatError`
    for a longer one."""
    ids = prompt_ids(hat, prompt)
    length = ids.shape[1]
    if length > MOST:
        raise HatError(f"a map has room for {MOST} tokens, the prompt has {length}: make it shorter")
    with hat.dense():
        base = hat.lm(ids, use_cache=False).logits[0]
    scores = torch.full((hat.config.n_layers, len(hat.grain.sites), length), torch.nan, device=ids.device)
    if hat.capacity < 1:
        thresholds = hat.calibration.thresholds_at(hat.capacity)
        with hat.using(_Scores(hat, thresholds, scores)):
            ours = hat.lm(ids, use_cache=False).logits[0]
    else:
        ours = hat.lm(ids, use_cache=False).logits[0]
    explanation, trace = explained(hat, ids, length), hat.trace
    entered = np.arange(hat.config.n_layers)[:, None] < explanation.tokens["exit"].to_numpy()
    work = hat.capacity, trace.capacity, hat.exit_rate, trace.exit_rate, state_cost(hat, trace).model_share
    base_next, entropy = _likeliest(hat, base, ids)
    return TokenFacts(
        explanation,
        work_text(*work),
        tuple(MATRICES[site] for site in hat.grain.sites),
        np.where(entered, trace.share[:, 0].cpu().numpy(), np.float32(np.nan)),
        np.where(entered[:, None], trace.site_share[:, :, 0].cpu().numpy(), np.float32(np.nan)),
        scores.cpu().numpy(),
        entropy,
        base_next,
        _likeliest(hat, ours, ids)[0],
    )


class _Scores(Threshold):
    """The method, which also writes how far the scores are from the thresholds to ``out [L, S, T]``."""

    def __init__(self, hat: HierarchicalTransformer, thresholds: dict[tuple[int, str], float], out: Tensor):
        super().__init__(hat.routers, thresholds)
        self.hat, self.out = hat, out

    def __call__(self, layer, site, x, rows, state):
        keep, score = super().__call__(layer, site, x, rows, state), self.hat.scores(layer, site, x)
        threshold = self.thresholds[layer, site]
        score = score - threshold if site == "ffn" else score.mean(-1) / threshold
        where = slice(None) if rows is None else rows
        self.out[layer, self.hat.grain.sites.index(site), where] = score.float()
        return keep


def _likeliest(hat: HierarchicalTransformer, logits: Tensor, ids: Tensor) -> tuple[list, np.ndarray]:
    """The likeliest next tokens with their probabilities, and the entropy in nats, from ``logits [T, V]``."""
    p = logits.float().softmax(-1)
    best, which = p.topk(LIKELIEST)
    # A tokenizer may drop a space at what it takes for the beginning of a text, so each is decoded after another token.
    decode, first = hat.base.tokenizer.batch_decode, ids[0, 0].item()
    whole = decode([[first, i] for i in which.flatten().tolist()], clean_up_tokenization_spaces=False)
    begins = len(decode([[first]], clean_up_tokenization_spaces=False)[0])
    texts = iter([text[begins:] for text in whole])
    rows = [[(next(texts), v) for v in row] for row in best.tolist()]
    return rows, torch.special.entr(p).sum(-1).cpu().numpy()


def quoted(text: str) -> str:
    """A token in quotation marks, so that its spaces show; one without text is said to be part of a character."""
    return f"“{visible(text).replace(chr(10), '')}”" if text else "(part of a character)"


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.1%}"


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"
