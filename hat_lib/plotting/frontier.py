"""Frontiers: what is lost at each amount of work. `quality`: the trained model and every control, a panel for each
grain and text, over the work of the whole model, so that grains can be compared. `twin`: the trained model alone,
setting by setting, the still twin of `hat_lib.workbook.widgets.FrontierView`. `sweep`: one freshly measured text.
`divergence`: the same by KL. `changes`: KL after short runs that differ in one thing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from hat_lib.config import HatError
from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, BROWN, COST, GREEN, GREY, ORANGE, PERCENT, PINK, PURPLE, SERIES, WORK, draws
from hat_lib.plotting.token_heatmap import PALETTE

VARIANTS = {
    "trained": (BLUE, "o", "-"),
    "uncorrected": (GREY, "X", ":"),
    "untrained": (ORANGE, "s", "--"),
    "static": (GREEN, "D", "-."),
    "cosine": (PURPLE, "v", ":"),
    "removal": (BROWN, "P", ":"),
    "random": (PINK, "^", ":"),
}
KINDS = {  # of the channel grain, in `divergence`
    "untrained": ("untrained", ORANGE, "s", "--"),
    "uncorrected": ("trained, without corrections", GREY, "X", ":"),
    "trained": ("trained", BLUE, "o", "-"),
    "fine_tuned": ("corrections with nothing skipped", GREEN, "v", "none"),
    "exits": ("trained, some tokens leaving early", BROWN, "X", "none"),
    "static": ("static", PURPLE, "D", ":"),
    "cosine": ("cosine", PURPLE, "s", ":"),
    "removal": ("removal", PURPLE, "P", ":"),
    "random": ("random", PURPLE, "^", ":"),
}
HEIGHT = 3.4  # inches


@draws("granularity", "text", "variant", "exit_rate", "tokens", "model_share", "capacity", *COST)
def quality(table: pd.DataFrame) -> Figure:
    """Perplexity increase against the work of the whole model, with 95 % intervals; linear below 1 %, log above.

    ``table`` has the fields of `hat_lib.experiments.quality.Row`; rows with exits are left out, and if a point has two
    rows, the one on more tokens counts.
    """
    table = table[table["exit_rate"] == 0].sort_values("tokens")
    table = table.drop_duplicates(["granularity", "text", "variant", "capacity"], keep="last")
    grains, texts = (sorted(set(table[name])) for name in ("granularity", "text"))
    fig, axes = style.panels(len(texts), len(grains), 3.4 * len(grains) + 0.4, 4.7 * len(texts))
    for ax, (grain, text) in zip(axes, ((g, t) for g in grains for t in texts), strict=True):
        here = table[(table["granularity"] == grain) & (table["text"] == text)].sort_values("model_share")
        style.increases(ax, [0, *(10.0**n for n in (*range(4), *range(4, 20, 2)))], WORK)
        for variant, look in VARIANTS.items():
            rows = here[here["variant"] == variant]
            if len(rows):
                style.whiskers(ax, rows["model_share"], 100 * rows[COST], *look, markersize=4)
        ax.yaxis.set_major_formatter(FuncFormatter(_increase))
        ax.set(title=f"{grain} grain, {text}", ylabel="perplexity increase" * (text == texts[0]))
    style.below(fig, [style.key(name, *look) for name, look in VARIANTS.items() if name in set(table["variant"])])
    return fig


@draws("granularity", "text", "variant", "exit_rate", "tokens", "model_share", "kl")
def divergence(table: pd.DataFrame) -> Figure:
    """KL divergence from the base at the channel grain, in nats per token on a log axis, against the work of the whole
    model; a panel for each text. ``table`` is as for `quality`, with exits."""
    table = table[table["granularity"] == "channel"].sort_values("tokens")
    leaving = (table["variant"] == "trained") & (table["exit_rate"] > 0)
    table = table.assign(variant=table["variant"].mask(leaving, "exits"))
    table = table.drop_duplicates(["text", "variant", "capacity", "exit_rate"], keep="last")
    texts, kinds = sorted(set(table["text"])), {k: look for k, look in KINDS.items() if k in set(table["variant"])}
    fig, axes = style.panels(len(texts), height=HEIGHT, width=2.9 * len(texts) + 0.4)
    for ax, text in zip(axes, texts, strict=True):
        for kind, (_, colour, marker, line) in kinds.items():
            rows = table[(table["text"] == text) & (table["variant"] == kind)].sort_values("model_share")
            ax.plot(rows["model_share"], rows["kl"], color=colour, marker=marker, linestyle=line, markersize=4)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(title=text, xlabel=WORK, ylabel="KL from the base, nats a token" * (text == texts[0]))
    style.below(fig, [style.key(label, *look) for label, *look in kinds.values()], ncols=4)
    return fig


@draws("change", "text", "capacity", "kl")
def changes(table: pd.DataFrame) -> Figure:
    """KL divergence from the base after each short run, in nats per token; a marker for each text, a panel for each
    capacity. ``table`` has the fields of `hat_lib.experiments.corrections.Row`."""
    names, capacities = list(dict.fromkeys(table["change"])), sorted(set(table["capacity"]), reverse=True)
    texts = list(dict.fromkeys(table["text"]))
    fig, axes = style.panels(len(capacities), height=0.8 + 0.27 * len(names), width=7.6)
    for ax, capacity in zip(axes, capacities, strict=True):
        at = table[table["capacity"] == capacity].pivot(index="change", columns="text", values="kl").reindex(names)
        for text, (colour, marker) in zip(texts, SERIES, strict=False):
            ax.plot(at[text], range(len(names)), marker, color=colour, markersize=5)
            ax.axvline(at[text].iloc[0], color=colour, linewidth=1, linestyle=":")
        ax.grid(axis="y", visible=False)
        ax.set(title=f"capacity {capacity:g}", xlabel="KL from the base, nats a token")
    style.named_rows(axes[0], names)  # the others share its rows
    first = style.key(names[0], line=":")
    style.below(fig, [*(style.key(text, *look) for text, look in zip(texts, SERIES, strict=False)), first])
    return fig


def _increase(percent: float, _=None) -> str:
    """+10 %, +1,000 %, +10^6 %"""
    if percent < 1e4:
        return f"{percent:+,.0f} %" if percent else "0"
    return f"+$10^{{{np.log10(percent):.0f}}}$ %"


def points(quality: pd.DataFrame, granularity: str = "channel", text: str = "docstrings") -> pd.DataFrame:
    """The trained model's rows for one grain and text, by exit rate and capacity, with the base added if missing.

    If a setting has two rows, the one on more tokens counts. The base is at capacity 1 and exit rate 0, where
    everything runs and nothing needs to be measured. Raises `HatError` if no row is left.
    """
    names = "granularity", "text", "variant", "capacity", "exit_rate", "tokens", "base_ppl", "ppl", "model_share"
    style.need(quality, *names)
    rows = quality.query("granularity == @granularity and text == @text and variant == 'trained'")
    if rows.empty:
        raise HatError(f"no row of the trained model for {granularity} and {text}: run `hat reproduce quality` first")
    rows = rows.sort_values("tokens").drop_duplicates(["capacity", "exit_rate"], keep="last")
    if not ((rows["capacity"] == 1) & (rows["exit_rate"] == 0)).any():
        most = rows.iloc[-1]
        ones, zeros = ["capacity", "realised", "model_share", "top1"], ["exit_rate", "realised_exit", "kl", *COST]
        same = most.to_dict() | dict.fromkeys(ones, 1.0) | dict.fromkeys(zeros, 0.0) | {"ppl": most["base_ppl"]}
        rows = pd.concat([rows, pd.DataFrame([same])])
    return rows.sort_values(["exit_rate", "capacity"], ignore_index=True)


@draws()
def twin(quality: pd.DataFrame, layers: pd.DataFrame, granularity: str = "channel", text: str = "docstrings") -> Figure:
    """Every point of the frontier with its requested capacity, and what each layer executed at every setting.

    ``layers`` has the fields of `hat_lib.experiments.layer_shares.Row`; the rest is as for `points`.
    """
    style.need(layers, "capacity", "exit_rate", "layer", "executed", "entered")
    rows = points(quality, granularity, text)
    fig, (cost, work) = style.panels(2, height=HEIGHT, width=7.6, sharey=False)
    draw(cost, rows)
    for row in rows.itertuples():
        at = (row.model_share, 100 * row.increase)
        cost.annotate(f"{row.capacity:.2f}", at, (4, 5), textcoords="offset points", fontsize=8)
    table = layers.pivot(index=["exit_rate", "capacity"], columns="layer", values="executed").sort_index()
    fig.colorbar(work.pcolormesh(table.to_numpy(), cmap=PALETTE), ax=work, format=PERCENT, pad=0.02)
    names = [f"{c:.2f}" + (f", exits {e:.1f}" if e else "") for e, c in table.index]
    work.set_yticks(np.arange(len(table)) + 0.5, names, fontsize=8)
    columns = range(0, table.shape[1], max(1, table.shape[1] // 6))
    work.set_xticks([c + 0.5 for c in columns], columns)
    work.set(xlabel="layer", ylabel="requested capacity", title="executed share of the layer")
    work.grid(visible=False)
    return fig


def draw(ax: Axes, points: pd.DataFrame) -> None:
    """Perplexity increase against the work of the whole model, a line per exit rate; linear below 1 %, log above."""
    style.increases(ax, [-1, 0, *(10.0**n for n in range(9))], WORK)
    for (rate, rows), look in zip(points.groupby("exit_rate"), SERIES * len(points), strict=False):
        style.whiskers(ax, rows["model_share"], 100 * rows[COST], *look, "-", label=f"exit rate {rate:g}")
    style.above(ax, 3, fontsize=8)


@draws("capacity", "realised", *COST, "top1")
def sweep(table: pd.DataFrame) -> Figure:
    """Perplexity increase and top-1 agreement of `hat_lib.explore.sweep.Sweep.frame` against the realised capacity."""
    table = table.sort_values("realised")
    fig, (increase, top1) = style.panels(2, width=1.2 * style.WIDTH, sharey=False)
    increase.axhline(0, color=GREY, linewidth=1)
    style.whiskers(increase, table["realised"], table[COST], BLUE, "o", "-")
    for row in table.itertuples():
        at = (row.realised, row.increase)
        increase.annotate(f"{row.capacity:g}", at, (5, 5), textcoords="offset points", fontsize=8)
    top1.plot(table["realised"], table["top1"], color=GREEN, marker="s")
    labels = "realised capacity (beside the points: requested)", "realised capacity"
    increase.set(xlabel=labels[0], ylabel="perplexity increase, 95 % interval")
    top1.set(xlabel=labels[1], ylabel="top-1 agreement with the base")
    for axis in (increase.xaxis, increase.yaxis, top1.xaxis, top1.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return fig
