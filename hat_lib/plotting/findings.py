"""Findings: what the saved results say about each claim, as verdicts, words and figures.

As in `hat_lib.plotting.style`, tables of ``data/results`` go in; no model is loaded and nothing is measured. An
interval decides whether a bound on a cost is kept: "yes" where all of it lies below, "no" where all of it lies above,
"open" where the bound lies inside. In the figures a hollow marker is a claim, or a difference that cannot be told
from none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hat_lib.plotting.style import (
    BLUE,
    BROWN,
    GRAINS,
    GREEN,
    GREY,
    HOLLOW,
    MOST,
    ORANGE,
    PURPLE,
    SKY,
    below,
    costs,
    increases,
    key,
    log_axis,
    need,
    panels,
    styled,
    whiskers,
)  # fmt: skip

COST = ("increase", "increase_low", "increase_high")
POINT = ("granularity", "text", "capacity")
TEXTS = {"addresses": (BLUE, "o"), "docstrings": (ORANGE, "s")}
PROMISED = HOLLOW | {"markersize": 7}
TRAINED = {
    "channel grain, trained": (BLUE, "o", "-"),
    "channel grain, untrained": (SKY, "v", "--"),
    "token grain, published recipe": (ORANGE, "s", "-"),
    "token grain, our recipe": (PURPLE, "P", "-"),
}
EXITS = {"trained": (GREEN, "D", "exits chosen by the gates"), "random_exits": (BROWN, "v", "as many at random")}


def verdict(low: float, high: float, bound: float) -> str:
    """Does a cost with the interval ``low`` .. ``high`` stay below ``bound``? "yes", "no" or "open"."""
    return "yes" if high <= bound else "no" if low > bound else "open"


def joint(verdicts: Iterable[str]) -> str:
    """Of what has to hold everywhere: "no" if it fails anywhere, "yes" if it holds everywhere, else "open"."""
    found = set(verdicts)
    return "no" if "no" in found else "yes" if found == {"yes"} else "open"


def fast(rows: pd.DataFrame, kind: str = "decode_dense") -> list[str]:
    """Is each row as fast as promised? "yes", "no", or "open" where it is faster than its work allows: that is noise.

    Args:
        rows: the fields of `hat_lib.experiments.published_claims.Row`, of settings with a promise.
        kind: a column of speedups. Over our own dense path the ideal bounds what skipping can give; plain transformers
            is another program, and nothing bounds a speedup over it.
    """
    ideal = rows[f"ideal_{kind.removesuffix('_dense')}"] if kind.endswith("_dense") else pd.Series(np.inf, rows.index)
    pairs = zip(rows[kind], rows["promised_speedup"], ideal, strict=True)
    return ["no" if speed < claimed else "yes" if speed <= most else "open" for speed, claimed, most in pairs]


def kept(quality: pd.DataFrame, promise: pd.DataFrame) -> pd.DataFrame:
    """Every trained row without exits beside the promise: columns ``promised`` (increase) and ``kept`` (a `verdict`).

    Between promised capacities the promise is taken in proportion; capacities outside are left out. Of two rows for
    one point, the one on more tokens counts.

    Args:
        quality: the fields of `hat_lib.experiments.quality.Row`.
        promise: ``capacity``, ``promised_increase``.
    """
    need(quality, *POINT, "variant", "exit_rate", "tokens", "realised", *COST)
    bounds, rows = _bounds(promise), _dial(quality, "trained")
    rows = rows[rows["capacity"].between(bounds["capacity"].min(), bounds["capacity"].max())]
    rows = rows.assign(promised=np.interp(rows["capacity"], bounds["capacity"], bounds["promised_increase"]))
    return rows.assign(kept=[verdict(*row) for row in rows[[*COST[1:], "promised"]].to_numpy()])


def apart(ablations: pd.DataFrame) -> pd.DataFrame:
    """The ablations with a column ``apart``: does the interval miss that of the reference, on the same text?

    The reference is the first change of a grain among those with as many steps: the recipe itself, or its start.

    Args:
        ablations: the fields of `hat_lib.experiments.ablations.Row`, in the order of
        `hat_lib.experiments.ablations.CHANGES`.
    """
    need(ablations, *POINT, "change", "steps", *COST)
    first = ablations.groupby(["granularity", "text", "steps"], sort=False)[list(COST)].transform("first")
    meet = (ablations["increase_low"] <= first["increase_high"]) & (first["increase_low"] <= ablations["increase_high"])
    return ablations.assign(apart=~meet)


def said(row: Mapping, name: str = "increase") -> str:
    """An increase in perplexity and its interval: per cent up to a doubling, then times the base's perplexity.

    Args:
        row: has ``name``, ``name_low`` and ``name_high``.
    """
    values = [row[column] for column in (name, f"{name}_low", f"{name}_high")]
    if values[0] < 1:
        middle, low, high = (f"{value:+.1%}".replace("-0.0%", "+0.0%") for value in values)
    else:
        middle, low, high = ("over x1000" if v >= 999 else f"x{1 + v:.{1 if v < 9 else 0}f}" for v in values)
    return f"{middle} ({low} to {high})"


def machine(rows: pd.DataFrame) -> str:
    """Device, dtype and threads of the rows, as far as their file names them."""
    have = [name for name in ("device", "dtype", "threads") if name in rows]
    return ", ".join("threads " * (name == "threads") + "/".join(map(str, rows[name].unique())) for name in have)


@styled
def promised(quality: pd.DataFrame, published: pd.DataFrame, promise: pd.DataFrame) -> Figure:
    """Increase in perplexity at the capacity that was realised, beside what was promised; a panel for each text.

    Args:
        quality, promise: as for `kept`.
        published: as ``quality``, of the token grain trained by the published recipe.
    """
    found, bounds = kept(quality, promise), _bounds(promise)
    need(published, *POINT, "variant", "exit_rate", "tokens", "realised", *COST)
    channel, token = (found[found["granularity"] == grain] for grain in GRAINS)
    start = _dial(quality, "untrained").query("granularity == 'channel'")
    lines = [channel, start, _dial(published, "trained"), token]
    fig, axes = _by_text(found, "capacity that was realised", 4.1)
    for text, ax in axes.items():
        for rows, look in zip(lines, TRAINED.values(), strict=True):
            _costs(ax, rows[rows["text"] == text], "realised", *look)
        ax.plot(bounds["capacity"], 100 * bounds["promised_increase"], ":", **PROMISED)
    below(fig, [_promise_key(":"), *(key(name, *look) for name, look in TRAINED.items())], ncols=3)
    return fig


@styled
def speeds(promise: pd.DataFrame) -> Figure:
    """Decode speedups in two factors, a panel for each base: what skipping gives (thick), what the dense path (thin).

    Args:
        promise: the fields of `hat_lib.experiments.published_claims.Row`; rows with exits are left out.
    """
    numbers = ["realised", "promised_speedup", "ideal_decode", "decode_dense", "decode_hf"]
    need(promise, "base", "granularity", "capacity", "exit_rate", *numbers)
    rows = promise[promise["exit_rate"] == 0].sort_values(["granularity", "capacity"], ascending=[True, False])
    need(rows, "base")
    bases = list(dict.fromkeys(rows["base"]))
    fig, axes = panels(len(bases), height=3.9, width=8.4, sharey=True, sharex=True)
    for ax, base in zip(axes, bases, strict=True):
        for y, row in enumerate(rows[rows["base"] == base].itertuples()):
            colour, marker = GRAINS[row.granularity]
            ax.plot([row.decode_dense, row.decode_hf], [y, y], color=GREY, linewidth=1.5)
            ax.plot([1, row.decode_dense], [y, y], color=colour, linewidth=6, alpha=0.5, solid_capstyle="butt")
            ax.plot(row.decode_dense, y, marker, color=colour, markersize=5)
            ax.plot(row.decode_hf, y, marker, color=GREY, markersize=5)
            ax.plot(row.ideal_decode, y, "|", color=colour, markersize=13, markeredgewidth=2)
            ax.plot(row.promised_speedup, y, linestyle="none", **PROMISED)
        ax.axvline(1, color=GREY, linewidth=1)
        ax.set(title=base, xlabel="decode speedup (times)")
        log_axis(ax, [1, 1.5, 2, 3, 4, 6])
        ax.grid(axis="y", visible=False)
    first = rows.loc[rows["base"] == bases[0], ["granularity", "capacity", "realised"]].to_numpy()
    axes[0].set_yticks(range(len(first)), [f"{g} {c:.2f} (ran {r:.2f})" for g, c, r in first])
    axes[0].invert_yaxis()
    names = [_promise_key("none"), key("if time followed work", marker="|", markersize=11, markeredgewidth=2)]
    names += [key("skipping: over our own dense path", BLUE, line="-", linewidth=6, alpha=0.5)]
    names += [key("all of it: over plain transformers", GREY, "o", "-", markersize=5)]
    below(fig, names, fontsize=8)
    return fig


@styled
def exits(quality: pd.DataFrame) -> Figure:
    """Channel grain: what leaving early costs and saves, beside the line of capacities; ``quality`` as for `kept`."""
    need(quality, *POINT, "variant", "exit_rate", "tokens", "model_share", *COST)
    here = quality[quality["granularity"] == "channel"]
    leaving, dial = here[(here["exit_rate"] > 0) & here["variant"].isin(EXITS)], _dial(here, "trained")
    fig, axes = _by_text(pd.concat([leaving, dial]), "executed share of the model's work", 3.6)
    for text, ax in axes.items():
        _costs(ax, dial[dial["text"] == text], "model_share", BLUE, "o", "-")
        for variant, (colour, marker, _) in EXITS.items():
            rows = leaving[(leaving["text"] == text) & (leaving["variant"] == variant)]
            _costs(ax, rows, "model_share", colour, marker, "none")
        for row in leaving[(leaving["text"] == text) & (leaving["variant"] == "trained")].itertuples():
            at = (row.model_share, min(100 * row.increase, MOST))
            ax.annotate(f"{row.exit_rate:g}", at, (-8, -3), textcoords="offset points", ha="right", fontsize=8)
    names = [key(name, colour, marker) for colour, marker, name in EXITS.values()]
    below(fig, [key("no exits, by capacity", BLUE, "o", "-"), *names])
    return fig


@styled
def choices(ablations: pd.DataFrame) -> Figure:
    """What each choice of a recipe is worth, a panel for each grain; filled where the interval is `apart`."""
    table = apart(ablations)[ablations["text"].isin(TEXTS)]
    need(table, "text")
    grains = [grain for grain in GRAINS if grain in set(table["granularity"])]
    fig, axes = panels(len(grains), height=4.2, width=9.0, sharey=False)
    for ax, grain in zip(axes, grains, strict=True):
        here = table[table["granularity"] == grain]
        names = list(dict.fromkeys(here["change"]))
        for row in here.itertuples():
            (colour, marker), shift = TEXTS[row.text], 0.3 * list(TEXTS).index(row.text) - 0.15
            ends = (pd.Series([1 + getattr(row, name)]) for name in COST)
            fill = colour if row.apart else "white"
            at = [names.index(row.change) + shift]
            whiskers(ax, at, *ends, colour, marker, across=True, markerfacecolor=fill)
        fine = here["increase_high"].max() < 0.3
        log_axis(ax, [1, 1.05, 1.1, 1.15, 1.2, 1.25] if fine else [1, 2, 5, 10, 20, 50, 100, 200], "x{x:g}")
        ax.grid(axis="y", visible=False)
        ax.set_yticks(range(len(names)), names)
        ax.set(title=f"{grain} grain at {here['capacity'].iloc[0]:g}", xlabel="perplexity / base perplexity")
        ax.invert_yaxis()
    below(fig, [key(text, *look) for text, look in TEXTS.items()])
    return fig


def _promise_key(line: str):
    return key("promised", line=line, **{name: value for name, value in PROMISED.items() if name != "color"})


def _bounds(promise: pd.DataFrame) -> pd.DataFrame:
    need(promise, "capacity", "promised_increase")
    bounds = promise.dropna(subset="promised_increase").drop_duplicates("capacity").sort_values("capacity")
    need(bounds, "promised_increase")
    return bounds


def _dial(quality: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Rows of a variant without exits; of two for one point, the one on more tokens."""
    rows = quality[(quality["variant"] == variant) & (quality["exit_rate"] == 0)].sort_values("tokens")
    return rows.drop_duplicates(list(POINT), keep="last").sort_values(list(POINT))


def _by_text(rows: pd.DataFrame, xlabel: str, height: float) -> tuple[Figure, dict[str, Axes]]:
    """Axes of an increase in perplexity over a share, by text."""
    rows = rows[rows["text"].isin(TEXTS)]
    need(rows, "text", "increase")
    texts = [text for text in TEXTS if text in set(rows["text"])]
    top = 1.4 * np.clip(100 * rows["increase_high"].max(), 1, MOST)
    fig, axes = panels(len(texts), height=height, width=8.0, sharey=True, sharex=True)
    for ax, text in zip(axes, texts, strict=True):
        increases(ax, [0, 1, 3, 10, 30, 100, 300, MOST], xlabel, rows["increase"].max(), top)
        ax.set(title=text, ylabel=ax.get_ylabel() if ax is axes[0] else "")
    return fig, dict(zip(texts, axes, strict=True))


def _costs(ax: Axes, rows: pd.DataFrame, x: str, colour: str, marker: str, line: str) -> None:
    rows = rows.sort_values(x)
    costs(ax, rows[x], *(rows[name] for name in COST), colour, marker, line)
