"""Tables of routing patterns: by class, by position, by how hard, by layer; correlations; two prompts compared.

Each is made of `hat_lib.evaluation.routing.Patterns`. Protected tokens run in full whatever a router says, so every
table but `by_position` leaves them out. All intervals are 95 % bootstraps over blocks, widened for few of them as in
`hat_lib.evaluation.perplexity.compare`; what stands in fewer than two blocks, or does not vary, has none (nan).
``difference`` is to the mean of all tokens that are not protected, and its interval resamples both together. They speak
of text like this text, and of a table's many intervals some miss.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pandas as pd

from hat_lib.config import HatError
from hat_lib.evaluation.perplexity import tails
from hat_lib.evaluation.routing import Patterns
from hat_lib.text.token_classes import CLASSES

MEASURES = ("share", "model_share", "left", "surprisal_of_token", "entropy_of_next", "added_loss_of_next", "kl_of_next")
"""columns of `Patterns.tokens` whose means the tables give"""
RESAMPLES = 1000
RUN = 16
"""tokens of a prompt that are resampled together: neighbours are alike"""


def by_class(found: Patterns) -> pd.DataFrame:
    """A row per `CLASSES` that occurs and per measure of `MEASURES`.

    Returns:
        ``class``, ``measure``, ``tokens`` (that have a number), ``blocks`` (that they stand in), ``mean``, ``low``,
        ``high``, ``difference``, ``difference_low``, ``difference_high``.
    """
    tokens = _free(found)
    codes = pd.Categorical(tokens["class"], categories=list(CLASSES)).codes
    return _table(tokens, codes, pd.DataFrame({"class": list(CLASSES)}))


def by_position(found: Patterns) -> pd.DataFrame:
    """Columns as in `by_class`, by position in the block: ``first`` to ``last``, ``protected`` or not."""
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

    Before them ``quantity``, ``bin`` (from 0), and ``least``, ``median``, ``most`` of the quantity in it, nats.
    """
    parts = []
    for quantity in (f"{name}_of_{which}" for name in ("surprisal", "entropy") for which in ("token", "next")):
        tokens = _free(found).dropna(subset=quantity)
        if tokens.empty:  # no text of more than three tokens
            continue
        codes = pd.qcut(tokens[quantity].rank(method="first"), min(bins, len(tokens)), labels=False).to_numpy()
        edges = tokens[quantity].groupby(codes).agg(least="min", median="median", most="max").reset_index(names="bin")
        parts.append(_table(tokens, codes, pd.DataFrame({"quantity": quantity, **edges})))
    return pd.concat(parts, ignore_index=True)


def by_layer(found: Patterns) -> pd.DataFrame:
    """Executed share by layer and site (``site`` "all": over the layer), among the tokens that entered the layer.

    Returns:
        ``layer``, ``site``, ``tokens``, ``mean``, ``sd`` (over tokens), ``low``, ``high`` (of the mean).
    """
    free = ~found.tokens["protected"].to_numpy()
    values = np.concatenate([found.site_share, found.share[:, None]], axis=1)[:, :, free].astype(float)
    names = [(layer, site) for layer in range(len(values)) for site in (*found.sites, "all")]
    values = values.reshape(len(names), -1)
    mean, drawn, count, blocks = _resampled(values, found.tokens.loc[free, "block"].to_numpy())
    sd = np.sqrt(np.nansum((values - mean[:, None]) ** 2, axis=1) / np.maximum(count, 1))
    low, high = _interval(drawn, blocks)
    columns = {"tokens": count, "mean": mean, "sd": sd, "low": low, "high": high}
    return pd.DataFrame(names, columns=["layer", "site"]).assign(**columns)


