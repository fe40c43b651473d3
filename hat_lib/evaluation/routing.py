"""Routing patterns: which tokens get how much work, where in the model, and how hard they are.

Means over a `hat_lib.evaluation.tokens.TokenTable`, each with a 95 % interval (`hat_lib.evaluation.intervals`); what
occurs in fewer than six blocks, or does not vary, has none (nan). Every table but `by_position` leaves protected tokens
out. ``difference`` is from the mean of all unprotected tokens, and its interval resamples both together.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd

from hat_lib.config import HatError
from hat_lib.evaluation.intervals import interval, resample, units
from hat_lib.evaluation.tokens import TokenTable
from hat_lib.text.token_classes import CLASSES

MEASURES = ("share", "model_share", "left", "surprisal_of_token", "entropy_of_next", "added_loss_of_next", "kl_of_next")
"""columns of `TokenTable.tokens` whose means the tables give"""
RESAMPLES = 1000


def by_class(found: TokenTable) -> pd.DataFrame:
    """A row for each of `CLASSES` that occurs and each of `MEASURES`: ``class``, ``measure``, ``tokens`` (that have a
    value), ``blocks`` (that contain them), ``mean``, ``low``, ``high``, ``difference``, ``difference_low``,
    ``difference_high``."""
    tokens = _free(found)
    codes = pd.Categorical(tokens["class"], categories=list(CLASSES)).codes
    return _table(tokens, codes, pd.DataFrame({"class": list(CLASSES)}))


def by_position(found: TokenTable) -> pd.DataFrame:
    """Columns as in `by_class`, by position in the block (``first`` to ``last``), ``protected`` or not."""
    tokens = found.tokens
    protected = int(tokens["protected"].groupby(tokens["block"]).sum().max())
    doublings = int(tokens["position"].max()).bit_length() + 1
    edges = np.array([0, *(max(1, protected) * 2 ** np.arange(doublings))])
    codes = np.searchsorted(edges, tokens["position"], side="right") - 1
    keys = pd.DataFrame({"first": edges[:-1], "last": edges[1:] - 1})
    return _table(tokens, codes, keys.assign(protected=keys["last"] < protected))


def by_quantile(found: TokenTable, bins: int = 8) -> pd.DataFrame:
    """Columns as in `by_class`, by surprisal and by entropy, of the token and of the next, in bins of equal size:
    ``quantity``, ``bin`` (from 0), and ``least``, ``median``, ``most`` of the quantity in the bin, in nats."""
    parts = []
    for quantity in ("surprisal_of_token", "surprisal_of_next", "entropy_of_token", "entropy_of_next"):
        tokens = _free(found).dropna(subset=quantity)
        if tokens.empty:  # no text is longer than three tokens
            continue
        codes = pd.qcut(tokens[quantity].rank(method="first"), min(bins, len(tokens)), labels=False).to_numpy()
        edges = tokens[quantity].groupby(codes).agg(least="min", median="median", most="max").reset_index(names="bin")
        parts.append(_table(tokens, codes, pd.DataFrame({"quantity": quantity, **edges})))
    return pd.concat(parts, ignore_index=True)


def by_layer(found: TokenTable) -> pd.DataFrame:
    """Executed share of each ``layer`` and ``site`` ("all": the whole layer), among the tokens that entered it:
    ``tokens``, ``mean``, ``low``, ``high``."""
    free = ~found.tokens["protected"].to_numpy()
    values = np.concatenate([found.site_share, found.share[:, None]], axis=1)[:, :, free].astype(float)
    table = means(values.reshape(-1, values.shape[-1]), *(found.tokens.loc[free, name] for name in ("block", "doc")))
    names = pd.DataFrame(product(range(len(found.share)), (*found.sites, "all")), columns=["layer", "site"])
    return names.join(table[["tokens", "mean", "low", "high"]])


def correlations(found: TokenTable) -> pd.DataFrame:
    """Spearman's rank correlation, ``rho``, of a token's ``compute`` with the difficulty of predictions and what
    skipping added, ``quantity``, ``of`` the token or the next; with ``low``, ``high``, ``tokens``, ``blocks``. Compute
    is ``share``, over the tokens that stayed, and, if some leave, ``exit_layer``."""
    free = _free(found)
    samples = {"share": free[~free["left"]]}
    if free["left"].any():
        samples["exit_layer"] = free
    rows = []
    for compute, quantity, which in product(samples, ("surprisal", "entropy", "added_loss", "kl"), ("token", "next")):
        part = samples[compute].dropna(subset=f"{quantity}_of_{which}")
        if part.empty:
            continue
        x, y, block = (pd.factorize(part[name], sort=True)[0] for name in (compute, f"{quantity}_of_{which}", "block"))
        n, drawn = block.max() + 1, units(part.groupby("block", sort=False)["doc"].first().to_numpy())
        rho = _spearman(x, y, np.ones(len(x), dtype=int))
        drawn_rho = np.array([_spearman(x, y, weight[block]) for weight in resample(drawn, n, RESAMPLES)])
        rows.append((compute, quantity, which, rho, *interval(drawn_rho, n, drawn.drawn), len(part), n))
    return pd.DataFrame(rows, columns=["compute", "quantity", "of", "rho", "low", "high", "tokens", "blocks"])


def layer_map(found: TokenTable, first: int = 0, count: int = 48) -> pd.DataFrame:
    """``count`` tokens from row ``first`` of `TokenTable.tokens` on, a row for each layer: ``token`` (its row there),
    ``text``, ``exit_layer``, ``protected``, ``layer``, ``share`` (nan in layers it did not enter), and ``difference``
    from the mean share of the layer over all unprotected tokens in it."""
    n_layers, free = len(found.share), ~found.tokens["protected"].to_numpy()
    usual = pd.DataFrame(found.share[:, free].astype(float)).mean(axis=1).to_numpy()
    some = found.tokens[["text", "exit_layer", "protected"]].iloc[first : first + count]
    cells = some.rename_axis("token").reset_index().merge(pd.DataFrame({"layer": range(n_layers)}), how="cross")
    share = found.share.T[first : first + count].ravel()
    return cells.assign(share=share, difference=share - np.tile(usual, len(some)))


TABLES = {"classes": by_class, "positions": by_position, "quantiles": by_quantile, "layers": by_layer,
          "correlations": correlations, "layer_map": layer_map}  # fmt: skip


def _free(found: TokenTable) -> pd.DataFrame:
    if found.tokens["protected"].all():
        raise HatError(f"nothing to compare: all {len(found.tokens)} tokens are protected; use longer text")
    return found.tokens[~found.tokens["protected"]]


def _table(tokens: pd.DataFrame, codes: np.ndarray, keys: pd.DataFrame) -> pd.DataFrame:
    """Means and intervals of each measure in each group; ``codes [N]`` index the rows of ``keys``."""
    member = np.vstack([~tokens["protected"], codes == np.arange(len(keys))[:, None]])
    parts = []
    for measure in MEASURES:
        values = np.where(member, tokens[measure].to_numpy(dtype=float), np.nan)
        part = means(values, tokens["block"], tokens["doc"])
        part.insert(0, "measure", measure)
        parts.append(keys.join(part.iloc[1:].reset_index(drop=True)))
    table = pd.concat(parts, ignore_index=True)
    return table[table["tokens"] > 0].reset_index(drop=True)


def means(values: np.ndarray, block: Sequence, document: Sequence) -> pd.DataFrame:
    """Means over the non-nan values of each row of ``values [M, N]``, and their differences from that of the first row,
    with intervals: tokens of one ``block [N]`` are drawn together, and blocks of one ``document [N]``."""
    block = np.asarray(block)
    by_block = pd.DataFrame(values.T).groupby(block, sort=False)
    sums, counts = by_block.sum().to_numpy(), by_block.count().to_numpy()  # [blocks, M]
    found = units(pd.Series(np.asarray(document)).groupby(block, sort=False).first())
    draws = resample(found, len(sums), RESAMPLES)
    with np.errstate(invalid="ignore"):  # a resample may lack all of a row's blocks
        mean, drawn = sums.sum(0) / counts.sum(0), (draws @ sums) / (draws @ counts)
    # Where all tokens have the same value (say, none of 20 left), resampling cannot tell how far off it might be.
    drawn[:, np.fmin.reduce(values, axis=1) == np.fmax.reduce(values, axis=1)] = np.nan
    blocks, share = (counts > 0).sum(0), found.drawn / len(sums)

    def ends(drawn: np.ndarray) -> list[tuple[float, float]]:
        return [interval(column, n, n * share) for column, n in zip(drawn.T, blocks, strict=True)]

    table = pd.DataFrame({"tokens": counts.sum(0), "blocks": blocks, "mean": mean})
    table[["low", "high"]] = ends(drawn)
    table["difference"] = mean - mean[0]
    table[["difference_low", "difference_high"]] = ends(drawn - drawn[:, :1])
    return table


def _spearman(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """Spearman's rho of the pairs, each counted ``weight`` times; x and y are ordinal int codes ``[N]``."""
    ranks = []
    for code in (x, y):
        mass = np.bincount(code, weight)
        ranks.append((np.cumsum(mass) - mass / 2)[code])  # ties share their middle rank
    with np.errstate(invalid="ignore", divide="ignore"):
        (xx, xy), (_, yy) = np.cov(*ranks, fweights=weight, ddof=0)
        return float(xy / np.sqrt(xx * yy))
