"""KL divergence from the base: `divergence` over the work, `changes` after short runs that differ in one thing."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, BROWN, GREEN, GREY, ORANGE, PURPLE, SERIES, WORK, draws
from studies.plotting import shared

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


@draws("granularity", "text", "variant", "exit_rate", "tokens", "model_share", "kl")
def divergence(table: pd.DataFrame) -> Figure:
    """KL divergence from the base at the channel grain, in nats per token on a log axis, against the work of the whole
    model; a panel for each text. ``table`` is as for `quality`, with exits."""
    table = table[table["granularity"] == "channel"].sort_values("tokens")
    leaving = (table["variant"] == "trained") & (table["exit_rate"] > 0)
    table = table.assign(variant=table["variant"].mask(leaving, "exits"))
    table = table.drop_duplicates(["text", "variant", "capacity", "exit_rate"], keep="last")
    texts, kinds = sorted(set(table["text"])), {k: series for k, series in KINDS.items() if k in set(table["variant"])}
    fig, axes = style.panels(len(texts), height=HEIGHT, width=2.9 * len(texts) + 0.4)
    for ax, text in zip(axes, texts, strict=True):
        for kind, (_, colour, marker, line) in kinds.items():
            rows = table[(table["text"] == text) & (table["variant"] == kind)].sort_values("model_share")
            ax.plot(rows["model_share"], rows["kl"], color=colour, marker=marker, linestyle=line, markersize=4)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(title=text, xlabel=WORK, ylabel="KL from the base, nats a token" * (text == texts[0]))
    style.legend_below(fig, [style.entry(label, *series) for label, *series in kinds.values()], ncols=4)
    return fig


@draws("change", "text", "capacity", "kl")
def changes(table: pd.DataFrame) -> Figure:
    """KL divergence from the base after each short run, in nats per token; a marker for each text, a panel for each
    capacity. ``table`` has the fields of `studies.corrections.Row`."""
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
    shared.named_rows(axes[0], names)  # the others share its rows
    first = style.entry(names[0], line=":")
    style.legend_below(fig, [*(style.entry(text, *series) for text, series in zip(texts, SERIES, strict=False)), first])
    return fig
