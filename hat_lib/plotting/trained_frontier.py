"""The trained model's frontier, setting by setting: the points under the sliders of
`hat_lib.workbook.widgets.frontier`.

`twin` is the figure beside those sliders: as in `hat_lib.plotting.style`, tables of ``data/results`` in, a `Figure`
out. Beside the controls, at equal work, the same points stand in `hat_lib.plotting.frontier.quality`.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from hat_lib.config import HatError
from hat_lib.plotting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, need, percent
from hat_lib.plotting.token_heatmap import PALETTE

LOOKS = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (PURPLE, "v")]
HEIGHT = 3.4  # inches


def points(quality: pd.DataFrame, granularity: str = "channel", text: str = "docstrings") -> pd.DataFrame:
    """The trained model's rows for one grain and text, by exit rate and capacity, and the base at the end.

    Of two rows for one setting, the one on more tokens counts. The base is at capacity 1 and exit rate 0, where
    everything runs and nothing needs to be measured. Raises `HatError` where no row is left.
    """
    need(quality, "granularity", "text", "variant", "capacity", "exit_rate", "tokens", "base_ppl", "ppl", "model_share")
    rows = quality.query("granularity == @granularity and text == @text and variant == 'trained'")
    if rows.empty:
        raise HatError(f"no row of the trained model for {granularity} and {text}: run `hat quality` first")
    rows = rows.sort_values("tokens").drop_duplicates(["capacity", "exit_rate"], keep="last")
    if not ((rows["capacity"] == 1) & (rows["exit_rate"] == 0)).any():
        most = rows.iloc[-1]
        ones, zeros = ["capacity", "realised", "model_share", "top1"], ["exit_rate", "realised_exit", "kl"]
        zeros += ["increase", "increase_low", "increase_high"]
        same = most.to_dict() | dict.fromkeys(ones, 1.0) | dict.fromkeys(zeros, 0.0) | {"ppl": most["base_ppl"]}
        rows = pd.concat([rows, pd.DataFrame([same])])
    return rows.sort_values(["exit_rate", "capacity"], ignore_index=True)


def twin(quality: pd.DataFrame, layers: pd.DataFrame, granularity: str = "channel", text: str = "docstrings") -> Figure:
    """Every point of the frontier with its requested capacity, and what each layer executed at every setting.

    Args:
        quality, granularity, text: as for `points`.
        layers: as from `hat_lib.experiments.layer_shares.layer_shares`.
    """
    need(layers, "capacity", "exit_rate", "layer", "executed", "entered")
    rows = points(quality, granularity, text)
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(7.6, HEIGHT), layout="constrained")
        cost, work = fig.subplots(1, 2)
        draw(cost, rows)
        for row in rows.itertuples():
            at = (row.model_share, 100 * row.increase)
            cost.annotate(f"{row.capacity:.2f}", at, (4, 5), textcoords="offset points", fontsize=8)
        table = layers.pivot(index=["exit_rate", "capacity"], columns="layer", values="executed").sort_index()
        fig.colorbar(work.pcolormesh(table.to_numpy(), cmap=PALETTE), ax=work, format=percent(), pad=0.02)
        names = [f"{c:.2f}" + (f", exits {e:.1f}" if e else "") for e, c in table.index]
        work.set_yticks(np.arange(len(table)) + 0.5, names, fontsize=8)
        columns = range(0, table.shape[1], max(1, table.shape[1] // 6))
        work.set_xticks([c + 0.5 for c in columns], columns)
        work.set(xlabel="layer", ylabel="requested capacity", title="executed share of the layer")
        work.grid(visible=False)
    return fig


def draw(ax: Axes, points: pd.DataFrame) -> None:
    """Perplexity increase against the whole model's work, a line for each exit rate; linear below 1 %, log above."""
    ax.axhline(0, color=GREY, linewidth=1)
    for (rate, rows), (colour, marker) in zip(points.groupby("exit_rate"), LOOKS * len(points), strict=False):
        middle, low, high = (100 * rows[c] for c in ("increase", "increase_low", "increase_high"))
        whiskers = [(middle - low).clip(lower=0), (high - middle).clip(lower=0)]
        look = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2, "elinewidth": 1}
        ax.errorbar(rows["model_share"], middle, yerr=whiskers, label=f"exit rate {rate:g}", **look)
    ax.set_yscale("symlog", linthresh=1)
    ax.yaxis.set_major_locator(FixedLocator([-1, 0, *(10.0**n for n in range(9))]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+,.0f} %" if v else "0"))
    ax.xaxis.set_major_formatter(percent())
    ax.set(xlabel="executed share of the model's work", ylabel="perplexity increase")
    ax.legend(loc="lower left", fontsize=8)
