"""Findings: what the saved results say about each claim, as verdicts, words and figures.

The input is tables of ``data/results``; no model is loaded and nothing is measured. A bound is judged by an interval:
"kept" if all of it lies on the right side, "missed" if all of it lies on the wrong side, "open" if the bound lies
inside. In the figures a hollow marker is a claim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hat_lib.evaluation.controls import EQUAL
from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, BROWN, COST, GREEN, GREY, ORANGE, PURPLE, SKY, draws, entry
from studies.plotting import shared
from studies.plotting.shared import MOST, PUBLISHED

POINT = ["granularity", "text", "capacity"]
RUN = ("variant", "exit_rate", "tokens", *COST)
TEXTS = {"addresses": (BLUE, "o"), "docstrings": (ORANGE, "s")}
TRAINED = {
    "channel grain, trained": (BLUE, "o", "-"),
    "channel grain, untrained": (SKY, "v", "--"),
    "token grain, published recipe": (ORANGE, "s", "-"),
    "token grain, our recipe": (PURPLE, "P", "-"),
}
EXITS = {"trained": (GREEN, "D", "exits chosen by the gates"), "random_exits": (BROWN, "v", "as many at random")}


def verdict(low: float, high: float, bound: float) -> str:
    """Whether a cost with the interval ``low`` .. ``high`` is at most ``bound``: "kept", "missed" or "open"."""
    return "kept" if high <= bound else "missed" if low > bound else "open"


def reached(low: float, high: float, bound: float) -> str:
    """The `verdict` on a gain, which should be at least ``bound``."""
    return verdict(-high, -low, -bound)


def joint(verdicts: Iterable[str]) -> str:
    """The verdict on a claim about all: "missed" if it fails anywhere, "kept" if it holds everywhere, else "open"."""
    found = set(verdicts)
    return "missed" if "missed" in found else "kept" if found == {"kept"} else "open"


def rivals(quality: pd.DataFrame) -> pd.DataFrame:
    """Rows of `studies.quality` to compare the trained model with: no exits, the same point, and the same
    share of the model's work within `EQUAL`."""
    point = [*POINT, "max_tokens"]
    style.check_table(quality, *point, "variant", "exit_rate", "model_share")
    rows = quality[quality["exit_rate"] == 0]
    trained = rows.loc[rows["variant"] == "trained", [*point, "model_share"]]
    others = rows[rows["variant"] != "trained"].merge(trained, on=point, suffixes=("", "_of_trained"))
    return others[(others["model_share"] - others["model_share_of_trained"]).abs() <= EQUAL + 5e-6]  # rounded


def beaten(rows: pd.DataFrame) -> tuple[str, str]:
    """Is the trained model better than each of these? The `joint` verdict from the paired margins, and the counts."""
    style.check_table(rows, "margin_low", "margin_high")
    better, worse = (rows["margin_low"] > 0).sum(), (rows["margin_high"] < 0).sum()
    each = (reached(*ends, 0) for ends in rows[["margin_low", "margin_high"]].to_numpy())
    return joint(each), f"better {better}, worse {worse} of {len(rows)}"


def kept(quality: pd.DataFrame, promise: pd.DataFrame) -> pd.DataFrame:
    """The trained rows of `studies.quality` without exits, beside the claim.

    Adds the columns ``promised`` (increase; interpolated between published capacities, rows outside them are left out)
    and ``kept`` (a `verdict`). If a point has two rows, the one on more tokens counts. ``promise`` has ``capacity`` and
    ``promised_increase``.
    """
    style.check_table(quality, *POINT, *RUN, "realised")
    bounds, rows = _bounds(promise), _dial(quality, "trained")
    rows = rows[rows["capacity"].between(bounds["capacity"].min(), bounds["capacity"].max())]
    rows = rows.assign(promised=np.interp(rows["capacity"], bounds["capacity"], bounds["promised_increase"]))
    return rows.assign(kept=[verdict(*row) for row in rows[[*COST[1:], "promised"]].to_numpy()])


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
def promised(quality: pd.DataFrame, published: pd.DataFrame, promise: pd.DataFrame) -> Figure:
    """Increase in perplexity at the realised capacity, beside the published claim; a panel for each text.

    ``published`` has rows like ``quality``, of the token grain trained by the published recipe; the rest as for `kept`.
    """
    style.check_table(published, *POINT, *RUN, "realised")
    found, bounds = kept(quality, promise), _bounds(promise)
    channel, token = (found[found["granularity"] == grain] for grain in ("channel", "token"))
    start = _dial(quality, "untrained").query("granularity == 'channel'")
    lines = [channel, start, _dial(published, "trained"), token]
    fig, panels = _by_text(found, "capacity that was realised", 4.1)
    for here, ax in panels:
        for rows, series in zip(lines, TRAINED.values(), strict=True):
            rows = rows[rows["text"] == here["text"].iloc[0]]
            shared.costs(ax, rows["realised"], rows[COST], *series)
        ax.plot(bounds["capacity"], 100 * bounds["promised_increase"], ":", **PUBLISHED)
    claim = entry("claimed", line=":", **PUBLISHED)
    style.legend_below(fig, [claim, *(entry(name, *series) for name, series in TRAINED.items())], ncols=3)
    return fig