def correlations(found: Patterns) -> pd.DataFrame:
    """Spearman's rank correlation of a token's compute with how hard things are and what skipping added.

    Where tokens leave, ``exit_layer`` is compute too, and ``share`` is that of the tokens that stayed: in other layers
    other shares are usual.

    Returns:
        ``compute``, ``quantity``, ``of`` ("token" or "next"), ``rho``, ``low``, ``high``, ``tokens``, ``blocks``.
        Without any variation rho is nan.
    """
    free = _free(found)
    samples = {"share": free[~free["left"]]} | ({"exit_layer": free} if free["left"].any() else {})
    quantities, rows = ("surprisal", "entropy", "added_loss", "kl"), []
    for (compute, sample), quantity, which in product(samples.items(), quantities, ("token", "next")):
        part = sample.dropna(subset=f"{quantity}_of_{which}")
        if part.empty:
            continue
        columns = part[compute], part[f"{quantity}_of_{which}"], part["block"]
        x, y, unit = (np.unique(column, return_inverse=True)[1] for column in columns)
        n = unit.max() + 1
        rho = _spearman(x, y, np.ones(len(x), dtype=int))
        drawn = np.array([[_spearman(x, y, weight[unit])] for weight in _draws(n)])
        low, high = _interval(drawn, np.array([n]))
        rows.append((compute, quantity, which, rho, low[0], high[0], len(part), n))
    return pd.DataFrame(rows, columns=["compute", "quantity", "of", "rho", "low", "high", "tokens", "blocks"])


def by_sensitivity(
    price: np.ndarray, forecast: np.ndarray, block: np.ndarray, depths: int = 3, bins: int = 5
) -> pd.DataFrame:
    """Do tokens cost what was forecast? Pairs of token and layer in bins of equal size by the forecast, at each depth.

    Args:
        price, forecast: of dropping a token's channels in a layer, ``[L, n]``, in any unit: both are taken relative to
            the layer's mean.
        block: of each token ``[n]``.

    Returns:
        ``bin`` (from 0), ``pairs`` (of a token and a layer), ``forecast`` (mean), ``mean`` (of the prices), ``low``,
        ``high``, and ``first`` to ``last``, the layers.
    """
    parts = []
    for layers in np.array_split(np.arange(len(price)), depths):
        # Token after token, so that a block's pairs lie together.
        cost, guess = ((x[layers] / x[layers].mean(1, keepdims=True)).T.ravel() for x in (price, forecast))
        codes = pd.qcut(pd.Series(guess).rank(method="first"), bins, labels=False).to_numpy()
        values = np.where(codes == np.arange(bins)[:, None], cost, np.nan)
        mean, drawn, count, blocks = _resampled(values, np.repeat(block, len(layers)))
        low, high = _interval(drawn, blocks)
        columns = {"pairs": count, "forecast": pd.Series(guess).groupby(codes).mean(), "mean": mean}
        table = pd.DataFrame({"bin": range(bins), **columns, "low": low, "high": high})
        parts.append(table.assign(first=layers[0], last=layers[-1]))
    return pd.concat(parts, ignore_index=True)


