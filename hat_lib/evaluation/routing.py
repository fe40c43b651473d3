"""Routing patterns: which tokens get how much work, where in the model, and how hard they are.

`patterns` runs a text twice, through the base and through the adaptive model, and keeps one row per token; all tables
are made from it. Two predictions meet at a token, so names end in the one they are about:

    ..._of_token  this token, predicted at the position before it, so from what the previous token executed
    ..._of_next   the token after it, predicted from this one's own state: what its own work was spent on

Protected tokens run in full whatever a router says, so every table but `by_position` leaves them out. All intervals are
95 % bootstraps over documents or runs of blocks, as `hat_lib.evaluation.intervals` says; what occurs in fewer than six
blocks, or does not vary, has none (nan). ``difference`` is relative to the mean of all unprotected tokens, and its
interval resamples both together. Intervals apply to text like this text, and in a table with many of them some will
miss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.config import HatError
from hat_lib.evaluation.intervals import FEWEST, resample, tails, units
from hat_lib.evaluation.perplexity import SLICE
from hat_lib.model.cost import state_cost
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.token_classes import CLASSES, classes, pieces

LOSSES = ("surprisal", "entropy", "hat_surprisal", "added_loss", "kl")
"""per prediction, nats: the base's surprisal and entropy, the adaptive model's surprisal, how far that is above the
base's (negative where the adaptive model does better), and KL(base || adaptive), its mean over possible next tokens"""

MEASURES = ("share", "model_share", "left", "surprisal_of_token", "entropy_of_next", "added_loss_of_next", "kl_of_next")
"""columns of `Patterns.tokens` whose means the tables give"""
RESAMPLES = 1000
PLACE = ["block", "doc"]
RUN = 16
"""tokens of a prompt that are resampled together, because neighbours are alike"""


@dataclass(frozen=True)
class Patterns:
    """A text token by token, ``N`` in all; context repeated by a strided window is left out."""

    tokens: pd.DataFrame
    """a row per token: ``doc``, ``block`` (rank in the dataset), ``position`` (in its block, from 0), ``id``, ``text``,
    ``class`` (see `token_classes.CLASSES`), ``protected``, ``share`` (executed share, mean over the layers it
    entered), ``model_share`` (all its work / the base's), ``exit_layer`` (layers it entered), ``left`` (before
    the last layer), and `LOSSES`, each ``_of_token`` (nan at the beginning of a text) and ``_of_next`` (nan at the end
    of a block, where the next token belongs to another block)"""
    site_share: np.ndarray
    """executed share, fp32 ``[L, S, N]``; nan in layers the token did not enter"""
    share: np.ndarray
    """the same over all sites of a layer, weighted by their work, fp32 ``[L, N]``"""
    sites: tuple[str, ...]
    granularity: str
    requested_capacity: float
    requested_exit_rate: float
    head_work: float = 0.0
    """the head's work, in units of a layer's routable work, if the head is gated; else 0"""
    head_share: float = 1.0
    """executed share of the head, mean over tokens"""

    @property
    def layer_capacity(self) -> float:
        """Realised in the layers: mean share over tokens and the layers they entered."""
        return float(np.nanmean(self.share))

    @property
    def capacity(self) -> float:
        """Realised: executed / routable work, in the layers and, if it is gated, in the head."""
        ran, head = np.isfinite(self.share).sum(), self.head_work * len(self.tokens)
        return float((self.layer_capacity * ran + self.head_share * head) / (ran + head))

    @property
    def exit_rate(self) -> float:
        """Realised share of tokens that left before the last layer."""
        return float(self.tokens["left"].mean())


def prompt_blocks(tokenizer, prompts: Mapping[str, str]) -> list[dict]:
    """Prompts as blocks for `patterns`, one per prompt, with its name as ``doc``. `HatError` below two tokens."""
    found = [{"input_ids": tokenizer(text).input_ids, "doc": name, "n_context": 0} for name, text in prompts.items()]
    for row in found:
        if len(row["input_ids"]) < 2:
            raise HatError(f"prompt {row['doc']!r} must have at least two tokens, got {prompts[row['doc']]!r}")
    return found


