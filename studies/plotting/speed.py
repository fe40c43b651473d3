"""Figures of speed and what it costs. A table has the fields of the study that the figure is named after."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, draws, entry
from studies.plotting import shared
from studies.plotting.shared import MOST, SERIES

LABEL = {"textcoords": "offset points", "fontsize": 8, "zorder": 4, "ha": "right",
         "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}  # fmt: skip
TIMES = {
    "ms_lossless": "our drafts, in 4 bits",
    "ms_hf": "plain transformers",
    "ms_early_exit": "transformers' early-exit drafts",
}
TICKS = [0, 1, 3, 10, 30, 100, 300, shared.MOST]
READ = ("addresses", "docstrings", "encyclopedia")
FRONTIER = {"engine": ("our engine", "o", "-"), "teal": ("TEAL", "s", "--"), "removal": ("layers removed", "P", ":"),
            "drafts": ("self-speculation", "*", ""), "hf": ("plain transformers", "X", ""),
            "llama.cpp": ("llama.cpp", "D", "")}  # fmt: skip
COLOURS = {"float32": BLUE, "bfloat16": ORANGE, "int8": GREEN, "q4": PURPLE}
EXACT = 1e-4  # nats a token; less is drawn there
PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
BESIDE, INSIDE = {"textcoords": "offset points"}, {"ha": "center", "va": "center", "fontsize": 9}


@draws("dtype", "ms_dense", *TIMES)
def lossless(table: pd.DataFrame) -> Figure:
    """Speed of three ways to the base's text over our own dense path, medians with 95 % bootstrap intervals over
    prompts; the two dtypes are named in the first row."""
    fig, (ax,) = style.panels(1, height=2.6)
    for shift, (dtype, rows), series in zip((0.15, -0.15), table.groupby("dtype"), SERIES, strict=False):
        for y, way in enumerate(TIMES):
            ratio = (rows["ms_dense"] / rows[way]).dropna()
            style.whiskers(ax, [y + shift], middle(ratio), *series, horizontal=True)
            if not y:
                ax.annotate(dtype, (middle(ratio).iloc[0, 2], shift), (6, -3), color=series[0], **BESIDE)
    ax.axvline(1, color=GREY, linewidth=1)
    ax.set(xlabel="speed over our own dense path (times)", xlim=(0, 1.15 * ax.get_xlim()[1]))
    shared.named_rows(ax, list(TIMES.values()))
    return fig


def middle(values: pd.Series) -> pd.DataFrame:
    """The median and its 95 % interval, from rows drawn again with replacement: one row of three numbers."""
    drawn = np.random.default_rng(0).choice(values.to_numpy(), (1000, len(values)))
    return pd.DataFrame([[values.median(), *np.quantile(np.median(drawn, axis=1), [0.025, 0.975])]])


@draws("base", "way", "weights", "realised", "ms", "low", "high", "ideal")
def decode(table: pd.DataFrame) -> Figure:
    """Milliseconds per token of one sequence against the share of the work, a panel for each base: the engine, with its
    slowest and fastest rounds, and horizontal lines that decode densely."""
    engine, flat = table[table["way"] == "engine"], {"hf": "plain transformers", "reference": "reference path"}
    all_series = dict(zip(engine["weights"].unique(), SERIES, strict=False))
    fig, panels = shared.panels_by(table, "base", 3.6, 11.0, sharey=False)
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


@draws("way", "weights", "capacity", "ms", "kl", *READ)
def frontier(table: pd.DataFrame) -> Figure:
    """Price against milliseconds a token: KL from the base, and the increase in perplexity, each on its worst text. A
    colour is a format of the weights, a marker a way; in our engine, a line joins the capacities."""
    table = table.assign(worst=100 * table[list(READ)].max(axis=1).clip(upper=MOST / 100), kl=table["kl"].clip(EXACT))
    fig, axes = style.panels(2, height=4.2, width=8.6, sharey=False)
    for way, weights, rows in ((*key, rows) for key, rows in table.groupby(["way", "weights"])):
        label, marker, line = FRONTIER[way]
        colour = COLOURS.get(weights, "black")
        for ax, price in zip(axes, ("kl", "worst"), strict=True):
            rows = rows.sort_values("capacity")
            ax.plot(rows["ms"], rows[price], line, color=colour, marker=marker, markersize=5, linewidth=1.3)
            for row in rows.to_dict("records"):
                if way == "llama.cpp":
                    shared.label(ax, (row["ms"], row[price]), weights, colour, (7, 0), fontsize=8)
                elif way == "engine" and weights in ("q4", "float32") and price == "kl":
                    beside = {"offset": (-6, 0), "ha": "right"} if weights == "q4" else {"offset": (6, 5)}
                    shared.label(ax, (row["ms"], row[price]), f"{row['capacity']:g}", colour, fontsize=7, **beside)
    axes[0].set(yscale="log", ylabel="KL from the base, nats a token (lowest: exact)")
    shared.increases(axes[1], TICKS, "", table["worst"].max() / 100)
    for ax in axes:
        shared.log_axis(ax, [4, 6, 8, 10, 15, 20, 30, 40, 60])
        ax.set(xlabel="milliseconds a token", xlim=(0.75 * table["ms"].min(), None))
    formats = [entry(name, colour, "o") for name, colour in COLOURS.items()]
    ways = [entry(label, "black", marker, line) for label, marker, line in FRONTIER.values()]
    style.legend_below(fig, [*formats, *ways], ncols=5)
    return fig


@draws("way", "part", "realised", "ms")
def token_time(table: pd.DataFrame) -> Figure:
    """Milliseconds of a token, three ways on one scale: products with weights, and all else; sums of medians."""
    share = table.loc[table["way"] == "adaptive", "realised"].iloc[0]
    names = {"hf": "plain transformers", "dense": "our own dense path", "adaptive": f"adaptive, {share:.2f} realised"}
    product = table["part"].isin(PRODUCTS)
    fig, (ax,) = style.panels(1, height=2.4)
    for y, way in enumerate(names):
        inside, outside = (table.loc[(table["way"] == way) & which, "ms"].sum() for which in (product, ~product))
        ax.barh(y, inside, 0.6, color=BLUE)
        ax.barh(y, outside, 0.6, left=inside, color=ORANGE)
        ax.annotate(f"{inside + outside:.1f} ms", (inside + outside, y), (5, -3), **BESIDE)
        if not y:  # named where the bars are wide
            ax.annotate(f"products with weights: {inside:.1f}", (inside / 2, y), color="white", **INSIDE)
            ax.annotate(f"all else: {outside:.1f}", (inside + outside / 2, y), color="black", **INSIDE)
    ax.set(xlabel="milliseconds a token", xlim=(0, 1.12 * ax.get_xlim()[1]))
    shared.named_rows(ax, list(names.values()))
    return fig
