"""The frontier with a slider: quality, time and the work of each layer, at the measured settings."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from ipywidgets import Image, Layout, SelectionSlider
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from hat_lib.backbone.base import BUNDLED
from hat_lib.config import DATA, work_text
from hat_lib.plotting import frontier
from hat_lib.plotting.style import BLUE, ORANGE, PERCENT, RED, STYLE, WIDE
from hat_lib.rows import results_table as saved
from hat_lib.workbook.view import LOOK, View

SETTING = ["capacity", "exit_rate"]


class FrontierView(View):
    """A slider over the measured settings → a point on the frontier, its numbers, and the work of each layer.

    It stops only at settings, exit rate by exit rate: between them the view would show numbers that were never
    measured.

    Args:
        points: as from `hat_lib.plotting.frontier.points`, including the base.
        layers: rows of `studies.layer_shares`; settings without any are left out.
        claims: rows of `studies.published_claims.Row`, for time. Settings that were not timed are left out;
            if none were, or this is None, only quality is shown.
    """

    def __init__(self, points: pd.DataFrame, layers: pd.DataFrame, claims: pd.DataFrame | None = None):
        self._layers = {setting: rows.sort_values("layer") for setting, rows in layers.groupby(SETTING)}
        self._times = _times(points, claims)
        points = points[[self._whole(setting) for setting in points[SETTING].itertuples(index=False, name=None)]]
        self._points = points.set_index(SETTING).sort_index()
        self._picture = _Picture(points, 1 + int(layers["layer"].max()))
        settings = [(c, e) for e, c in sorted((e, c) for c, e in self._points.index)]
        stops = [(f"{c:.2f}" + (f", exits {e:.2f}" if e else ""), (c, e)) for c, e in settings]
        self.setting = SelectionSlider(description="Capacity", options=stops, value=settings[0], **LOOK)
        self.picture = Image(format="png", layout=Layout(max_width="100%"))
        super().__init__([self.setting], self.picture)
        self._update()

    @classmethod
    def saved(
        cls, results: Path = DATA / "results", granularity: str = "channel", text: str = "docstrings"
    ) -> FrontierView:
        """From the files in the folder ``results``: ``quality.csv``, ``layer_shares.csv`` and, if it exists,
        ``published_claims.csv`` (time).

        Raises `HatError` for a missing file, and if ``quality.csv`` has no row for the grain and text.
        """
        points = frontier.points(saved("quality", results), granularity, text)
        timed = (results / "published_claims.csv").is_file()
        return cls(points, saved("layer_shares", results), saved("published_claims", results) if timed else None)

    def _whole(self, setting: tuple[float, float]) -> bool:
        """Whether everything the view shows was measured at a setting; the base only needs its layers."""
        base = setting == (1.0, 0.0)
        return setting in self._layers and (base or self._times.empty or setting in self._times.index)

    def _update(self, _change=None) -> None:
        with self._told():
            setting = self.setting.value
            self.picture.value = self._picture.at(self._points.loc[setting], self._layers[setting])
            self._say("ready", self._numbers(*setting))

    def _numbers(self, capacity: float, exit_rate: float) -> str:
        row = self._points.loc[capacity, exit_rate]
        said = [work_text(capacity, row["realised"], exit_rate, row["realised_exit"], row["model_share"])]
        file = ", a 4-bit file, dequantised" if row["base"] == BUNDLED else ""
        whose = f"the base's {row['base_ppl']:.2f} ({row['tokens']:,.0f} tokens of {row['text']}{file})"
        if (capacity, exit_rate) == (1.0, 0.0):
            said.append(f"quality: perplexity is {whose}")
        else:
            interval = f"{row['increase_low']:+.1%} to {row['increase_high']:+.1%}"
            said.append(f"quality: perplexity {row['increase']:+.1%} ({interval}) over {whose}")
        if not self._times.empty:
            said.append(f"time: {self._time(capacity, exit_rate)}")
        executed = self._layers[capacity, exit_rate].set_index("layer")["executed"]
        least, most = (f"{executed[i]:.1%} (layer {i})" for i in (executed.idxmin(), executed.idxmax()))
        on = f" (on {self._layers[capacity, exit_rate]['tokens'].iloc[0]:,} tokens)"
        return "<br>".join([*said, f"executed by layer: least {least}, most {most}{on}"])

    def _time(self, capacity: float, exit_rate: float) -> str:
        machine = "{device}, {dtype}, {threads} threads".format(**self._times.iloc[0])
        if (capacity, exit_rate) == (1.0, 0.0):
            return f"our own dense path, which the others are timed against ({machine})"
        row = self._times.loc[capacity, exit_rate]
        ours, plain = row["decode_dense"], row["decode_hf"]
        return f"a token is decoded {ours:.2f}x as fast as dense, {plain:.2f}x as fast as transformers ({machine})"


def _times(points: pd.DataFrame, claims: pd.DataFrame | None) -> pd.DataFrame:
    """The rows of ``claims`` for the grain and base of ``points``, by setting."""
    if claims is None:
        return pd.DataFrame()
    same = ["granularity", "base"]
    return claims[(claims[same] == points.iloc[0][same]).all(axis=1)].set_index(SETTING).sort_index()


class _Picture:
    """Drawn once; after that, only the point, bars and line are redrawn on the stored background, which is fast."""

    def __init__(self, points: pd.DataFrame, n_layers: int):
        with mpl.rc_context(STYLE):
            fig = Figure(figsize=(WIDE, frontier.HEIGHT), dpi=96, layout="constrained")
            self._canvas = FigureCanvasAgg(fig)
            self._cost, self._work = fig.subplots(1, 2)
            frontier.draw(self._cost, points)
            depth = np.arange(n_layers)
            self._bars = self._work.bar(depth, 1.0, color=BLUE, animated=True, label="executed, all tokens").patches
            (self._line,) = self._work.plot(depth, np.ones(n_layers), "s-", color=ORANGE, markersize=3, animated=True)
            self._line.set_label("tokens that had not left")
            self._work.set(xlabel="layer", ylabel="share", ylim=(0, 1.02), xlim=(-0.8, n_layers - 0.2))
            self._work.yaxis.set_major_formatter(PERCENT)
            self._work.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
            ring = {"markersize": 13, "fillstyle": "none", "markeredgewidth": 2.5}
            (self._point,) = self._cost.plot([], [], "o", color=RED, animated=True, **ring)
            self._canvas.draw()
        self._ground = self._canvas.copy_from_bbox(fig.bbox)

    def at(self, row: pd.Series, layers: pd.DataFrame) -> bytes:
        """A PNG file."""
        self._canvas.restore_region(self._ground)
        self._point.set_data([row["model_share"]], [100 * row["increase"]])
        self._cost.draw_artist(self._point)
        for bar, executed in zip(self._bars, layers["executed"], strict=True):
            bar.set_height(executed)
            self._work.draw_artist(bar)
        self._line.set_ydata(layers["entered"])
        self._work.draw_artist(self._line)
        file = BytesIO()
        imsave(file, np.asarray(self._canvas.buffer_rgba()), format="png", pil_kwargs={"compress_level": 1})
        return file.getvalue()