@torch.no_grad()
def patterns(hat: HierarchicalTransformer, blocks: Sequence[Mapping], *, progress: bool = True) -> Patterns:
    """Run ``hat`` as it is set, and its base, over each block: a row of `load_text` or `prompt_blocks`.

    Raises `HatError` if given ``hat.lm`` instead of ``hat``, no blocks, or a block beyond the base's context.
    """
    if not isinstance(hat, HierarchicalTransformer):
        raise HatError(f"patterns needs a HierarchicalTransformer, got {type(hat).__name__}")
    context, lengths = hat.lm.config.max_position_embeddings, [len(row["input_ids"]) for row in blocks]
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= context:
        raise HatError(f"patterns needs blocks of 1 to {context} tokens, got lengths {sorted(set(lengths))}")
    frames, shares, head_shares, special = [], [], [], set(hat.base.tokenizer.all_special_ids)
    for number, row in enumerate(tqdm(blocks, desc="patterns", disable=not progress)):
        with hat.dense():
            base = _final_states(hat, row["input_ids"])
        ours = _final_states(hat, row["input_ids"])
        new = slice(row["n_context"], None)
        losses = _losses(hat, base, ours, row["input_ids"])  # only then does the trace hold what the head read
        ids, texts = row["input_ids"], pieces(hat.base.tokenizer, row["input_ids"])
        frame = {"doc": row["doc"], "block": number, "position": range(len(ids)), "id": ids, "text": texts}
        frame |= {"class": classes(texts, [i in special for i in ids]), **token_work(hat), **losses}
        frames.append(pd.DataFrame(frame).iloc[new])
        head_shares.append(np.full(len(frames[-1]), hat.trace.head_share))
        shares.append(torch.cat([hat.trace.site_share[:, :, 0], hat.trace.share], dim=1).cpu().numpy()[:, :, new])
    tokens, share = pd.concat(frames, ignore_index=True), np.concatenate(shares, axis=2)
    share = np.where(np.arange(len(share))[:, None, None] < tokens["exit_layer"].to_numpy(), share, np.float32(np.nan))
    requested = hat.config.granularity, hat.capacity, hat.exit_rate
    head = hat.trace.head_work, float(np.concatenate(head_shares).mean())
    return Patterns(tokens, share[:, :-1], share[:, -1], tuple(hat.grain.sites), *requested, *head)


def _final_states(hat: HierarchicalTransformer, ids: Sequence[int]) -> Tensor:
    """``[T, D]``; ``hat.trace`` is of this forward."""
    return hat.lm.model(input_ids=torch.tensor([ids], device=hat.lm.device), use_cache=False).last_hidden_state[0]


def token_work(hat: HierarchicalTransformer) -> dict[str, np.ndarray]:
    """What each token executed in the last forward of a single row, ``[T]`` each; columns of `Patterns.tokens`."""
    state, cost = hat.trace, state_cost(hat, hat.trace)
    exit_layer = state.exit_layer[0].long().cpu()
    return {
        "protected": state.protected[0].cpu().numpy(),
        "share": (state.share[:, 0].double().sum(0).cpu() / exit_layer).numpy(),
        "model_share": (cost.executed / cost.dense)[0].numpy(),
        "exit_layer": exit_layer.numpy(),
        "left": (exit_layer < state.n_layers).numpy(),
    }


def _losses(hat, base: Tensor, ours: Tensor, ids: Sequence[int]) -> dict:
    """`LOSSES` of each token and of the next one, nats, ``[T]``, from final states ``[T, D]``."""
    following, parts = torch.tensor([*ids[1:], 0], device=base.device), []
    for states, others, after in zip(base.split(SLICE), ours.split(SLICE), following.split(SLICE), strict=True):
        with hat.dense():
            p = F.log_softmax(hat.lm.lm_head(states).float(), dim=-1)
        q = F.log_softmax(hat.lm.lm_head(others).float(), dim=-1)
        surprisal, hat_surprisal = (-r.gather(1, after[:, None])[:, 0] for r in (p, q))
        entropy, kl = torch.special.entr(p.exp()).sum(-1), (p.exp() * (p - q)).sum(-1)
        parts.append(torch.stack([surprisal, entropy, hat_surprisal, hat_surprisal - surprisal, kl]))
    of_next = torch.cat(parts, dim=1).double().cpu().numpy()
    of_token = np.concatenate([np.full((len(LOSSES), 1), np.nan), of_next[:, :-1]], axis=1)
    of_next[[LOSSES.index(name) for name in ("surprisal", "hat_surprisal", "added_loss")], -1] = np.nan
    both = ("token", of_token), ("next", of_next)
    return {f"{name}_of_{which}": v for which, values in both for name, v in zip(LOSSES, values, strict=True)}


