"""Figures of speed and what it costs: targets, self-speculative decoding, claims beside what was measured.

Solid lines are speed over plain transformers, dashed lines over our own dense path; dotted lines are what the work
alone would give. A hollow marker is a number not measured here: a claim, or an ideal. A table has the fields of the
study that the figure is named after; `QUALITY` is the increase in perplexity and its interval.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, GREEN, GREY, ORANGE, PERCENT, PURPLE, SKY, YELLOW, draws, entry
from studies.plotting import shared
from studies.plotting.shared import GRAINS, SERIES

KINDS = {"decode_hf": ("-", "over plain transformers"), "decode_dense": ("--", "over our own dense path")}
CLAIM = ("base", "granularity", "capacity", "exit_rate", "promised_speedup", "promised_increase", *KINDS)
LABEL = {"textcoords": "offset points", "fontsize": 8, "zorder": 4, "ha": "right",
         "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}  # fmt: skip
TIMES = {"ms_hf": "plain transformers", "ms_early_exit": "its early-exit drafts", "ms_lossless": "our drafts"}
QUALITY = ["docstrings", "docstrings_low", "docstrings_high"]
TICKS = [0, 1, 3, 10, 30, 100, 300, shared.MOST]
TOKEN_PARTS = {
    "qkv": (BLUE, "q | k | v"), "o": (SKY, "o"), "gate_up": (ORANGE, "gate | up"), "down": (YELLOW, "down"),
    "head": (GREEN, "head"), "decisions": (PURPLE, "decisions"), "rest": (GREY, "rest of the step"),
    "loop": ("black", "loop"),
}  # fmt: skip
"""part of a token's time -> colour and name"""


@draws("granularity", "capacity", "dtype", "kind", "drafted", "accepted", "ideal", "ms_dense", *TIMES)
def lossless(table: pd.DataFrame) -> Figure:
    """Drafts that the base accepted, by kind of prompt, and speed beside three other ways to the same text: a ratio of
    sums and a median, with 95 % bootstrap intervals over prompts."""
    kinds, groups = list(dict.fromkeys(table["kind"])), list(table.groupby(["granularity", "capacity", "dtype"]))
    fig, (stood, speed) = style.panels(2, height=3.6, width=8.4, sharey=False)
    names = []
    for number, ((grain, capacity, dtype), rows) in enumerate(groups):
        series, shift = SERIES[number % len(SERIES)], 0.16 * (number - (len(groups) - 1) / 2)
        names.append(entry(f"{grain} grain, capacity {capacity:g}, {dtype}", *series))
        for y, kind in enumerate(kinds):
            pairs = rows.loc[rows["kind"] == kind, ["accepted", "drafted"]]
            _resampled(stood, y + shift, pairs, _ratio, *series)
        for y, way in enumerate(TIMES):
            _resampled(speed, y + shift, (rows["ms_dense"] / rows[way]).dropna(), np.median, *series)
        hollow = dict(zip(("color", "marker"), series, strict=True)) | {"markersize": 5}
        speed.plot(rows["ideal"].median(), len(TIMES) + shift, **shared.PUBLISHED | hollow)
    stood.set(xlabel="share of the drafted tokens that stood")
    stood.xaxis.set_major_formatter(PERCENT)
    speed.axvline(1, color=GREY, linewidth=1)
    speed.set(xlabel="speed over our own dense path (times)")
    shared.named_rows(stood, kinds)
    shared.named_rows(speed, [*TIMES.values(), "our drafts,\nby work alone"])
    style.legend_below(fig, names)
    return fig


@draws("base", "way", "weights", "realised", "ms", "low", "high", "ideal")
def decode(table: pd.DataFrame) -> Figure:
    """Milliseconds per token of one sequence against the share of the work, a panel for each base: the engine, with its
    slowest and fastest rounds, and horizontal lines that decode densely."""
    engine, flat = table[table["way"] == "engine"], {"hf": "plain transformers", "reference": "reference path"}
    all_series = dict(zip(engine["weights"].unique(), SERIES, strict=False))
    fig, panels = shared.panels_by(table, "base", 3.6, 7.6, sharey=False)
    for rows, ax in panels:
        for weights, part in rows[rows["way"] == "engine"].sort_values("realised").groupby("weights"):
            colour, marker = all_series[weights]
            spread = [part["ms"] - part["low"], part["high"] - part["ms"]]
            ax.errorbar(part["realised"], part["ms"], spread, color=colour, marker=marker, markersize=4, linewidth=1.2)
            ax.plot(part["realised"], part["ms"].iloc[-1] / part["ideal"], ":", color=colour, linewidth=1.5)
        both = rows.loc[rows["way"].isin(flat), "ms"]
        for row in rows[rows["way"] != "engine"].itertuples():
            ax.axhline(row.ms, color=GREY, linewidth=1, linestyle="-" if row.way in flat else "--")
            if row.way in flat:  # others cross the engine's lines, where a label would cover points
                height = -11 if row.ms == both.min() else 3  # the two may almost coincide
                ax.annotate(flat[row.way], (0.98, row.ms), (0, height), xycoords=("axes fraction", "data"), **LABEL)
        ax.set(xlabel="realised capacity", ylabel="milliseconds a token", ylim=(0, 1.1 * rows["ms"].max()))
    names = [entry(f"engine, {weights}", colour, marker, "-") for weights, (colour, marker) in all_series.items()]
    others = table[~table["way"].isin(["engine", *flat])]
    peers = [entry(f"{way}, {weights}", GREY, line="--") for way, weights in others.groupby(["way", "weights"]).groups]
    style.legend_below(fig, [*names, entry("if time followed the weights", line=":"), *peers])
    return fig


