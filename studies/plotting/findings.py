"""Findings: what the saved results say about each claim, as verdicts, words and figures.

`hat_lib.evaluation.intervals.outcome` judges a bound by an interval. In the figures a hollow marker is a claim.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hat_lib.evaluation.controls import EQUAL
from hat_lib.evaluation.intervals import outcome
from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, BROWN, COST, GREEN, GREY, ORANGE, PURPLE, SKY, WORK, draws, entry
from studies.claims import PROMISED
from studies.plotting import shared
from studies.plotting.shared import MOST, PUBLISHED

POINT = ["granularity", "text", "capacity"]
RUN = ("variant", "exit_rate", "tokens", *COST)
TEXTS = {"addresses": (BLUE, "o"), "docstrings": (ORANGE, "s")}
READ = {
    "addresses": "addresses, as trained on", "docstrings": "docstrings, not trained on",
    "encyclopedia": "encyclopedia, not trained on",
}  # fmt: skip
"""text -> title of its panel"""
TRAINED = (BLUE, "o", "-"), (SKY, "v", "--")
"""trained and untrained"""
CONTROLS = {  # in `beside_controls`: series, name, capacity of the point that bears it, and where
    "random": ((ORANGE, "^", ":"), "random channels", 0.7, (8, 0)),
    "static": ((GREEN, "D", ":"), "the same channels for every token", 0.7, (8, 2)),
    "cosine": ((PURPLE, "s", ":"), "layers by a cosine rule", 0.7, (8, 4)),
    "removal": ((BROWN, "P", ":"), "whole layers removed", 0.7, (8, -6)),
    "untrained": ((SKY, "v", "--"), "untrained", 0.55, (6, 9)),
    "trained": ((BLUE, "o", "-"), "trained", 0.55, (-24, -14)),
}
EXITS = {"trained": (GREEN, "D", "exits chosen by the gates"), "random_exits": (BROWN, "v", "as many at random")}
VERDICTS = {"kept": (BLUE, "o"), "open": (GREY, "D"), "missed": (ORANGE, "s")}
KINDS = {  # in `divergence`
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


def rivals(quality: pd.DataFrame) -> pd.DataFrame:
    """Rows of `studies.quality` at the same point and, within `EQUAL`, the same work as the trained model; no exits."""
    point = [*POINT, "max_tokens"]
    rows = quality[quality["exit_rate"] == 0]
    trained = rows.loc[rows["variant"] == "trained", [*point, "model_share"]]
    others = rows[rows["variant"] != "trained"].merge(trained, on=point, suffixes=("", "_of_trained"))
    return others[(others["model_share"] - others["model_share_of_trained"]).abs() <= EQUAL + 5e-6]  # rounded


def kept(quality: pd.DataFrame, by: str = "capacity") -> pd.DataFrame:
    """The trained rows of `studies.quality` without exits, beside the claims.

    Adds the columns ``promised``, the increase interpolated between claimed capacities, and ``kept``, an `outcome`. A
    row is judged ``by`` its requested capacity, or by the ``"realised"`` one; below the claimed ones it is left out.
    """
    capacities, bounds = zip(*sorted((c, increase) for c, (_, increase) in PROMISED.items()), strict=True)
    rows = _dial(quality, "trained")
    rows = rows[rows[by] >= capacities[0]]
    rows = rows.assign(promised=np.interp(rows[by], capacities, bounds))
    judged = rows[[*COST[1:], "promised"]].to_numpy()
    return rows.assign(kept=[outcome(low, high, at_most=bound) for low, high, bound in judged])


def increase_text(row: Mapping, name: str = "increase") -> str:
    """An increase in perplexity and its interval (``name``_low, ``name``_high), in per cent up to a doubling."""
    values = [row[column] for column in (name, f"{name}_low", f"{name}_high")]
    if values[0] < 1:
        middle, low, high = (f"{value:+.1%}".replace("-0.0%", "+0.0%") for value in values)
    else:
        middle, low, high = ("over x1000" if v >= 999 else f"x{1 + v:.{1 if v < 9 else 0}f}" for v in values)
    return f"{middle} ({low} to {high})"


def machine(rows: pd.DataFrame) -> str:
    """Device, dtype and threads of the rows, where their file has them."""
    have = [name for name in ("device", "dtype", "threads") if name in rows]
    return ", ".join("threads " * (name == "threads") + "/".join(map(str, rows[name].unique())) for name in have)


@draws()
def promised(quality: pd.DataFrame) -> Figure:
    """Increase in perplexity by realised capacity, channel grain, beside the published claim; a panel for each text of
    `READ`."""
    lines = {"trained": kept(quality), "untrained": _dial(quality, "untrained")}
    fig, axes = style.panels(len(READ), height=3.5, width=8.6, sharey=True)
    for ax, (text, title) in zip(axes, READ.items(), strict=True):
        shared.increases(ax, [0, 1, 3, 10, 30, 100], "capacity that was realised", 0, 80)
        ax.plot([*PROMISED], [100 * increase for _, increase in PROMISED.values()], ":", **PUBLISHED)
        for (name, rows), (colour, marker, line) in zip(lines.items(), TRAINED, strict=True):
            rows = rows[(rows["granularity"] == "channel") & (rows["text"] == text)]
            shared.costs(ax, rows["realised"], rows[COST], colour, marker, line)
            if len(rows):
                at = _nearest(rows, 0.55 if name == "trained" else 0.4)
                beside = {"offset": (-7, -4), "ha": "right"} if name == "trained" else {"offset": (8, 0)}
                shared.label(ax, (at["realised"], 100 * at["increase"]), name, colour, **beside)
        shared.label(ax, (0.7, 3), "claimed", "black", (8, 5))
        ax.set(title=title, xlim=(0.34, 0.95), ylabel=ax.get_ylabel() * (ax is axes[0]))
    return fig


@draws("granularity", "text", "variant", "exit_rate", "tokens", "model_share", *COST)
def beside_controls(table: pd.DataFrame, text: str) -> Figure:
    """Channel grain: the increase in perplexity on one text against executed work, trained and for each control."""
    table = table[(table["granularity"] == "channel") & (table["text"] == text)]
    fig, (ax,) = style.panels(1, height=3.9, width=6.4)
    style.increases(ax, [0, *(10.0**n for n in (*range(4), 4, 6))], WORK)
    for variant, ((colour, marker, line), name, capacity, offset) in CONTROLS.items():
        if len(rows := _dial(table, variant).sort_values("model_share")):
            style.whiskers(ax, rows["model_share"], 100 * rows[COST], colour, marker, line, markersize=4)
            at = _nearest(rows, capacity)
            shared.label(ax, (at["model_share"], 100 * at["increase"]), name, colour, offset)
    ax.set(xlim=(0.36, 0.96), ylim=(-0.7, None))
    return fig


@draws("label", "value", "low", "high", "bound", "verdict")
def bounds(table: pd.DataFrame, xlabel: str) -> Figure:
    """What a claim says, a row for each number: its value, its interval and the bound, coloured by the verdict. Values
    are in per cent or times, and from 100 on the axis is logarithmic."""
    fig, (ax,) = style.panels(1, height=1.1 + 0.28 * len(table))
    table = table.assign(y=range(len(table)))
    for word, (colour, marker) in VERDICTS.items():
        if len(rows := table[table["verdict"] == word]):
            ends = rows[["value", "low", "high"]]
            style.whiskers(ax, rows["y"], ends, colour, marker, horizontal=True, label=word)
    ax.plot(table["bound"], table["y"], "|", color="black", markersize=13, markeredgewidth=2, label="bound")
    if table["high"].max() > 100:
        ax.set_xscale("symlog", linthresh=10)
        shared.set_ticks(ax.xaxis, [0, 10, 100, 1e3, 1e4, 1e6], "{x:,.0f}")
    ax.set_xlabel(xlabel)
    shared.named_rows(ax, list(table["label"]))
    shared.legend_above(ax, 4)
    return fig


@draws(*POINT, *RUN, "model_share")
def exits(quality: pd.DataFrame) -> Figure:
    """Channel grain: what leaving early costs and saves, beside the capacity curve."""
    here = quality[quality["granularity"] == "channel"]
    leaving = here[(here["exit_rate"] > 0) & here["variant"].isin(EXITS)]
    fig, panels = _by_text(pd.concat([leaving, _dial(here, "trained")]), WORK, 3.6)
    for rows, ax in panels:
        dial, left = rows[rows["exit_rate"] == 0], rows[rows["exit_rate"] > 0]
        shared.costs(ax, dial["model_share"], dial[COST], BLUE, "o", "-")
        for variant, (colour, marker, _) in EXITS.items():
            part = left[left["variant"] == variant]
            shared.costs(ax, part["model_share"], part[COST], colour, marker)
        for row in left[left["variant"] == "trained"].itertuples():
            at = (row.model_share, min(100 * row.increase, MOST))
            ax.annotate(f"{row.exit_rate:g}", at, (-8, -3), textcoords="offset points", ha="right", fontsize=8)
    names = [entry(name, colour, marker) for colour, marker, name in EXITS.values()]
    style.legend_below(fig, [entry("no exits, by capacity", BLUE, "o", "-"), *names])
    return fig


@draws("granularity", "text", "variant", "exit_rate", "tokens", "model_share", "kl")
def divergence(table: pd.DataFrame) -> Figure:
    """KL divergence from the base at the channel grain against the work of the whole model; a panel for each text.
    ``table`` is that of `studies.quality`."""
    table = table[table["granularity"] == "channel"].sort_values("tokens")
    leaving = (table["variant"] == "trained") & (table["exit_rate"] > 0)
    table = table.assign(variant=table["variant"].mask(leaving, "exits"))
    table = table.drop_duplicates(["text", "variant", "capacity", "exit_rate"], keep="last")
    texts, kinds = sorted(set(table["text"])), {k: series for k, series in KINDS.items() if k in set(table["variant"])}
    fig, axes = style.panels(len(texts), height=3.4, width=2.9 * len(texts) + 0.4)
    for ax, text in zip(axes, texts, strict=True):
        for kind, (_, colour, marker, line) in kinds.items():
            rows = table[(table["text"] == text) & (table["variant"] == kind)].sort_values("model_share")
            ax.plot(rows["model_share"], rows["kl"], color=colour, marker=marker, linestyle=line, markersize=4)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(title=text, xlabel=WORK, ylabel="KL from the base, nats a token" * (text == texts[0]))
    style.legend_below(fig, [entry(label, *series) for label, *series in kinds.values()], ncols=4)
    return fig


def _nearest(rows: pd.DataFrame, capacity: float) -> pd.Series:
    return rows.iloc[(rows["capacity"] - capacity).abs().argmin()]


def _dial(quality: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Rows of a variant without exits; if a point has two, the one on more tokens."""
    rows = quality[(quality["variant"] == variant) & (quality["exit_rate"] == 0)].sort_values("tokens")
    return rows.drop_duplicates(POINT, keep="last").sort_values(POINT)


def _by_text(rows: pd.DataFrame, xlabel: str, height: float):
    """`panels_by` text, with axes for an increase in perplexity over a share."""
    rows = rows[rows["text"].isin(TEXTS)]
    style.check_table(rows, "text", "increase")
    top = 1.4 * np.clip(100 * rows["increase_high"].max(), 1, MOST)
    bottom = min(-0.6, 120 * rows["increase_low"].min())
    fig, panels = shared.panels_by(rows, "text", height, 8.0)
    for _, ax in panels:
        shared.increases(ax, [0, 1, 3, 10, 30, 100, 300, MOST], xlabel, rows["increase"].max(), top, bottom)
        ax.set_ylabel(ax.get_ylabel() if ax is panels[0][1] else "")
    return fig, panels
