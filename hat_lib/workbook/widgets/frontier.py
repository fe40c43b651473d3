"""The frontier at the end of two sliders: capacity × exit rate → what it costs, where the work is, how fast it is.

Everything is read from ``data/results``: `quality.csv` (perplexity), `layer_shares.csv` (executed share by layer) and,
where it exists, `published_claims.csv` (speed). A slider stops where something was measured and nowhere else: between
two measurements the view would show a number that nobody has seen. Its
static twin is `hat_lib.plotting.frontier.twin`.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from ipywidgets import HTML, Image, Layout, VBox
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from hat_lib.backbone.base import BUNDLED
from hat_lib.config import DATA, HatError
from hat_lib.inference.speed import SpeedCurve
from hat_lib.plotting import frontier
from hat_lib.plotting.style import BLUE, ORANGE, RED, STYLE, percent
from hat_lib.plotting.training import WIDE
from hat_lib.workbook.widgets.parts import say, stops, told

DPI = 96  # dots per inch


class FrontierView(VBox):
    """Two sliders over what was measured → a point on the frontier, its numbers, and the work of each layer.

    Args:
        points: as from `hat_lib.plotting.frontier.points`.
        layers: rows of `hat_lib.experiments.layer_shares`; a setting that is not in it has no bars.
        claims: rows of `hat_lib.experiments.published_claims.Row`, for speed; None where nothing was timed.
    """

    def __init__(self, points: pd.DataFrame, layers: pd.DataFrame, claims: pd.DataFrame | None = None):
        self._points = points.set_index(["capacity", "exit_rate"]).sort_index()
        self._layers = {
            setting: rows.sort_values("layer") for setting, rows in layers.groupby(["capacity", "exit_rate"])
        }
        self._speed = _Speed(claims, points)
        self._picture = _Picture(points, 1 + int(layers["layer"].max()))
        capacities, rates = (sorted(points[name].unique()) for name in ("capacity", "exit_rate"))
        first = points.loc[points["exit_rate"] == rates[0], "capacity"]
        self.capacity = stops("Capacity", capacities, first.iloc[len(first) // 2])
        self.exit_rate = stops("Exit rate", rates, rates[0])
        self.said, self.picture = HTML(), Image(format="png", layout=Layout(max_width="100%"))
        for slider in (self.capacity, self.exit_rate):
            slider.observe(self._update, names="value")
        self._update()
        super().__init__([self.capacity, self.exit_rate, self.said, self.picture])

    @classmethod
    def saved(
        cls, results: Path = DATA / "results", granularity: str = "channel", text: str = "docstrings"
    ) -> FrontierView:
        """From the files in the folder ``results``: ``quality.csv``, ``layer_shares.csv`` and, if it is there, speed.

        Raises `HatError` for a missing file, and where the sweep has no row for the grain and text.
        """
        tables = {name: _read(results / f"{name}.csv") for name in ("quality", "layer_shares", "published_claims")}
        for name in ("quality", "layer_shares"):
            if tables[name] is None:
                raise HatError(f"no {results / name}.csv: it is made by `hat reproduce {name}`")
        points = frontier.points(tables["quality"], granularity, text)
        return cls(points, tables["layer_shares"], tables["published_claims"])

    def _update(self, _change=None) -> None:
        with told(self.said):
            setting = self.capacity.value, self.exit_rate.value
            row = self._points.loc[setting] if setting in self._points.index else None
            layers = self._layers.get(setting)
            self.picture.value = self._picture.at(row, layers)
            text = self._lacking(*setting) if row is None else self._numbers(*setting, row)
            say(self.said, "ready", text if layers is None else f"{text}<br>{_by_layer(layers)}")

    def _numbers(self, capacity: float, exit_rate: float, row: pd.Series) -> str:
        interval = f"{row['increase_low']:+.1%} to {row['increase_high']:+.1%}"
        file = " (a 4-bit file, dequantised)" if row["base"] == BUNDLED else ""
        return (
            f"capacity {capacity:.2f} requested, {row['realised']:.3f} realised; exit rate {exit_rate:.2f} requested, "
            f"{row['realised_exit']:.3f} realised; model share {row['model_share']:.3f}<br>"
            f"perplexity {row['ppl']:.2f}, base {row['base_ppl']:.2f}{file}: {row['increase']:+.1%} ({interval})<br>"
            f"decode: {self._speed.at(capacity, exit_rate)}"
        )

    def _lacking(self, capacity: float, exit_rate: float) -> str:
        there = ", ".join(f"{c:.2f}" for c, e in self._points.index if e == exit_rate)
        return f"capacity {capacity:.2f} was not measured with exit rate {exit_rate:.2f}; there are: {there}"


def _read(path: Path) -> pd.DataFrame | None:
    return pd.read_csv(path) if path.is_file() else None


def _by_layer(layers: pd.DataFrame) -> str:
    executed = layers.set_index("layer")["executed"]
    least, most = (f"{executed[i]:.1%} (layer {i})" for i in (executed.idxmin(), executed.idxmax()))
    return f"executed by layer: least {least}, most {most}"


class _Speed:
    """Decode speedup over our own dense path: measured, or without exits also between two measurements."""

    def __init__(self, claims: pd.DataFrame | None, points: pd.DataFrame):
        self._rows = pd.DataFrame()
        if claims is not None:
            grain, base = points[["granularity", "base"]].iloc[0]
            self._rows = claims[(claims["granularity"] == grain) & (claims["base"] == base)]

    def at(self, capacity: float, exit_rate: float) -> str:
        here = self._rows[self._rows["exit_rate"] == exit_rate] if len(self._rows) else self._rows
        measured = dict(zip(here["capacity"], here["decode_dense"], strict=True)) if len(here) else {}
        if measured and not exit_rate:
            measured.setdefault(1.0, 1.0)  # what it is held against
        if not measured or (capacity not in measured and (exit_rate or capacity < min(measured))):
            return "no speed was measured near this setting (hat reproduce published_claims)"
        machine = "{device}, {dtype}, {threads} threads".format(**here.iloc[-1])
        found = SpeedCurve("dense", exit_rate, sorted(measured), [measured[c] for c in sorted(measured)], machine)
        return f"predicted speedup {found.at(capacity):.2f}x over our own dense path ({machine})"


class _Picture:
    """Drawn once; for each point only the point and the bars are drawn anew on the kept ground, which is fast."""

    def __init__(self, points: pd.DataFrame, n_layers: int):
        with mpl.rc_context(STYLE):
            fig = Figure(figsize=(WIDE, frontier.HEIGHT), dpi=DPI, layout="constrained")
            self._canvas = FigureCanvasAgg(fig)
            self._cost, self._work = fig.subplots(1, 2)
            frontier.draw(self._cost, points)
            depth = np.arange(n_layers)
            bars = self._work.bar(depth, np.ones(n_layers), color=BLUE, animated=True, label="executed, all tokens")
            (line,) = self._work.plot(depth, np.ones(n_layers), "s-", color=ORANGE, markersize=3, animated=True)
            line.set_label("tokens that had not left")
            self._work.set(xlabel="layer", ylabel="share", ylim=(0, 1.02), xlim=(-0.8, n_layers - 0.2))
            self._work.yaxis.set_major_formatter(percent())
            self._work.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
            (point,) = self._cost.plot([], [], "o", color=RED, markersize=13, fillstyle="none", markeredgewidth=2.5)
            point.set_animated(True)
            self._canvas.draw()
        self._bars, self._line, self._point = bars.patches, line, point
        self._ground = self._canvas.copy_from_bbox(fig.bbox)

    def at(self, row: pd.Series | None, layers: pd.DataFrame | None) -> bytes:
        """A PNG file; without a row there is no point, without layers there are no bars."""
        self._canvas.restore_region(self._ground)
        if row is not None:
            self._point.set_data([row["model_share"]], [100 * row["increase"]])
            self._cost.draw_artist(self._point)
        if layers is not None:
            for bar, executed in zip(self._bars, layers["executed"], strict=True):
                bar.set_height(executed)
                self._work.draw_artist(bar)
            self._line.set_ydata(layers["entered"])
            self._work.draw_artist(self._line)
        file = BytesIO()
        imsave(file, np.asarray(self._canvas.buffer_rgba()), format="png", pil_kwargs={"compress_level": 1})
        return file.getvalue()