NUMBERS = ("realised", "promised_speedup", "ideal_decode", "decode_dense", "decode_hf")


@draws("base", "granularity", "capacity", "exit_rate", *NUMBERS)
def speeds(promise: pd.DataFrame) -> Figure:
    """Decode speedups in two factors, a panel for each base: what skipping gives (thick), what the dense path adds
    (thin).

    The realised capacity is beside a row's name, for each base where they differ. ``promise`` has the fields of
    `studies.published_claims.Row`; rows with exits are left out.
    """
    rows = promise[promise["exit_rate"] == 0]
    rows = rows.sort_values(["granularity", "capacity", "base"], ascending=[True, False, True])
    style.check_table(rows, "base")
    fig, panels = shared.panels_by(rows, "base", 3.9, 8.4)
    for here, ax in panels:
        for y, row in enumerate(here.itertuples()):
            colour, marker = shared.GRAINS[row.granularity]
            ax.plot([row.decode_dense, row.decode_hf], [y, y], color=GREY, linewidth=1.5)
            ax.plot([1, row.decode_dense], [y, y], color=colour, linewidth=6, alpha=0.5, solid_capstyle="butt")
            ax.plot(row.decode_dense, y, marker, color=colour, markersize=5)
            ax.plot(row.decode_hf, y, marker, color=GREY, markersize=5)
            ax.plot(row.ideal_decode, y, "|", color=colour, markersize=13, markeredgewidth=2)
            ax.plot(row.promised_speedup, y, linestyle="none", **PUBLISHED)
        ax.axvline(1, color=GREY, linewidth=1)
        ax.set(xlabel="decode speedup (times)")
        shared.log_axis(ax, [1, 1.5, 2, 3, 4, 6])
        ax.grid(axis="y", visible=False)
    ran = rows.groupby(["granularity", "capacity"], sort=False)["realised"]
    names = [(*at, ", ".join(dict.fromkeys(f"{r:.2f}" for r in shares))) for at, shares in ran]
    shared.named_rows(panels[0][1], [f"{grain} {capacity:.2f} (ran {shares})" for grain, capacity, shares in names])
    names = [
        entry("claimed", **PUBLISHED),
        entry("if time followed work", marker="|", markersize=11, markeredgewidth=2),
    ]
    names += [entry("skipping: over our own dense path", BLUE, line="-", linewidth=6, alpha=0.5)]
    names += [entry("all of it: over plain transformers", GREY, "o", "-", markersize=5)]
    style.legend_below(fig, names, fontsize=8)
    return fig


@draws(*POINT, *RUN, "model_share")
def exits(quality: pd.DataFrame) -> Figure:
    """Channel grain: what leaving early costs and saves, beside the capacity curve; ``quality`` as for `kept`."""
    here = quality[quality["granularity"] == "channel"]
    leaving = here[(here["exit_rate"] > 0) & here["variant"].isin(EXITS)]
    fig, panels = _by_text(pd.concat([leaving, _dial(here, "trained")]), style.WORK, 3.6)
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


def _bounds(promise: pd.DataFrame) -> pd.DataFrame:
    style.check_table(promise, "capacity", "promised_increase")
    bounds = promise.dropna(subset="promised_increase").drop_duplicates("capacity").sort_values("capacity")
    style.check_table(bounds, "promised_increase")
    return bounds


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
