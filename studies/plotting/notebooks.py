"""Figures that one notebook shows, most of them from a table that the notebook makes."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.interpolate import make_interp_spline

from hat_lib.evaluation.routing import layer_map
from hat_lib.evaluation.tokens import explain
from hat_lib.hat import HierarchicalTransformer
from hat_lib.plotting import routing, style, token_heatmap
from hat_lib.plotting.style import (
    BLUE,
    BROWN,
    COST,
    GREEN,
    GREY,
    ORANGE,
    PERCENT,
    PINK,
    PURPLE,
    RED,
    SKY,
    WIDTH,
    draws,
)
from hat_lib.workbook import screen
from studies.plotting.shared import SERIES, legend_above, log_axis, named_rows, set_ticks

WEIGHTS = {"ffn": (BLUE, "white"), "attention": (ORANGE, "black"), "head": (GREEN, "black")}  # bar, text on it

OWN = {"trained": (BLUE, "o"), "calibrated": (ORANGE, "s"), "by chance": (GREY, "^")}


@draws("base", *WEIGHTS)
def weight_shares(table: pd.DataFrame) -> Figure:
    """01. Stacked bars: the shares of FFN, attention and LM head in the weights a token reads; a bar per base."""
    fig, (ax,) = style.panels(1, height=1.1 + 0.6 * len(table))
    left = 0.0
    for part, (colour, ink) in WEIGHTS.items():
        bars = ax.barh(table["base"], table[part], left=left, color=colour, label=part.replace("ffn", "FFN"))
        ax.bar_label(bars, fmt="{:.0%}", label_type="center", color=ink, weight="bold")
        left = left + table[part]
    ax.set(xlim=(0, 1), xlabel="share of the weights read per token")
    ax.xaxis.set_major_formatter(PERCENT)
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    legend_above(ax, 3)
    return fig


@draws("score")
def score_histogram(table: pd.DataFrame, thresholds: pd.DataFrame) -> Figure:
    """02. Scores of one site's channels, one per row, on a logarithmic axis, and ``thresholds`` with their capacity,
    threshold, and share of the scores above it."""
    fig, (ax,) = style.panels(1)
    scores = table["score"][table["score"] > 0]
    ends = np.log10(np.quantile(scores, (0.001, 0.9999)))
    ax.hist(scores, np.logspace(*ends, 80), weights=np.full(len(scores), 1 / len(table)), color=GREY, alpha=0.6)
    ax.set_xscale("log")
    for row, colour in zip(thresholds.itertuples(), (GREEN, BLUE, RED), strict=True):
        label = f"threshold at capacity {row.capacity:g}: {row.share:.0%} kept"
        ax.axvline(row.threshold, color=colour, linewidth=2, label=label)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set(xlabel="score of a channel", ylabel="share of channels")
    legend_above(ax, 1)
    return fig


@draws("layer", "ratio", "low", "high")
def skipped_ffn(table: pd.DataFrame) -> Figure:
    """02. What skipping one layer's FFN for every token costs: perplexity / base perplexity, with its interval."""
    fig, (ax,) = style.panels(1)
    ax.axhline(1, color=GREY, linewidth=1)
    ax.vlines(table["layer"], 1, table["ratio"], color=BLUE, alpha=0.35, linewidth=3)
    label = "one FFN skipped, 95 % interval"
    style.whiskers(ax, table["layer"], table[["ratio", "low", "high"]], BLUE, "o", label=label)
    ticks, largest = [1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000], table[["ratio", "high"]].max().max()
    last = next((v for v in ticks if v >= largest), ticks[-1])  # decades alone might leave a single label
    ax.set_yscale("log")
    set_ticks(ax.yaxis, [v for v in ticks if v <= last], "{x:g}×")
    ax.set(xlabel="layer whose FFN is skipped", ylabel="perplexity / base perplexity")
    ax.legend(loc="upper center")
    return fig