def by_class(found: Patterns) -> pd.DataFrame:
    """A row for each of `CLASSES` that occurs and each of `MEASURES`: ``class``, ``measure``, ``tokens`` (that have a
    value), ``blocks`` (that contain them), ``mean``, ``low``, ``high``, ``difference``, ``difference_low``,
    ``difference_high``."""
    tokens = _free(found)
    codes = pd.Categorical(tokens["class"], categories=list(CLASSES)).codes
    return _table(tokens, codes, pd.DataFrame({"class": list(CLASSES)}))


def by_position(found: Patterns) -> pd.DataFrame:
    """Columns as in `by_class`, by position in the block (``first`` to ``last``), ``protected`` or not."""
    tokens = found.tokens
    protected = int(tokens["protected"].groupby(tokens["block"]).sum().max())
    edges = [0, max(1, protected)]
    while edges[-1] <= tokens["position"].max():
        edges.append(2 * edges[-1])
    codes = np.searchsorted(edges, tokens["position"], side="right") - 1
    keys = pd.DataFrame({"first": edges[:-1], "last": np.array(edges[1:]) - 1})
    return _table(tokens, codes, keys.assign(protected=keys["last"] < protected))


def by_quantile(found: Patterns, bins: int = 8) -> pd.DataFrame:
    """Columns as in `by_class`, by surprisal and by entropy, of the token and of the next, in bins of equal size.

    They are preceded by ``quantity``, ``bin`` (from 0), and ``least``, ``median``, ``most`` of the quantity in the bin,
    in nats.
    """
    parts = []
    for quantity in (f"{name}_of_{which}" for name in ("surprisal", "entropy") for which in ("token", "next")):
        tokens = _free(found).dropna(subset=quantity)
        if tokens.empty:  # no text is longer than three tokens
            continue
        codes = pd.qcut(tokens[quantity].rank(method="first"), min(bins, len(tokens)), labels=False).to_numpy()
        edges = tokens[quantity].groupby(codes).agg(least="min", median="median", most="max").reset_index(names="bin")
        parts.append(_table(tokens, codes, pd.DataFrame({"quantity": quantity, **edges})))
    return pd.concat(parts, ignore_index=True)


def by_layer(found: Patterns) -> pd.DataFrame:
    """Executed share by layer and site (``site`` "all": the whole layer), among the tokens that entered the layer:
    ``layer``, ``site``, ``tokens``, ``mean``, ``sd`` (over tokens), ``low``, ``high`` (of the mean)."""
    free = ~found.tokens["protected"].to_numpy()
    values = np.concatenate([found.site_share, found.share[:, None]], axis=1)[:, :, free].astype(float)
    values = values.reshape(-1, values.shape[-1])
    means, _ = _means(values, *found.tokens.loc[free, PLACE].to_numpy().T)
    means["sd"] = pd.DataFrame(values).std(axis=1, ddof=0)
    names = pd.DataFrame(product(range(len(found.share)), (*found.sites, "all")), columns=["layer", "site"])
    return names.join(means[["tokens", "mean", "sd", "low", "high"]])


def correlations(found: Patterns) -> pd.DataFrame:
    """Spearman's rank correlation of a token's compute with the difficulty of the predictions and what skipping added.

    If tokens leave, ``exit_layer`` counts as compute too, and ``share`` is taken over the tokens that stayed, because
    the usual share differs from layer to layer. Columns ``compute``, ``quantity``, ``of`` ("token" or "next"), ``rho``
    (nan without any variation), ``low``, ``high``, ``tokens``, ``blocks``.
    """
    free = _free(found)
    samples = {"share": free[~free["left"]]} | ({"exit_layer": free} if free["left"].any() else {})
    quantities, rows = ("surprisal", "entropy", "added_loss", "kl"), []
    for (compute, sample), quantity, which in product(samples.items(), quantities, ("token", "next")):
        part = sample.dropna(subset=f"{quantity}_of_{which}")
        if part.empty:
            continue
        columns = part[compute], part[f"{quantity}_of_{which}"], part["block"]
        x, y, block = (np.unique(column, return_inverse=True)[1] for column in columns)
        n, drawn = block.max() + 1, units(part.groupby("block", sort=False)["doc"].first().to_numpy())
        rho = _spearman(x, y, np.ones(len(x), dtype=int))
        weights = resample(drawn, n, RESAMPLES)
        low, high = _interval(np.array([[_spearman(x, y, weight[block])] for weight in weights]), [n], drawn.drawn / n)
        rows.append((compute, quantity, which, rho, low[0], high[0], len(part), n))
    return pd.DataFrame(rows, columns=["compute", "quantity", "of", "rho", "low", "high", "tokens", "blocks"])


