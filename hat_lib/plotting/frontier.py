"""Frontiers: what is lost at each amount of work. `quality`: the trained model and every control, a panel for each
grain and text, over the work of the whole model, so that grains can be compared. `twin`: the trained model alone,
setting by setting, with the work of each layer. `sweep`: one freshly measured text.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hat_lib.config import HatError
from hat_lib.evaluation.coloured_text import PALETTE
from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, BROWN, COST, GREEN, GREY, ORANGE, PERCENT, PINK, PURPLE, SERIES, WORK, draws

VARIANTS = {
    "trained": (BLUE, "o", "-"),
    "uncorrected": (GREY, "X", ":"),
    "untrained": (ORANGE, "s", "--"),
    "static": (GREEN, "D", "-."),
    "cosine": (PURPLE, "v", ":"),
    "removal": (BROWN, "P", ":"),
    "random": (PINK, "^", ":"),
}
HEIGHT = 3.4  # inches


@draws("granularity", "text", "variant", "exit_rate", "tokens", "model_share", "capacity", *COST)
def quality(table: pd.DataFrame) -> Figure:
    """Perplexity increase against the work of the whole model, with 95 % intervals; linear below 1 %, log above.

    ``table`` has the fields of `hat_lib.evaluation.equal_work.Row`; rows with exits are left out, and if a point has
    two rows, the one on more tokens counts.
    """
    table = table[table["exit_rate"] == 0].sort_values("tokens")
    table = table.drop_duplicates(["granularity", "text", "variant", "capacity"], keep="last")
    grains, texts = (sorted(set(table[name])) for name in ("granularity", "text"))
    fig, axes = style.panels(len(texts), len(grains), 3.4 * len(grains) + 0.4, 4.7 * len(texts))
    for ax, (grain, text) in zip(axes, ((g, t) for g in grains for t in texts), strict=True):
        here = table[(table["granularity"] == grain) & (table["text"] == text)].sort_values("model_share")
        style.increases(ax, [0, *(10.0**n for n in (*range(4), *range(4, 20, 2)))], WORK)
        for variant, series in VARIANTS.items():
            rows = here[here["variant"] == variant]
            if len(rows):
                style.whiskers(ax, rows["model_share"], 100 * rows[COST], *series, markersize=4)
        ax.set(title=f"{grain} grain, {text}", ylabel="perplexity increase" * (text == texts[0]))
    shown = set(table["variant"])
    style.legend_below(fig, [style.entry(name, *series) for name, series in VARIANTS.items() if name in shown])
    return fig


def points(quality: pd.DataFrame, granularity: str = "channel", text: str = "docstrings") -> pd.DataFrame:
    """The trained model's rows for one grain and text, by exit rate and capacity, with the base added if missing.

    If a setting has two rows, the one on more tokens counts. The base is at capacity 1 and exit rate 0, where
    everything runs and nothing needs to be measured. Raises `HatError` if no row is left.
    """
    names = "granularity", "text", "variant", "capacity", "exit_rate", "tokens", "base_ppl", "ppl", "model_share"
    style.check_table(quality, *names)
    rows = quality.query("granularity == @granularity and text == @text and variant == 'trained'")
    if rows.empty:
        raise HatError(f"no row of the trained model for {granularity} and {text}: run `python -m studies quality`")
    rows = rows.sort_values("tokens").drop_duplicates(["capacity", "exit_rate"], keep="last")
    if not ((rows["capacity"] == 1) & (rows["exit_rate"] == 0)).any():
        ones, zeros = ["capacity", "realised", "model_share", "top1"], ["exit_rate", "realised_exit", "kl", *COST]
        base = rows.tail(1).assign(**dict.fromkeys(ones, 1.0), **dict.fromkeys(zeros, 0.0))
        rows = pd.concat([rows, base.assign(ppl=base["base_ppl"])])
    return rows.sort_values(["exit_rate", "capacity"], ignore_index=True)


@draws()
def twin(quality: pd.DataFrame, layers: pd.DataFrame, granularity: str = "channel", text: str = "docstrings") -> Figure:
    """Every point of the frontier with its requested capacity, and what each layer executed at every setting.

    ``layers`` has the fields of `studies.layer_shares.Row`; the rest is as for `points`.
    """
    style.check_table(layers, "capacity", "exit_rate", "layer", "executed", "entered")
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
    for (rate, rows), series in zip(points.groupby("exit_rate"), SERIES * len(points), strict=False):
        style.whiskers(ax, rows["model_share"], 100 * rows[COST], *series, "-", label=f"exit rate {rate:g}")
    style.legend_above(ax, 3, fontsize=8)


@draws("capacity", "realised", *COST, "top1")
def sweep(table: pd.DataFrame) -> Figure:
    """Perplexity increase and top-1 agreement of `hat_lib.evaluation.sweep.Sweep.frame` against realised capacity."""
    table = table.sort_values("realised")
    fig, (increase, top1) = style.panels(2, width=1.2 * style.WIDTH, sharey=False)
    increase.axhline(0, color=GREY, linewidth=1)
    style.whiskers(increase, table["realised"], table[COST], BLUE, "o", "-")
    for row in table.itertuples():
        at = (row.realised, row.increase)
        increase.annotate(f"{row.capacity:g}", at, (5, 5), textcoords="offset points", fontsize=8)
    top1.plot(table["realised"], table["top1"], color=GREEN, marker="s")
    increase.set(xlabel="realised capacity (beside the points: requested)", ylabel="perplexity increase, 95 % interval")
    top1.set(xlabel="realised capacity", ylabel="top-1 agreement with the base")
    for axis in (increase.xaxis, increase.yaxis, top1.xaxis, top1.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return fig