@draws("method", "work", "increase", "low", "high")
def grain_frontier(table: pd.DataFrame) -> Figure:
    """02. Perplexity / base perplexity - 1 against the share of the linear layers' work, a line per ``method``."""
    fig, (ax,) = style.panels(1, height=4.2)
    style.increases(ax, [-1, 0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6], "executed share of the linear layers' work")
    all_series = zip((BLUE, ORANGE, GREEN, PINK, PURPLE, BROWN), "osD^vP", strict=True)
    for (method, rows), series in zip(table.groupby("method", sort=False), all_series, strict=False):
        rows = rows.sort_values("work")
        style.whiskers(ax, rows["work"], 100 * rows[["increase", "low", "high"]], *series, "-", label=method)
    legend_above(ax, 3)
    return fig


@draws("score", "decision", "gradient", "kept")
def soft_gradient(table: pd.DataFrame) -> Figure:
    """03. By the distance of a score from its threshold: the hard decision, the gradient used in its place, and how
    often noise keeps it."""
    fig, (ax,) = style.panels(1, height=3.0)
    ax.step(table["score"], table["decision"], color="black")
    ax.plot(table["score"], table["gradient"], "--", color=ORANGE)
    ax.plot(table["score"], table["kept"], ":", color=BLUE)
    right = table["score"].max()
    ax.text(right, 1.03, "decision without noise: 0 or 1", ha="right")
    ax.text(0.45 * right, 0.71, "how often kept with noise", color=BLUE)
    ax.text(0.45 * right, 0.15, "gradient used in training", color=ORANGE)
    ax.set(xlabel="score, less the threshold", ylim=(-0.03, 1.15), ylabel="value")
    return fig


@draws("scales", *COST)
def by_hand(table: pd.DataFrame) -> Figure:
    """03. Perplexity increase with its interval, a row for each set of ``scales``; the first is the untrained one."""
    fig, (ax,) = style.panels(1, height=0.9 + 0.4 * len(table))
    ends = 100 * table[COST]
    for y, colour in enumerate((GREY, BLUE, SKY, SKY)[: len(table)]):
        style.whiskers(ax, [y], ends.iloc[[y]], colour, "o", horizontal=True)
        ax.annotate(f"{ends.iloc[y, 0]:+.0f} %", (ends.iloc[y, 0], y), (0, 6), textcoords="offset points", ha="center")
    ax.set(xlabel="perplexity increase at equal share, %", xlim=(0, None), ylim=(-0.7, len(table) - 0.5))
    named_rows(ax, list(table["scales"]))
    return fig


@draws("tokens", "capacity", "kl", "increase", "share")
def learning_curve(table: pd.DataFrame) -> Figure:
    """03. KL on text that a run does not see, `at_equal_work`, by tokens trained on; a line for each capacity.

    ``table`` is what `hat_lib.training.log` writes.
    """
    fig, (ax,) = style.panels(1, height=3.2)
    ax.axhline(1, color=GREY, linewidth=1)
    lines = at_equal_work(table).groupby("capacity", sort=False)
    for (capacity, rows), (colour, marker) in zip(lines, SERIES, strict=False):
        tokens, kl = rows["tokens"] / 1000, rows["kl"] / rows["kl"].iloc[0]
        ax.plot(tokens, kl, marker=marker, color=colour, markersize=4)
        at = (tokens.iloc[-1], kl.iloc[-1])
        ax.annotate(f"capacity {capacity:.2f}", at, (8, 0), textcoords="offset points", va="center", color=colour)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set(xlabel="thousand tokens trained on", ylabel="KL, share of that before", ylim=(0, None))
    ax.set_xlim(right=table["tokens"].max() / 1000)  # names stand beside the axes
    return fig