def compare_docs(found: Patterns, first: str, second: str) -> pd.DataFrame:
    """Two prompts, or documents: their means, and the difference second - first.

    Runs of `RUN` tokens are resampled, in each alone. One prompt is one sample, so an interval says how steady the
    mean is along this prompt, and nothing about others of its kind.

    Returns:
        A row per measure: ``measure``, ``first``, ``second``, ``difference``, ``low``, ``high``.
    """
    parts, free = [], _free(found)
    for seed, name in enumerate((first, second)):
        part = free[free["doc"] == name]
        if part.empty:
            raise HatError(f"no unprotected token of {name!r}; documents: {list(found.tokens['doc'].unique())}")
        values = part[list(MEASURES)].to_numpy(dtype=float).T
        parts.append(_resampled(values, np.arange(len(part)) // RUN, seed))
    (a, drawn_a, _, units_a), (b, drawn_b, _, units_b) = parts
    low, high = _interval(drawn_b - drawn_a, np.minimum(units_a, units_b))
    return pd.DataFrame({"measure": MEASURES, "first": a, "second": b, "difference": b - a, "low": low, "high": high})


def layer_map(found: Patterns, first: int = 0, count: int = 48) -> pd.DataFrame:
    """The layer × token map of ``count`` tokens from row ``first`` of `Patterns.tokens` on, a row per cell.

    Returns:
        ``token`` (row), ``text``, ``exit_layer``, ``layer``, ``share`` (nan where the token had left) and
        ``difference`` to the mean share of the layer over all tokens that are not protected and entered it.
    """
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
"""every table of one text by name"""


def _free(found: Patterns) -> pd.DataFrame:
    if found.tokens["protected"].all():
        raise HatError(f"nothing to compare: all {len(found.tokens)} tokens are protected; use longer text")
    return found.tokens[~found.tokens["protected"]]


def _table(tokens: pd.DataFrame, codes: np.ndarray, keys: pd.DataFrame) -> pd.DataFrame:
    """Means and intervals of each measure in each group; ``codes [N]`` are rows of ``keys``."""
    member = np.vstack([~tokens["protected"], codes == np.arange(len(keys))[:, None]])
    parts = []
    for measure in MEASURES:
        values = np.where(member, tokens[measure].to_numpy(dtype=float), np.nan)
        mean, drawn, count, blocks = _resampled(values, tokens["block"].to_numpy())
        (low, high), (less, more) = (_interval(d, blocks) for d in (drawn, drawn - drawn[:, :1]))
        columns = {"measure": measure, "tokens": count, "blocks": blocks, "mean": mean, "low": low, "high": high}
        columns |= {"difference": mean - mean[0], "difference_low": less, "difference_high": more}
        parts.append(keys.join(pd.DataFrame(columns).iloc[1:].reset_index(drop=True)))
    table = pd.concat(parts, ignore_index=True)
    return table[table["tokens"] > 0].reset_index(drop=True)


def _resampled(values: np.ndarray, unit: np.ndarray, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Means of the rows of ``values [M, N]`` without nan, and those of each resample of the units.

    Neighbours of an equal ``unit [N]`` are drawn together. Returns the means ``[M]``, resampled means ``[R, M]``,
    and how many values ``[M]`` and units ``[M]`` they come from.
    """
    known = ~np.isnan(values)
    starts = np.flatnonzero(np.diff(unit, prepend=-1))
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
    counts = np.add.reduceat(known.astype(int), starts, axis=1)
    drawn = _draws(len(starts), seed)
    with np.errstate(invalid="ignore"):  # a resample that lacks the row's units
        mean, means = sums.sum(1) / counts.sum(1), (drawn @ sums.T) / (drawn @ counts.T)
    # Where every token has the same number (none of these 20 left), resampling cannot say how far it might be off.
    means[:, np.fmin.reduce(values, axis=1) == np.fmax.reduce(values, axis=1)] = np.nan
    return mean, means, counts.sum(1), (counts > 0).sum(1)


def _draws(n: int, seed: int = 0) -> np.ndarray:
    """How often each of ``n`` units is drawn, in each resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)


def _interval(drawn: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of each column of ``[R, M]``; nan below two units."""
    ends = np.full((2, drawn.shape[1]), np.nan)
    for column, n in enumerate(units):
        known = drawn[~np.isnan(drawn[:, column]), column]
        if n > 1 and len(known):
            ends[:, column] = np.quantile(known, tails(n))
    return ends[0], ends[1]


def _spearman(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """Spearman's rho of the pairs, each as often as ``weight`` says; x and y are int codes in order ``[N]``."""
    ranks = []
    for code in (x, y):
        mass = np.bincount(code, weight)
        ranks.append((np.cumsum(mass) - mass / 2)[code])  # ties share the middle of their ranks
    with np.errstate(invalid="ignore", divide="ignore"):
        (xx, xy), (_, yy) = np.cov(*ranks, fweights=weight, ddof=0)
        return float(xy / np.sqrt(xx * yy))
