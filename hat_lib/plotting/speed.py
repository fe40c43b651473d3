"""Figures of speed and of what it costs: targets, self-speculative decoding, claims beside what was measured.

As in `hat_lib.plotting.style`: a table of ``data/results`` in, a `Figure` out. Lines as in the figure of the benchmark:
solid is speed over plain transformers, dashed over our own dense path, dotted what the work alone would give. A hollow
marker is a number that was not measured here: a claim, or an ideal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hat_lib.inference.speed import VERSUS
from hat_lib.plotting.style import (
    BLUE,
    GRAINS,
    GREEN,
    GREY,
    HOLLOW,
    MOST,
    ORANGE,
    PURPLE,
    below,
    costs,
    grain_keys,
    increases,
    key,
    log_axis,
    need,
    panels,
    percent,
    styled,
    whiskers,
)  # fmt: skip

SERIES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (PURPLE, "v")]
KINDS = {"decode_hf": ("-", "over plain transformers"), "decode_dense": ("--", "over our own dense path")}
PROMISED = HOLLOW | {"markersize": 8, "linestyle": "none"}
GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
LABEL = {"textcoords": "offset points", "fontsize": 8, "bbox": GROUND, "zorder": 4, "ha": "right"}
RESAMPLES = 1000


@styled
def exits(table: pd.DataFrame) -> Figure:
    """Where tokens leave: bars over the layers that they ran, those who stay at the right end.

    Args:
        table: ``exit_rate`` (requested), ``layers``, ``share`` (of all tokens, 0-1).
    """
    need(table, "exit_rate", "layers", "share")
    cells = table.pivot(index="layers", columns="exit_rate", values="share").fillna(0.0)
    fig, (ax,) = panels(1, height=3.0)
    width, places = 0.8 / len(cells.columns), np.arange(len(cells))
    for i, ((rate, share), (colour, _)) in enumerate(zip(cells.items(), SERIES * len(cells), strict=False)):
        bars = ax.bar(places + (i + 0.5) * width - 0.4, share, width, color=colour, label=f"exit rate {rate:g}")
        ax.bar_label(bars, [f"{v:.0%}" for v in share], fontsize=8)
    ax.set_xticks(places, cells.index)
    ax.set(xlabel="layers that the token ran", ylabel="share of the tokens")
    ax.yaxis.set_major_formatter(percent())
    ax.grid(axis="x", visible=False)
    ax.legend(ncols=len(cells.columns), loc="lower left", bbox_to_anchor=(0, 1))
    return fig


@styled
def targets(table: pd.DataFrame) -> Figure:
    """Target speedups beside those of the texts that were generated for them: medians, lowest to highest prompt.

    Args:
        table: the fields of `hat_lib.experiments.speed_targets.Row`.
    """
    need(table, "granularity", "versus", "requested", "reachable", "largest", "measured", "lowest", "highest")
    fig, axes = panels(table["versus"].nunique(), height=4.0, width=7.0, sharey=True)
    for ax, (versus, rows) in zip(axes, table.groupby("versus"), strict=True):
        ends = rows[["requested", "lowest", "highest", "largest"]].agg(["min", "max"]).to_numpy()
        line = [np.nanmin(ends), np.nanmax(ends)]
        ax.plot(line, line, ":", color="black", linewidth=1.5)
        for number, (grain, part) in enumerate(rows.groupby("granularity")):
            colour, marker = GRAINS[grain]
            found, lacking = part[part["measured"].notna()], part[~part["reachable"].astype(bool)]
            x = found["requested"] + 0.003 * number  # two whiskers at one target do not hide each other
            whiskers(ax, x, found["measured"], found["lowest"], found["highest"], colour, marker)
            ax.plot(lacking["requested"], lacking["largest"], marker, color=colour, markerfacecolor="white")
        ax.set(xlabel=f"target speedup over {VERSUS[versus]}", title=f"{rows['prompts'].max()} prompts")
    axes[0].set_ylabel("speedup (times)")
    beyond = key("out of reach: the most there is", marker="o", markersize=5, markerfacecolor="none")
    below(fig, [*grain_keys(table), key("as asked", line=":"), beyond])
    return fig


@styled
def lossless(table: pd.DataFrame) -> Figure:
    """Drafts that the base let stand, by kind of prompt, and speed beside three other ways to the same text.

    Whiskers are 95 % bootstrap intervals over prompts: of a ratio of sums on the left, of a median on the right.

    Args:
        table: the fields of `hat_lib.experiments.self_speculative.Row`.
    """
    times = {"ms_hf": "plain transformers", "ms_early_exit": "its early-exit drafts", "ms_lossless": "our drafts"}
    group = ["granularity", "capacity", "dtype"]
    need(table, *group, "kind", "drafted", "accepted", "ideal", "ms_dense", *times)
    kinds, groups = list(dict.fromkeys(table["kind"])), list(table.groupby(group))
    ways = [*times.values(), "our drafts, by work alone"]
    fig, (stood, speed) = panels(2, height=3.6, width=8.4, sharey=False)
    for number, (_, rows) in enumerate(groups):
        look, shift = SERIES[number % len(SERIES)], 0.16 * (number - (len(groups) - 1) / 2)
        for y, kind in enumerate(kinds):
            pairs = rows.loc[rows["kind"] == kind, ["accepted", "drafted"]]
            _resampled(stood, y + shift, pairs, _ratio, *look)
        for y, way in enumerate(times):
            _resampled(speed, y + shift, (rows["ms_dense"] / rows[way]).dropna(), np.median, *look)
        hollow = HOLLOW | dict(zip(("color", "marker"), look, strict=True)) | {"markersize": 5}
        speed.plot(rows["ideal"].median(), len(times) + shift, **hollow)
    stood.set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="share of the drafted tokens that stood")
    stood.xaxis.set_major_formatter(percent())
    speed.axvline(1, color=GREY, linewidth=1)
    speed.set(yticks=range(len(ways)), yticklabels=ways, xlabel="speed over our own dense path (times)")
    for ax in (stood, speed):
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    looks = zip(groups, SERIES * len(groups), strict=False)
    below(fig, [key(f"{grain} grain at {c:g}, {dtype}", *look) for ((grain, c, dtype), _), look in looks])
    return fig


@styled
def work_and_time(table: pd.DataFrame, text: str = "docstrings") -> Figure:
    """What skipping costs against the work that it leaves, and against the time, both as shares of the dense path's.

    Args:
        table: the fields of `hat_lib.experiments.published_claims.Row`; rows without quality are left out.
        text: whose perplexity.
    """
    need(table, "granularity", "exit_rate", "model_share", "decode_dense", "prefill_dense", *_cost(text))
    table = table[table[text].notna()]
    need(table, text)
    shares = {
        "executed share of the work": table["model_share"],
        "time of a decode step / dense": 1 / table["decode_dense"],
        "time of a prefill / dense": 1 / table["prefill_dense"],
    }
    fig, axes = panels(len(shares), height=3.3, width=7.8, sharex=True, sharey=True)
    for ax, (label, share) in zip(axes, shares.items(), strict=True):
        _increases(ax, label, table[text].max(), ax is axes[0])
        for grain, rows in table.assign(x=share).groupby("granularity"):
            colour, marker = GRAINS[grain]
            staying, leaving = rows[rows["exit_rate"] == 0].sort_values("model_share"), rows[rows["exit_rate"] > 0]
            costs(ax, staying["x"], *(staying[c] for c in _cost(text)), colour, marker, "-")
            costs(ax, leaving["x"], *(leaving[c] for c in _cost(text)), colour, "x")
        ax.axvline(1, color=GREY, linewidth=1)
    below(fig, [*grain_keys(table, "-"), key("with exits", marker="x")])
    return fig


@styled
def promise(table: pd.DataFrame, text: str = "docstrings") -> Figure:
    """Speedup and increase in perplexity: promised (hollow, with the capacity) and measured, a panel for each base.

    A base without quality of its own gets that of the base that has it, for the same grain and capacity.

    Args:
        table: the fields of `hat_lib.experiments.published_claims.Row`; rows with exits are left out.
        text: whose perplexity.
    """
    columns = ["base", "granularity", "capacity", "exit_rate", "promised_speedup", "promised_increase", *KINDS]
    need(table, *columns, *_cost(text))
    table = table[table["exit_rate"] == 0]
    known = table.loc[table[text].notna(), ["granularity", "capacity", *_cost(text)]]
    need(known, text)
    bases = list(dict.fromkeys(table["base"]))
    fig, axes = panels(len(bases), height=3.9, width=7.6, sharey=True, sharex=True)
    for ax, base in zip(axes, bases, strict=True):
        _increases(ax, "decode speedup (times)", table[text].max(), ax is axes[0])
        rows = table.loc[table["base"] == base, columns].merge(known, on=["granularity", "capacity"])
        for grain, part in rows.sort_values("capacity").groupby("granularity"):
            for kind, (line, _) in KINDS.items():
                costs(ax, part[kind], *(part[c] for c in _cost(text)), *GRAINS[grain], line)
        promised = rows.dropna(subset="promised_speedup").drop_duplicates("capacity")
        ax.plot(promised["promised_speedup"], 100 * promised["promised_increase"], **PROMISED)
        for row in promised.itertuples():
            at = row.promised_speedup, 100 * row.promised_increase
            ax.annotate(f"{row.capacity:.2f}", at, (-9, -3), **LABEL)
        ax.axvline(1, color=GREY, linewidth=1)
        ax.set(title=base)
        log_axis(ax, [0.5, 0.7, 1, 1.3, 1.6, 2, 3, 4, 6, 8])
    below(fig, [_promise_key(), *grain_keys(table), *(key(label, line=line) for line, label in KINDS.values())])
    return fig


@styled
def ceilings(table: pd.DataFrame, measured: pd.DataFrame) -> Figure:
    """The speedup that skipped work alone could give, beside the promised and the measured one, a panel for each base.

    Args:
        table: ``base``, ``granularity``, ``capacity``, ``ideal``.
        measured: the fields of `hat_lib.experiments.published_claims.Row`; rows with exits are left out.
    """
    need(table, "base", "granularity", "capacity", "ideal")
    need(measured, "base", "granularity", "exit_rate", "capacity", "realised", "decode_dense", "promised_speedup")
    measured = measured[measured["exit_rate"] == 0]
    bases = list(dict.fromkeys(table["base"]))
    fig, axes = panels(len(bases), height=3.4, width=7.4, sharey=True, sharex=True)
    for ax, base in zip(axes, bases, strict=True):
        here = measured[measured["base"] == base]
        for grain, (colour, marker) in GRAINS.items():
            ideal = table[(table["base"] == base) & (table["granularity"] == grain)].sort_values("capacity")
            found = here[here["granularity"] == grain].sort_values("realised")
            ax.plot(ideal["capacity"], ideal["ideal"], ":", color=colour, linewidth=2)
            ax.plot(found["realised"], found["decode_dense"], "--", color=colour, marker=marker, markersize=5)
        promised = measured.dropna(subset="promised_speedup").drop_duplicates("capacity")
        ax.plot(promised["capacity"], promised["promised_speedup"], **PROMISED)
        ax.axhline(1, color=GREY, linewidth=1)
        ax.set(title=base, xlabel="capacity")
    highest = measured[["decode_dense", "promised_speedup"]].max().max()
    axes[0].set(ylabel="decode speedup (times)", ylim=(None, 1.25 * highest))  # by work alone it goes far beyond
    names = [_promise_key(), *grain_keys(table), key("by work alone", line=":")]
    below(fig, [*names, key("measured, over our own dense path", line="--")])
    return fig


def _promise_key():
    return key("promised", marker="D", markersize=8, markerfacecolor="none")


def _cost(text: str) -> list[str]:
    return [text, f"{text}_low", f"{text}_high"]


def _increases(ax: Axes, xlabel: str, largest: float, first: bool) -> None:
    increases(ax, [0, 1, 3, 10, 30, 100, 300, MOST], xlabel, largest)
    if not first:
        ax.set_ylabel("")


def _ratio(pairs: np.ndarray, axis: int) -> np.ndarray:
    above, below = np.moveaxis(pairs.sum(axis), -1, 0)
    return above / below


def _resampled(
    ax: Axes, y: float, values: pd.DataFrame | pd.Series, statistic: Callable, colour: str, marker: str
) -> None:
    """A statistic over the rows (its ``axis``) at the height ``y``, with its 95 % interval over resampled rows."""
    if values.empty:
        return
    rows = values.to_numpy()
    drawn = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    low, high = np.quantile(statistic(rows[drawn], axis=1), [0.025, 0.975])
    whiskers(ax, [y], *(pd.Series([v]) for v in (statistic(rows, axis=0), low, high)), colour, marker, across=True)