@draws("way", "part", "realised", "ms", "low", "high")
def token_time(table: pd.DataFrame) -> Figure:
    """Milliseconds of a token by part, a panel for each way on a scale of its own: medians, with whiskers from the
    lowest to the highest round. Bars whose whiskers include 0 are hollow."""
    share = table.loc[table["way"] == "adaptive", "realised"].iloc[0]
    names = {"hf": "plain transformers", "dense": "our own dense path", "adaptive": f"adaptive, {share:.2f} realised"}
    fig, axes = style.panels(3, height=3.4, width=8.6)
    for ax, (way, title) in zip(axes, names.items(), strict=True):
        parts = table[table["way"] == way].set_index("part").reindex(list(TOKEN_PARTS))
        known = parts["low"] * parts["high"] > 0
        for y, (part, (colour, _)) in enumerate(TOKEN_PARTS.items()):
            ax.barh(y, parts.loc[part, "ms"], 0.62, color=colour if known[part] else "white", edgecolor=colour)
        ends = parts[["ms", "low", "high"]]
        style.whiskers(ax, range(len(parts)), ends, "black", "", horizontal=True, elinewidth=0.8)
        ax.axvline(0, color=GREY, linewidth=1)
        ax.set_title(f"{title}\n{parts['ms'].sum():.1f} ms, sum of medians", fontsize=9)
        ax.set(xlabel="milliseconds a token")
        ax.grid(axis="y", visible=False)
    shared.named_rows(axes[0], [label for _, label in TOKEN_PARTS.values()])
    return fig


@draws("base", "granularity", "capacity", "exit_rate", "model_share", "decode_dense", "prefill_dense")
def work_and_time(table: pd.DataFrame) -> Figure:
    """Channel grain, the bundled base: time against the work that remains, both as shares of the dense path's."""
    rows = table.query("base == 'bundled' and granularity == 'channel' and exit_rate == 0").sort_values("model_share")
    style.check_table(rows)
    fig, (ax,) = style.panels(1, height=3.6, width=5.6)
    ax.plot([0.3, 1], [0.3, 1], ":", color=GREY)
    shared.label(ax, (0.62, 0.62), "if time followed the work", GREY, (8, -8))
    ax.axhline(1, color=GREY, linewidth=1)
    shared.label(ax, (0.36, 1), "nothing skipped", GREY, (0, -7))
    share, decode, prompt = rows["model_share"], 1 / rows["decode_dense"], 1 / rows["prefill_dense"]
    ax.plot(share, decode, color=BLUE, marker="o", markersize=5)
    ax.plot(share, prompt, color=BLUE, marker="s", markersize=5, linestyle="--")
    for x, y, capacity in zip(share, decode, rows["capacity"], strict=True):
        shared.label(ax, (x, y), f"{capacity:.2f}", BLUE, (-4, 9), ha="right")
    shared.label(ax, (0.6, 0.74), "decoding, at the capacity shown", BLUE, (0, 0), ha="right")
    shared.label(ax, (share.iloc[1], prompt.iloc[1]), "reading a prompt of 512 tokens", BLUE, (0, 11), ha="center")
    ax.set(xlim=(0.34, 1.0), ylim=(0.3, 1.4), xlabel=style.WORK, ylabel="time / time with nothing skipped")
    ax.xaxis.set_major_formatter(PERCENT)
    ax.yaxis.set_major_formatter(PERCENT)
    return fig


@draws(*CLAIM, *QUALITY)
def promise(table: pd.DataFrame) -> Figure:
    """Speedup and increase in perplexity: claimed (hollow, with the capacity) and measured, without exits."""
    table = table[table["exit_rate"] == 0].dropna(subset=QUALITY)
    style.check_table(table, *QUALITY)
    fig, panels = shared.panels_by(table, "base", 3.9, 7.6)
    for rows, ax in panels:
        shared.increases(ax, TICKS, "decode speedup (times)", table[QUALITY[0]].max())
        for grain, part in rows.sort_values("capacity").groupby("granularity"):
            for kind, (line, _) in KINDS.items():
                shared.costs(ax, part[kind], part[QUALITY], *GRAINS[grain], line)
        claims = rows.dropna(subset="promised_speedup").drop_duplicates("capacity")
        ax.plot(claims["promised_speedup"], 100 * claims["promised_increase"], linestyle="none", **shared.PUBLISHED)
        for row in claims.itertuples():
            at = row.promised_speedup, 100 * row.promised_increase
            ax.annotate(f"{row.capacity:.2f}", at, (0, 8), **LABEL | {"ha": "center"})
        ax.axvline(1, color=GREY, linewidth=1)
        shared.log_axis(ax, [0.5, 0.7, 1, 1.3, 1.6, 2, 3, 4, 6, 8])
        ax.label_outer()
    names = [*shared.grain_entries(table), *(entry(label, line=line) for line, label in KINDS.values())]
    style.legend_below(fig, [entry("claimed", **shared.PUBLISHED), *names])
    return fig


def _ratio(pairs: np.ndarray, axis: int) -> np.ndarray:
    sums = pairs.sum(axis)
    return sums[..., 0] / sums[..., 1]


def _resampled(ax: Axes, y: float, values: pd.DataFrame, statistic: Callable, colour: str, marker: str) -> None:
    """A statistic over the rows at height ``y``, with its 95 % interval over resampled rows."""
    if values.empty:
        return
    rows = values.to_numpy()
    drawn = np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))
    low, high = np.quantile(statistic(rows[drawn], axis=1), [0.025, 0.975])
    style.whiskers(ax, [y], pd.DataFrame([[statistic(rows, axis=0), low, high]]), colour, marker, horizontal=True)