def by_sensitivity(
    price: np.ndarray, forecast: np.ndarray, block: np.ndarray, depths: int = 3, bins: int = 5
) -> pd.DataFrame:
    """Do tokens cost what was forecast? (token, layer) pairs in bins of equal size by forecast, at each depth.

    ``price`` and ``forecast`` of dropping a token's channels in a layer, ``[L, n]``, may be in any unit: both are taken
    relative to the layer's mean. ``block [n]`` is the block of each token. Columns ``bin`` (from 0), ``pairs``,
    ``forecast`` (mean), ``mean`` (of the prices), ``low``, ``high``, and the layers, ``first`` to ``last``.
    """
    parts = []
    for layers in np.array_split(np.arange(len(price)), depths):
        # Token by token, so that the pairs of a block are contiguous.
        cost, guess = ((x[layers] / x[layers].mean(1, keepdims=True)).T.ravel() for x in (price, forecast))
        codes = pd.qcut(pd.Series(guess).rank(method="first"), bins, labels=False).to_numpy()
        values = np.where(codes == np.arange(bins)[:, None], cost, np.nan)
        means, _ = _means(values, np.repeat(block, len(layers)), np.repeat(block, len(layers)))
        forecasts = pd.Series(guess).groupby(codes).mean()
        table = pd.DataFrame({"bin": range(bins), "pairs": means["tokens"], "forecast": forecasts})
        parts.append(table.join(means[["mean", "low", "high"]]).assign(first=layers[0], last=layers[-1]))
    return pd.concat(parts, ignore_index=True)


