"""The frontier with a slider: quality, time and the work of each layer, at the measured settings."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from ipywidgets import Image, Layout, SelectionSlider

from hat_lib.backbone.base import BUNDLED
from hat_lib.config import DATA, work_text
from hat_lib.plotting import frontier, style
from hat_lib.plotting.style import BLUE, ORANGE, PERCENT, RED, WIDE
from hat_lib.rows import results_table
from hat_lib.workbook.view import CONTROL, View

SETTING = ["capacity", "exit_rate"]
TIME = ["decode_dense", "decode_hf", "device", "dtype", "threads"]


class FrontierView(View):
    """A slider over the measured settings → a point on the frontier, its numbers, and the work of each layer.

    From a folder's ``quality.csv``, ``layer_shares.csv`` and ``published_claims.csv`` (for time); settings without
    layers are left out. Raises `HatError` for a missing file, and if ``quality.csv`` has no row for the grain and text.
    """

    def __init__(self, results: Path = DATA / "results", granularity: str = "channel", text: str = "docstrings"):
        files = ("quality", "layer_shares", "published_claims")
        quality, layers, claims = (results_table(name, results) for name in files)
        self._layers = dict(list(layers.sort_values("layer").groupby(SETTING)))
        points, timed = frontier.points(quality, granularity, text), claims[["granularity", "base", *SETTING, *TIME]]
        points = points.merge(timed, how="left", on=["granularity", "base", *SETTING], suffixes=("", "_timed"))
        points = points.sort_values(["exit_rate", "capacity"]).set_index(SETTING)
        self._points = points[[setting in self._layers for setting in points.index]]
        options = [(f"{c:.2f}" + (f", exits {e:.2f}" if e else ""), (c, e)) for c, e in self._points.index]
        self.setting = SelectionSlider(description="Capacity", options=options, **CONTROL)
        self.picture = Image(format="png", layout=Layout(max_width="100%"))
        super().__init__([self.setting], self.picture)
        self.answer()

    def _update(self) -> None:
        row, layers = self._points.loc[self.setting.value], self._layers[self.setting.value]
        with mpl.rc_context(style.STYLE):
            self.picture.value = self._picture(row, layers)
        self._say("ready", self._numbers(row, layers))

    def _numbers(self, row: pd.Series, layers: pd.DataFrame) -> str:
        capacity, exit_rate = row.name
        file = ", a 4-bit file, dequantised" if row["base"] == BUNDLED else ""
        base = f"the base's {row['base_ppl']:.2f} ({row['tokens']:,.0f} tokens of {row['text']}{file})"
        increase = "{increase:+.1%} ({increase_low:+.1%} to {increase_high:+.1%}) over".format_map(row)
        if row.name == (1.0, 0.0):
            increase, speed = "is", "our own dense path, which the others are timed against"
        elif np.isnan(row["decode_dense"]):
            speed = "not measured"
        else:
            speed = "a token is decoded {decode_dense:.2f}x as fast as dense, {decode_hf:.2f}x as fast as transformers"
            speed = (speed + " ({device_timed}, {dtype_timed}, {threads_timed:.0f} threads)").format_map(row)
        executed = layers.set_index("layer")["executed"]
        least, most = (f"{executed[i]:.1%} (layer {i})" for i in (executed.idxmin(), executed.idxmax()))
        return (
            f"{work_text(capacity, row['realised'], exit_rate, row['realised_exit'], row['model_share'])}\n"
            f"quality: perplexity {increase} {base}\ntime: {speed}\n"
            f"executed by layer: least {least}, most {most} (on {layers['tokens'].iloc[0]:,} tokens)"
        )

    def _picture(self, row: pd.Series, layers: pd.DataFrame) -> bytes:
        """The frontier with this point marked, and the work of each layer, as a PNG file of always the same size."""
        file = BytesIO()
        fig, (cost, work) = style.panels(2, height=frontier.HEIGHT, width=WIDE, sharey=False)
        frontier.draw(cost, self._points.reset_index())
        marker = {"markersize": 13, "fillstyle": "none", "markeredgewidth": 2.5}
        cost.plot(row["model_share"], 100 * row["increase"], "o", color=RED, **marker)
        work.bar(layers["layer"], layers["executed"], color=BLUE, label="executed, all tokens")
        label = "tokens that had not left"
        work.plot(layers["layer"], layers["entered"], "s-", color=ORANGE, markersize=3, label=label)
        work.set(xlabel="layer", ylabel="share", ylim=(0, 1.02), xlim=(-0.8, len(layers) - 0.2))
        work.yaxis.set_major_formatter(PERCENT)
        style.legend_above(work, 2)
        fig.savefig(file, format="png", dpi=96)
        return file.getvalue()
