"""Figures of speed and of what it costs: targets, lossless decoding, the promise beside what was measured.

As in `hat_lib.plotting.style`: a table of ``data/results`` in, a `Figure` out. Lines as in the figure of the benchmark:
solid is speed over plain transformers, dashed over our own dense path, dotted what the work alone would give. A hollow
marker is a number that nobody measured here: a promise, or an ideal.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from hat_lib.inference.speed import VERSUS
from hat_lib.plotting.style import BLUE, GRAINS, GREEN, GREY, ORANGE, PURPLE, STYLE, need, percent

SERIES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (PURPLE, "v")]
KINDS = {"decode_hf": ("-", "over plain transformers"), "decode_dense": ("--", "over our own dense path")}
HOLLOW = {"markerfacecolor": "none", "markersize": 8, "color": "black", "marker": "D", "zorder": 5}
GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
LABEL = {"textcoords": "offset points", "fontsize": 8, "bbox": GROUND, "zorder": 4, "ha": "right"}
MOST = 1000.0  # per cent; an increase beyond it stands at the upper edge, as a triangle
RESAMPLES = 1000


def exits(table: pd.DataFrame) -> Figure:
    """Where tokens leave: bars over the layers that they ran, those who stay at the right end.

    Args:
        table: ``exit_rate`` (requested), ``layers``, ``share`` (of all tokens, 0-1).
    """
    need(table, "exit_rate", "layers", "share")
    cells = table.pivot(index="layers", columns="exit_rate", values="share").fillna(0.0)
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(7.0, 3.0), layout="constrained")
        ax = fig.subplots()
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


def targets(table: pd.DataFrame) -> Figure:
    """Target speedups beside those of the texts that were generated for them: medians, lowest to highest prompt.

    Args:
        table: the fields of `hat_lib.experiments.speed_targets.Row`.
    """
    need(table, "granularity", "versus", "requested", "reachable", "largest", "measured", "lowest", "highest")
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(7.0, 4.0), layout="constrained")
        axes = fig.subplots(1, table["versus"].nunique(), squeeze=False, sharey=True)[0]
        for ax, (versus, rows) in zip(axes, table.groupby("versus"), strict=True):
            ends = rows[["requested", "lowest", "highest", "largest"]].agg(["min", "max"]).to_numpy()
            line = [np.nanmin(ends), np.nanmax(ends)]
            ax.plot(line, line, ":", color="black", linewidth=1.5)
            for number, (grain, part) in enumerate(rows.groupby("granularity")):
                colour, marker = GRAINS[grain]
                found, lacking = part[part["measured"].notna()], part[~part["reachable"].astype(bool)]
                x = found["requested"] + 0.003 * number  # two whiskers at one target do not hide each other
                _whiskers(ax, x, found["measured"], found["lowest"], found["highest"], colour, marker)
                ax.plot(lacking["requested"], lacking["largest"], marker, color=colour, markerfacecolor="white")
            ax.set(xlabel=f"target speedup over {VERSUS[versus]}", title=f"{rows['prompts'].max()} prompts")
        axes[0].set_ylabel("speedup (times)")
        names = _grains(table) + [
            Line2D([], [], color="black", linestyle=":", label="as asked"),
            Line2D(
                [],
                [],
                **HOLLOW | {"markersize": 5, "marker": "o"},
                linestyle="none",
                label="out of reach: the most there is",
            ),
        ]
        fig.legend(handles=names, ncols=len(names), loc="outside lower center")
    return fig


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
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(8.4, 3.6), layout="constrained")
        stood, speed = fig.subplots(1, 2)
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
        names = [
            Line2D([], [], color=c, marker=m, linestyle="none", label=f"{grain} grain at {capacity:g}, {dtype}")
            for ((grain, capacity, dtype), _), (c, m) in zip(groups, SERIES * len(groups), strict=False)
        ]
        fig.legend(handles=names, ncols=len(names), loc="outside lower center")
    return fig


def work_and_time(table: pd.DataFrame, text: str = "docstrings") -> Figure:
    """What skipping costs against the work that it leaves, and against the time, both as shares of the dense path's.

    Args:
        table: the fields of `hat_lib.experiments.published_claims.Row`; rows without quality are left out.
        text: whose perplexity.
    """
    columns = ["granularity", "exit_rate", "model_share", "decode_dense", "prefill_dense"]
    need(table, *columns, text, f"{text}_low", f"{text}_high")
    table = table[table[text].notna()]
    need(table, text)
    shares = {
        "executed share of the work": table["model_share"],
        "time of a decode step / dense": 1 / table["decode_dense"],
        "time of a prefill / dense": 1 / table["prefill_dense"],
    }
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(7.8, 3.3), layout="constrained")
        axes = fig.subplots(1, len(shares), sharex=True, sharey=True)
        for ax, (label, share) in zip(axes, shares.items(), strict=True):
            here = table.assign(x=share)
            for grain, rows in here.groupby("granularity"):
                colour, marker = GRAINS[grain]
                staying, leaving = rows[rows["exit_rate"] == 0].sort_values("model_share"), rows[rows["exit_rate"] > 0]
                _cost(ax, staying, "x", text, colour, marker, "-")
                _cost(ax, leaving, "x", text, colour, "x", "none")
            ax.axvline(1, color=GREY, linewidth=1)
            ax.set(xlabel=label)
            ax.xaxis.set_major_formatter(percent())
        _increases(axes[0], table[text].max())
        names = [*_grains(table, "-"), Line2D([], [], color="black", marker="x", linestyle="none", label="with exits")]
        fig.legend(handles=names, ncols=len(names), loc="outside lower center")
    return fig


def promise(table: pd.DataFrame, text: str = "docstrings") -> Figure:
    """Speedup and increase in perplexity: promised (hollow, with the capacity) and measured, a panel for each base.

    A base without quality of its own gets that of the base that has it, for the same grain and capacity.

    Args:
        table: the fields of `hat_lib.experiments.published_claims.Row`; rows with exits are left out.
        text: whose perplexity.
    """
    columns = ["base", "granularity", "capacity", "exit_rate", "promised_speedup", "promised_increase", *KINDS]
    bounds = [text, f"{text}_low", f"{text}_high"]
    need(table, *columns, *bounds)
    table = table[table["exit_rate"] == 0]
    known = table.loc[table[text].notna(), ["granularity", "capacity", *bounds]]
    need(known, text)
    bases = list(dict.fromkeys(table["base"]))
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(7.6, 3.9), layout="constrained")
        axes = fig.subplots(1, len(bases), squeeze=False, sharey=True, sharex=True)[0]
        for ax, base in zip(axes, bases, strict=True):
            rows = table.loc[table["base"] == base, columns].merge(known, on=["granularity", "capacity"])
            for grain, part in rows.sort_values("capacity").groupby("granularity"):
                for kind, (line, _) in KINDS.items():
                    _cost(ax, part, kind, text, *GRAINS[grain], line)
            promised = rows.dropna(subset="promised_speedup").drop_duplicates("capacity")
            ax.plot(promised["promised_speedup"], 100 * promised["promised_increase"], linestyle="none", **HOLLOW)
            for row in promised.itertuples():
                at = row.promised_speedup, 100 * row.promised_increase
                ax.annotate(f"{row.capacity:.2f}", at, (-9, -3), **LABEL)
            ax.axvline(1, color=GREY, linewidth=1)
            ax.set(title=base, xlabel="decode speedup (times)", xscale="log")
            ax.xaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.3, 1.6, 2, 3, 4, 6, 8]))
            ax.xaxis.set_minor_locator(FixedLocator([]))
            ax.xaxis.set_major_formatter("{x:g}")
        _increases(axes[0], table[text].max())
        names = [Line2D([], [], **HOLLOW, linestyle="none", label="promised"), *_grains(table)]
        names += [Line2D([], [], color="black", linestyle=line, label=label) for line, label in KINDS.values()]
        fig.legend(handles=names, ncols=len(names), loc="outside lower center")
    return fig


def ceilings(table: pd.DataFrame, measured: pd.DataFrame) -> Figure:
    """The speedup that skipped work alone could give, beside the promised and the measured one, a panel for each base.

    Args:
        table: ``base``, ``granularity``, ``capacity``, ``ideal``.
        measured: the fields of `hat_lib.experiments.published_claims.Row`; rows with exits are left out.
    """
    need(table, "base", "granularity", "capacity", "ideal")
    columns = ["base", "granularity", "exit_rate", "capacity", "realised", "decode_dense", "promised_speedup"]
    need(measured, *columns)
    measured = measured[measured["exit_rate"] == 0]
    bases = list(dict.fromkeys(table["base"]))
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(7.4, 3.4), layout="constrained")
        axes = fig.subplots(1, len(bases), squeeze=False, sharey=True, sharex=True)[0]
        for ax, base in zip(axes, bases, strict=True):
            here = measured[measured["base"] == base]
            for grain, (colour, marker) in GRAINS.items():
                ideal = table[(table["base"] == base) & (table["granularity"] == grain)].sort_values("capacity")
                found = here[here["granularity"] == grain].sort_values("realised")
                ax.plot(ideal["capacity"], ideal["ideal"], ":", color=colour, linewidth=2)
                ax.plot(found["realised"], found["decode_dense"], "--", color=colour, marker=marker, markersize=5)
            promised = measured.dropna(subset="promised_speedup").drop_duplicates("capacity")
            ax.plot(promised["capacity"], promised["promised_speedup"], linestyle="none", **HOLLOW)
            ax.axhline(1, color=GREY, linewidth=1)
            ax.set(title=base, xlabel="capacity")
        highest = measured[["decode_dense", "promised_speedup"]].max().max()
        axes[0].set(ylabel="decode speedup (times)", ylim=(None, 1.25 * highest))  # by work alone it goes far beyond
        names = [Line2D([], [], **HOLLOW, linestyle="none", label="promised"), *_grains(table)]
        names.append(Line2D([], [], color="black", linestyle=":", label="by work alone"))
        names.append(Line2D([], [], color="black", linestyle="--", label="measured, over our own dense path"))
        fig.legend(handles=names, ncols=len(names), loc="outside lower center")
    return fig


def _grains(table: pd.DataFrame, line: str = "none") -> list[Line2D]:
    shown = {g: look for g, look in GRAINS.items() if g in set(table["granularity"])}
    return [Line2D([], [], color=c, marker=m, linestyle=line, label=f"{g} grain") for g, (c, m) in shown.items()]


def _cost(ax: Axes, rows: pd.DataFrame, x: str, text: str, colour: str, marker: str, line: str) -> None:
    """Per cent of increase with its interval, up to `MOST`; what lies beyond is a triangle there."""
    middle, low, high = (100 * rows[c] for c in (text, f"{text}_low", f"{text}_high"))
    inside = middle <= MOST
    ax.plot(rows[x], middle.clip(upper=MOST), linestyle=line, color=colour)
    _whiskers(ax, rows[x][inside], middle[inside], low[inside], high[inside].clip(upper=MOST), colour, marker)
    ax.plot(rows[x][~inside], [MOST] * int((~inside).sum()), "^", color=colour, markersize=6)


def _whiskers(ax: Axes, x, middle, low, high, colour: str, marker: str, horizontal: bool = False) -> None:
    ends = [(middle - low).clip(lower=0), (high - middle).clip(lower=0)]
    look = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 5, "capsize": 2, "elinewidth": 1}
    ax.errorbar(*((middle, x) if horizontal else (x, middle)), **{"xerr" if horizontal else "yerr": ends}, **look)


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
    middle, low, high = (pd.Series([v]) for v in (statistic(rows, axis=0), low, high))
    _whiskers(ax, [y], middle, low, high, colour, marker, horizontal=True)


def _increases(ax: Axes, largest: float) -> None:
    """The axis of an increase in perplexity, in per cent: linear below 1 %, logarithmic above."""
    beyond = bool(100 * largest > MOST)
    ax.set_yscale("symlog", linthresh=1, linscale=0.5)
    ax.yaxis.set_major_locator(FixedLocator([0, 1, 3, 10, 30, 100, 300, MOST]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+.0f} %" if v else "0"))
    ax.set_ylim(-0.6, 1.4 * MOST if beyond else None)
    ax.set_ylabel("perplexity increase" + " (▲: beyond)" * beyond)
