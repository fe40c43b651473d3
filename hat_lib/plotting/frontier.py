"""Frontiers: what the trained model and every control lose at each amount of work."""

import pandas as pd
from matplotlib.figure import Figure

from hat_lib.plotting import style
from hat_lib.plotting.style import BLUE, BROWN, COST, GREEN, GREY, ORANGE, PINK, PURPLE, WORK, draws

VARIANTS = {
    "trained": (BLUE, "o", "-"),
    "uncorrected": (GREY, "X", ":"),
    "untrained": (ORANGE, "s", "--"),
    "static": (GREEN, "D", "-."),
    "cosine": (PURPLE, "v", ":"),
    "removal": (BROWN, "P", ":"),
    "random": (PINK, "^", ":"),
}


@draws("granularity", "text", "variant", "exit_rate", "tokens", "model_share", "capacity", *COST)
def quality(table: pd.DataFrame) -> Figure:
    """Perplexity increase against the work of the whole model, so that grains can be compared, with 95 % intervals;
    linear below 1 %, log above. A panel for each grain and text.

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