@draws("text", "capacity", "ratio")
def divergence_ratio(table: pd.DataFrame) -> Figure:
    """03. KL of the trained model over that of the untrained one, ``ratio``, by capacity; a line for each text."""
    fig, (ax,) = style.panels(1, height=3.2)
    ax.axhline(1, color="black", linewidth=1)
    lines = table.sort_values("capacity").groupby("text")
    for (text, rows), (colour, marker), lift in zip(lines, SERIES, (7, -13), strict=False):
        ax.plot(rows["capacity"], rows["ratio"], marker=marker, color=colour)
        middle = rows.iloc[len(rows) // 2]
        at = (middle["capacity"], middle["ratio"])
        ha, shift = ("right", -8) if lift > 0 else ("left", 8)
        ax.annotate(text, at, (shift, lift), textcoords="offset points", color=colour, ha=ha)
    ax.text(0.02, 0.94, "farther from the base than untrained", transform=ax.transAxes, va="top")
    ax.text(0.98, 0.05, "closer to the base than untrained", transform=ax.transAxes, ha="right")
    ax.xaxis.set_major_formatter(PERCENT)
    ax.set(xlabel="capacity", ylabel="KL, trained over untrained", ylim=(0.5, 1.9))
    return fig


def at_equal_work(curve: pd.DataFrame) -> pd.DataFrame:
    """A learning curve whose ``kl`` and ``increase`` are those at the share that its capacity executed before the
    first step.

    The logarithms of KL and of perplexity are interpolated linearly in the share between the capacities of a step, and
    extrapolated from the nearest two; with a single capacity, rows stay as they are.
    """
    style.check_table(curve, "tokens", "capacity", "kl", "increase", "share")
    wanted = curve.drop_duplicates("capacity").set_index("capacity")["share"]
    steps = []
    for _, rows in curve.groupby("tokens", sort=False):
        if len(rows) > 1:
            at, asked = rows.sort_values("share"), rows["capacity"].map(wanted)
            logs = np.stack([np.log(at["kl"]), np.log1p(at["increase"])], 1)
            kl, ppl = make_interp_spline(at["share"], logs, k=1)(asked).T
            rows = rows.assign(share=asked, kl=np.exp(kl), increase=np.expm1(ppl))
        steps.append(rows)
    return pd.concat(steps)


@draws("reader", "depth", "agreement")
def exit_depths(table: pd.DataFrame) -> Figure:
    """04. How often the base's next token can be read after each layer, a line per ``reader``, named beside it."""
    fig, (ax,) = style.panels(1)
    looks = (GREY, "o", "-", (0.5, 16, -14)), (BLUE, "D", "--", (0.75, 16, -34)), (ORANGE, "s", "-", (0.5, -12, 14))
    for (reader, rows), (colour, marker, line, (part, *beside)) in zip(
        table.groupby("reader", sort=False), looks, strict=False
    ):
        ax.plot(rows["depth"], rows["agreement"], line, marker=marker, color=colour, markersize=5)
        named = rows.iloc[int(part * (len(rows) - 1))]
        side = {"ha": "left" if beside[0] > 0 else "right", "arrowprops": {"arrowstyle": "-", "color": colour}}
        ax.annotate(reader, named[["depth", "agreement"]], beside, textcoords="offset points", color=colour, **side)
    ax.set(xlabel="layers that have run", ylabel="share that reads the base's token", ylim=(0, 0.6))
    ax.yaxis.set_major_formatter(PERCENT)
    return fig


@draws("exit_rate", "agreement")
def leaving(table: pd.DataFrame) -> Figure:
    """04. Of the tokens that leave, how many agree with the base, by the share that leaves; both ends are named."""
    fig, (ax,) = style.panels(1, height=3.2)
    ax.plot(table["exit_rate"], table["agreement"], marker="o", markersize=4, color=BLUE)
    first, last = table.iloc[0], table.iloc[-1]
    few = f"the first {first['exit_rate']:.0%} to leave: {first['agreement']:.0%} agree"
    ax.annotate(few, first[["exit_rate", "agreement"]], (10, -3), textcoords="offset points")
    everyone = f"all leave: {last['agreement']:.0%}"
    ax.annotate(everyone, last[["exit_rate", "agreement"]], (-10, -3), textcoords="offset points", ha="right")
    ax.set(xlabel="share of the tokens that leaves", ylabel="share of these that agrees")
    ax.set(xlim=(0, 1.03), ylim=(0, 1.03))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PERCENT)
    return fig