def compare_docs(found: Patterns, first: str, second: str) -> pd.DataFrame:
    """Means of two prompts or documents, and the difference second - first.

    Runs of `RUN` tokens are resampled, separately in each. One prompt is one sample, so an interval says how steady the
    mean is along this prompt, and nothing about others of its kind. A row per ``measure``: ``first``, ``second``,
    ``difference``, ``low``, ``high``. Raises `HatError` for a document without an unprotected token.
    """
    parts, free = [], _free(found)
    for seed, name in enumerate((first, second)):
        part = free[free["doc"] == name]
        if part.empty:
            raise HatError(f"no unprotected token of {name!r}; documents: {list(found.tokens['doc'].unique())}")
        values, place = part[list(MEASURES)].to_numpy(dtype=float).T, np.arange(len(part))
        parts.append(_means(values, place // RUN, place // RUN, seed))
    (one, drawn), (other, drawn_other) = parts
    low, high = _interval(drawn_other - drawn, np.minimum(one["blocks"], other["blocks"]))
    columns = {"first": one["mean"], "second": other["mean"], "difference": other["mean"] - one["mean"]}
    return pd.DataFrame({"measure": MEASURES, **columns, "low": low, "high": high})


def layer_map(found: Patterns, first: int = 0, count: int = 48) -> pd.DataFrame:
    """The layer × token map of ``count`` tokens, starting at row ``first`` of `Patterns.tokens`. A row per cell:
    ``token`` (row), ``text``, ``exit_layer``, ``layer``, ``share`` (nan where the token had left) and ``difference``
    from the mean share of the layer over all unprotected tokens that entered it."""
    n_layers = len(found.share)
    usual = by_layer(found).query("site == 'all'")["mean"].to_numpy()
    part = found.tokens.iloc[first : first + count]
    share = found.share[:, first : first + count].T
    cells = part[["text", "exit_layer"]].rename_axis("token").reset_index().loc[lambda t: t.index.repeat(n_layers)]
    values = {"share": share.ravel(), "difference": (share - usual).ravel()}
    return cells.assign(layer=np.tile(np.arange(n_layers), len(part)), **values).reset_index(drop=True)


TABLES: dict[str, Callable[[Patterns], pd.DataFrame]] = {
    "classes": by_class,
    "positions": by_position,
    "quantiles": by_quantile,
    "layers": by_layer,
    "correlations": correlations,
    "layer_map": layer_map,
}
"""all tables of a text, by name"""


def _free(found: Patterns) -> pd.DataFrame:
    if found.tokens["protected"].all():
        raise HatError(f"nothing to compare: all {len(found.tokens)} tokens are protected; use longer text")
    return found.tokens[~found.tokens["protected"]]


def _table(tokens: pd.DataFrame, codes: np.ndarray, keys: pd.DataFrame) -> pd.DataFrame:
    """Means and intervals of each measure in each group; ``codes [N]`` index the rows of ``keys``."""
    member = np.vstack([~tokens["protected"], codes == np.arange(len(keys))[:, None]])
    parts = []
    for measure in MEASURES:
        values = np.where(member, tokens[measure].to_numpy(dtype=float), np.nan)
        means, drawn = _means(values, *tokens[PLACE].to_numpy().T)
        means.insert(0, "measure", measure)
        means["difference"] = means["mean"] - means["mean"][0]
        ends = _interval(drawn - drawn[:, :1], means["blocks"], means.attrs["units"])
        means["difference_low"], means["difference_high"] = ends
        parts.append(keys.join(means.iloc[1:].reset_index(drop=True)))
    table = pd.concat(parts, ignore_index=True)
    return table[table["tokens"] > 0].reset_index(drop=True)


def _means(values: np.ndarray, block, document, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Means over the non-nan values of each row of ``values [M, N]``, with intervals; and the means of each resample
    ``[R, M]``.

    Neighbours with the same ``block [N]`` are drawn together, and so are those of one ``document [N]``. ``blocks``
    counts the blocks behind a mean; ``attrs["units"]`` is the number of independent units a block.
    """
    known = ~np.isnan(values)
    starts = np.flatnonzero(np.asarray(block)[1:] != np.asarray(block)[:-1]) + 1
    starts = np.concatenate([[0], starts])
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
    counts = np.add.reduceat(known.astype(int), starts, axis=1)
    found, blocks = units(np.asarray(document)[starts]), (counts > 0).sum(1)
    draws = resample(found, len(starts), RESAMPLES, seed)
    with np.errstate(invalid="ignore"):  # a resample may lack all of a row's blocks
        mean, drawn = sums.sum(1) / counts.sum(1), (draws @ sums.T) / (draws @ counts.T)
    # Where all tokens have the same value (say, none of 20 left), resampling cannot tell how far off it might be.
    drawn[:, np.fmin.reduce(values, axis=1) == np.fmax.reduce(values, axis=1)] = np.nan
    share = found.drawn / len(starts)
    low, high = _interval(drawn, blocks, share)
    table = pd.DataFrame({"tokens": counts.sum(1), "blocks": blocks, "mean": mean, "low": low, "high": high})
    table.attrs["units"] = share
    return table, drawn


def _interval(drawn: np.ndarray, blocks: Sequence[int], share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of each column of ``[R, M]`` from so many blocks, each worth ``share`` of an independent unit; nan
    below six blocks."""
    ends = np.full((2, drawn.shape[1]), np.nan)
    for column, n in enumerate(blocks):
        known = drawn[~np.isnan(drawn[:, column]), column]
        if n >= FEWEST and len(known):
            ends[:, column] = np.quantile(known, tails(max(2, n * share)))
    return ends[0], ends[1]


def _spearman(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """Spearman's rho of the pairs, each counted ``weight`` times; x and y are ordinal int codes ``[N]``."""
    ranks = []
    for code in (x, y):
        mass = np.bincount(code, weight)
        ranks.append((np.cumsum(mass) - mass / 2)[code])  # ties share their middle rank
    with np.errstate(invalid="ignore", divide="ignore"):
        (xx, xy), (_, yy) = np.cov(*ranks, fweights=weight, ddof=0)
        return float(xy / np.sqrt(xx * yy))