@draws("exit_rate", "layers", "share")
def exits(table: pd.DataFrame) -> Figure:
    """05. Where tokens leave: the share of all tokens by the layers they ran; those that stay are at the right end."""
    cells = table.pivot(index="layers", columns="exit_rate", values="share").fillna(0.0)
    fig, (ax,) = style.panels(1, height=3.0)
    width, places = 0.8 / len(cells.columns), np.arange(len(cells))
    for i, ((rate, share), (colour, _)) in enumerate(zip(cells.items(), SERIES * len(cells), strict=False)):
        bars = ax.bar(places + (i + 0.5) * width - 0.4, share, width, color=colour, label=f"exit rate {rate:g}")
        ax.bar_label(bars, [f"{v:.0%}" for v in share], fontsize=8)
    ax.set_xticks(places, cells.index)
    ax.set(xlabel="layers that the token ran", ylabel="share of the tokens")
    ax.yaxis.set_major_formatter(PERCENT)
    ax.grid(axis="x", visible=False)
    legend_above(ax, len(cells.columns))
    return fig


@draws("decides", "capacity", "realised", *COST, "top1")
def sweep(table: pd.DataFrame) -> Figure:
    """06. Perplexity increase and top-1 agreement of `hat_lib.evaluation.sweep.Sweep.frame` by realised capacity."""
    fig, (increase, top1) = style.panels(2, width=1.2 * WIDTH, sharey=False)
    increase.axhline(0, color=GREY, linewidth=1)
    for decides, rows in table.sort_values("realised").groupby("decides", sort=False):
        method = decides == "method"  # others are points of their own
        series = (BLUE, "o", "-") if method else (ORANGE, "D", "none")
        style.whiskers(increase, rows["realised"], rows[COST], *series)
        for row in rows.itertuples():
            at, name = (row.realised, row.increase), f"{row.capacity:g}" if method else decides
            increase.annotate(name, at, (5, 5), textcoords="offset points", fontsize=8)
        top1.plot(rows["realised"], rows["top1"], color=GREEN if method else ORANGE, marker="s", linestyle=series[2])
    increase.set(xlabel="realised capacity (beside the points: requested)", ylabel="perplexity increase, 95 % interval")
    top1.set(xlabel="realised capacity", ylabel="top-1 agreement with the base")
    for axis in (increase.xaxis, increase.yaxis, top1.xaxis, top1.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return fig


def prompt_map(hat: HierarchicalTransformer, prompt: str) -> Figure:
    """07. The map of a prompt, as ``hat`` is set: what pages show in the place of the screen that run nothing."""
    return routing.layer_map(layer_map(explain(hat, prompt), count=screen.MOST), ["share"])


def prompt_texts(hat: HierarchicalTransformer, prompt: str) -> Figure:
    """07. Texts that go on from a prompt, at capacities 1.0, 0.7, 0.55 and 0.4."""
    found, meaning = screen.texts(hat, prompt), "framed: first token unlike dense; share of the dense work"
    return token_heatmap.figure(*(found[i] for i in (0, 3, 5, 8)), meaning=meaning, low=0.0, high=1.0)


@draws("class", "tokens", "difference", "low", "high")
def token_classes(table: pd.DataFrame) -> Figure:
    """07. How far each class of tokens lies from the mean of all tokens, in percentage points of executed share."""
    rows = table.sort_values("difference").reset_index(drop=True)
    fig, (ax,) = style.panels(1, height=1.3 + 0.34 * len(rows))
    ax.axvline(0, color=GREY, linewidth=1)
    ends = 100 * rows[["difference", "low", "high"]]
    style.whiskers(ax, rows.index, ends, BLUE, "o", horizontal=True)
    for place, (middle, _, high) in zip(rows.index, ends.to_numpy(), strict=True):
        ax.text(np.nanmax([high, middle]) + 0.4, place, f"{middle:+.1f}".replace("-", "−"), va="center", color=BLUE)
    ax.set_yticks(rows.index, [f"{row['class']} ({row.tokens:,})" for _, row in rows.iterrows()])
    ax.set(xlabel="points above the mean of all tokens, with 95 % intervals", ylabel="class (tokens)")
    ax.grid(axis="y", visible=False)
    return fig


@draws("what", "fifth", "share")
def fifths(table: pd.DataFrame) -> Figure:
    """07. Mean executed share by ``fifth`` of the tokens, from 1 to 5; a labelled line per ``what``."""
    fig, (ax,) = style.panels(1, height=3.4)
    for (what, rows), (colour, marker) in zip(table.groupby("what", sort=False), SERIES, strict=False):
        ax.plot(rows["fifth"], rows["share"], color=colour, marker=marker)
        ax.text(rows["fifth"].iloc[-1] + 0.12, rows["share"].iloc[-1], what, color=colour, va="center")
    ax.set_xticks(range(1, 6), ["1\nleast", "2", "3", "4", "5\nmost"])
    ax.set(
        xlim=(0.8, 6.6), xlabel="fifths of the tokens, by how much they surprise the base", ylabel="mean executed share"
    )
    ax.yaxis.set_major_formatter(PERCENT)
    return fig


@draws("forecast", "price", "low", "high")
def sensitivity(table: pd.DataFrame) -> Figure:
    """07. What dropping a token's channels costs against what was forecast, both × the mean of the layer, in fifths."""
    fig, (ax,) = style.panels(1, height=4.0)
    ends = table["forecast"].min() / 1.3, table["forecast"].max() * 1.3
    ax.plot(ends, ends, color=GREY, linewidth=1)
    style.whiskers(ax, table["forecast"], table[["price", "low", "high"]], BLUE, "o")
    for row, name in ((table.iloc[0], "the fifth forecast to cost least"), (table.iloc[-1], "forecast to cost most")):
        ax.annotate(name, (row["forecast"], row["price"]), (12, 0), textcoords="offset points", va="center", color=BLUE)
    ax.text(ends[1], ends[1], " as forecast", color=GREY, va="center")
    ax.set(yscale="log", xlabel="forecast, × the layer's mean", ylabel="measured, × the layer's mean")
    log_axis(ax, [0.25, 0.5, 1, 2, 4])
    set_ticks(ax.yaxis, [0.25, 0.5, 1, 2, 4])
    return fig


@draws("variant", "model_share", *COST)
def own_costs(table: pd.DataFrame) -> Figure:
    """09. Perplexity increase against the executed share of the work; a labelled line per ``variant``."""
    fig, (ax,) = style.panels(1, height=3.8)
    style.increases(ax, [0, 1, 10, 100, 1000], style.WORK)
    for variant, rows in table.groupby("variant", sort=False):
        (colour, marker), rows = OWN[variant], rows.sort_values("model_share")
        style.whiskers(ax, rows["model_share"], 100 * rows[COST], colour, marker, "-")
        first = rows.iloc[0]
        ax.annotate(variant, (first["model_share"], 100 * first["increase"]), (-10, 0), textcoords="offset points",
                    ha="right", va="center", color=colour)  # fmt: skip
    ax.set_xlim(table["model_share"].min() - 0.2, 1.02)
    return fig


@draws("step", "capacity", "kl")
def early_and_late(log: pd.DataFrame) -> Figure:
    """09. KL of the first and of the last third of a run's steps, by the capacity that each step drew."""
    fig, (ax,) = style.panels(1, height=3.4)
    third, last = log["step"].max() / 3, log["step"].max()
    parts = (log[log["step"] <= third], ORANGE, "s"), (log[log["step"] > last - third], BLUE, "o")
    for rows, colour, marker in parts:
        ax.plot(rows["capacity"], rows["kl"], marker, color=colour, markersize=5, alpha=0.8)
        line = np.polynomial.Polynomial.fit(rows["capacity"], np.log(rows["kl"]), 1)
        ends = np.array([log["capacity"].min(), log["capacity"].max()])
        ax.plot(ends, np.exp(line(ends)), color=colour, linewidth=1)
        name = f"steps {rows['step'].min()} to {rows['step'].max()}"
        ax.text(ends[0] - 0.01, np.exp(line(ends[0])), name, color=colour, ha="right", va="center")
    ax.set_xlim(log["capacity"].min() - 0.17, None)
    ax.set(yscale="log", xlabel="capacity that the step drew", ylabel="KL from the base, nats per token")
    ax.xaxis.set_major_formatter(PERCENT)
    return fig
