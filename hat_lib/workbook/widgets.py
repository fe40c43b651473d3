"""Interactive views for notebooks: the frontier, live generation, and where compute goes. Each has a static figure.

    widgets.show(widgets.FrontierView.saved())                  static: plotting.frontier.twin
    widgets.show(widgets.GenerateView(AdaptiveInference(hat)))  static: its twin()
    widgets.show(widgets.RoutingView(patterns(hat, blocks)))    static: plotting.routing.layer_map

They are plain ipywidgets with pictures as PNG and text as HTML, so they need no front-end parts of their own, in
JupyterLab, Notebook 7, Colab and Voila. A page that runs nothing, such as GitHub's, shows none of them. Sliders have a
description and a visible value, and move with the arrow keys; Notebook 7 takes these for itself and leaves Home, End,
Page Up and Page Down.

Jupyter hides an exception in a widget's callback: it goes to a log that nobody reads. So every callback here runs
inside `_told`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import display
from ipywidgets import (
    HTML,
    Button,
    Dropdown,
    FloatSlider,
    GridBox,
    Image,
    Layout,
    SelectionSlider,
    Textarea,
    VBox,
    Widget,
)  # fmt: skip
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from hat_lib.backbone.base import BUNDLED
from hat_lib.config import CAPACITY_MIN, DATA, HatError, work_said
from hat_lib.evaluation.routing import Patterns
from hat_lib.experiments.common import saved
from hat_lib.inference.generate import MODES, AdaptiveInference, Generation
from hat_lib.inference.speed import SpeedCurve
from hat_lib.plotting import frontier
from hat_lib.plotting.style import BLUE, ORANGE, PERCENT, RED, STYLE, WIDE
from hat_lib.plotting.token_heatmap import Passage, figure, html, visible
from hat_lib.text.token_classes import pieces
from hat_lib.workbook.environment import in_colab

LOOK = {"style": {"description_width": "7em"}, "layout": Layout(width="min(32em, 95%)")}
DENSE = {"capacity": 1.0, "exit_rate": 0.0}
MEANING = "work that chose the token, as a share of the dense model's"
PLAIN = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5"
SHOWN = 200
"""tokens of a text that `RoutingView` shows"""
ALL = "all"


def show(view: Widget) -> None:
    """Display a view, with a line in its place on pages that run nothing.

    On Colab the page is first told to load ipywidgets 8, which it does not bring along.
    """
    if in_colab():
        import_module("google.colab.output").enable_custom_widget_manager()
    bundle = view._repr_mimebundle_()
    display(bundle | {"text/plain": f"{type(view).__name__}: run this cell to use it"}, raw=True)


class View(VBox):
    """Controls, a line ``said`` on what they found, and what they show; `_update` answers when a control moves."""

    def __init__(self, controls: list[Widget], *shown: Widget):
        self.said = HTML()
        for control in controls:
            control.observe(self._update, names="value")
        super().__init__([*controls, self.said, *shown])

    def _say(self, state: str, message: str) -> None:
        """``message`` is HTML, ``state`` ready, busy or error. Screen readers read it out as it changes."""
        sign = {"error": "⚠ ", "busy": "⏳ "}.get(state, "")
        self.said.value = f'<div role="status" data-state="{state}">{sign}{message}</div>'

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Context of a callback that says in place of an exception what went wrong.

        `KeyboardInterrupt` too: the kernel's stop button ends a long callback, and the view stays usable.
        """
        try:
            yield
        except HatError as error:
            self._say("error", escape(str(error)))
        except KeyboardInterrupt:
            self._say("error", "interrupted")
        except Exception as error:
            self._say("error", escape(f"{type(error).__name__}: {error}"))


class FrontierView(View):
    """Two sliders over what was measured → a point on the frontier, its numbers, and the work of each layer.

    A slider stops where something was measured and nowhere else: between two measurements the view would show a number
    that nobody has seen.

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
        self._claims = claims
        self._picture = _Picture(points, 1 + int(layers["layer"].max()))
        capacities, rates = (sorted(points[name].unique()) for name in ("capacity", "exit_rate"))
        first = points.loc[points["exit_rate"] == rates[0], "capacity"]
        self.capacity = _stops("Capacity", capacities, first.iloc[len(first) // 2])
        self.exit_rate = _stops("Exit rate", rates, rates[0])
        self.picture = Image(format="png", layout=Layout(max_width="100%"))
        super().__init__([self.capacity, self.exit_rate], self.picture)
        self._update()

    @classmethod
    def saved(
        cls, results: Path = DATA / "results", granularity: str = "channel", text: str = "docstrings"
    ) -> FrontierView:
        """From the files in the folder ``results``: ``quality.csv``, ``layer_shares.csv`` and, if it is there,
        ``published_claims.csv`` (speed).

        Raises `HatError` for a missing file, and where the sweep has no row for the grain and text.
        """
        points = frontier.points(saved("quality", results), granularity, text)
        timed = (results / "published_claims.csv").is_file()
        return cls(points, saved("layer_shares", results), saved("published_claims", results) if timed else None)

    def _update(self, _change=None) -> None:
        with self._told():
            capacity, exit_rate = setting = self.capacity.value, self.exit_rate.value
            row = self._points.loc[setting] if setting in self._points.index else None
            layers = self._layers.get(setting)
            self.picture.value = self._picture.at(row, layers)
            if row is None:
                there = ", ".join(f"{c:.2f}" for c, e in self._points.index if e == exit_rate)
                text = f"capacity {capacity:.2f} was not measured with exit rate {exit_rate:.2f}; there are: {there}"
            else:
                text = self._numbers(capacity, exit_rate, row)
            if layers is not None:
                executed = layers.set_index("layer")["executed"]
                least, most = (f"{executed[i]:.1%} (layer {i})" for i in (executed.idxmin(), executed.idxmax()))
                text += f"<br>executed by layer: least {least}, most {most}"
            self._say("ready", text)

    def _numbers(self, capacity: float, exit_rate: float, row: pd.Series) -> str:
        work = work_said(capacity, row["realised"], exit_rate, row["realised_exit"], row["model_share"])
        interval = f"{row['increase_low']:+.1%} to {row['increase_high']:+.1%}"
        file = " (a 4-bit file, dequantised)" if row["base"] == BUNDLED else ""
        return (
            f"{work}<br>perplexity {row['ppl']:.2f}, base {row['base_ppl']:.2f}{file}: {row['increase']:+.1%} "
            f"({interval})<br>decode: {self._speed(capacity, exit_rate, row)}"
        )

    def _speed(self, capacity: float, exit_rate: float, row: pd.Series) -> str:
        """Over our own dense path: measured, or without exits also between two measurements."""
        measured, claims = {}, self._claims
        if claims is not None:
            here = claims[(claims[["granularity", "base"]] == row[["granularity", "base"]]).all(axis=1)]
            here = here[here["exit_rate"] == exit_rate]
            measured = dict(zip(here["capacity"], here["decode_dense"], strict=True))
        if measured and not exit_rate:
            measured.setdefault(1.0, 1.0)  # what it is held against
        if not measured or (capacity not in measured and (exit_rate or capacity < min(measured))):
            return "no speed was measured near this setting (hat reproduce published_claims)"
        machine = "{device}, {dtype}, {threads} threads".format(**here.iloc[-1])
        found = SpeedCurve("dense", exit_rate, sorted(measured), [measured[c] for c in sorted(measured)], machine)
        return f"predicted speedup {found.at(capacity):.2f}x over our own dense path ({machine})"


def _stops(description: str, values: list[float], value: float) -> SelectionSlider:
    """A slider over the given values alone."""
    return SelectionSlider(description=description, options=[(f"{v:.2f}", v) for v in values], value=value, **LOOK)


class _Picture:
    """Drawn once; for each point only the point and the bars are drawn anew on the kept ground, which is fast."""

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


class GenerateView(View):
    """A prompt, two sliders and a mode → text coloured by compute, beside the dense model's.

    Nothing runs until the button is pressed or a control is changed. Sliders answer when they are let go: each answer
    runs the model for seconds, and the status says so. What is moved meanwhile is answered next, at its last value.

    Args:
        infer: its model is left, after each answer, at the capacity and exit rate that it had.
        prompt: to begin with.
        max_new_tokens: of each answer.
    """

    def __init__(self, infer: AdaptiveInference, prompt: str = "The future of AI is", max_new_tokens: int = 32):
        self._infer, self._tokens = infer, max_new_tokens
        self._dense: tuple[str, Generation] | None = None
        self._found: Generation | None = None
        hat, how = infer.hat, {"continuous_update": False, **LOOK}
        self.prompt = Textarea(prompt, description="Prompt", rows=3, **how)
        self.capacity = FloatSlider(hat.capacity, min=CAPACITY_MIN, max=1.0, step=0.01, description="Capacity", **how)
        self.exit_rate = FloatSlider(hat.exit_rate, min=0.0, max=1.0, step=0.01, description="Exit rate", **how)
        self.mode = Dropdown(description="Mode", options=MODES, **LOOK)
        self.button = Button(description="Generate", button_style="primary")
        self.button.on_click(self._update)
        self.adaptive, self.dense = HTML(), HTML()
        sides = GridBox([self.adaptive, self.dense], layout=Layout(grid_template_columns="1fr 1fr", grid_gap="1em"))
        super().__init__([self.prompt, self.capacity, self.exit_rate, self.mode, self.button], sides)
        self._say("ready", "press Generate, or move a slider")

    def _update(self, _event=None) -> None:
        # The button alone: clicks would queue up, while of a control's values ipywidgets sends the last. And what is
        # switched off loses its keys to the notebook, where an arrow folds the section away.
        self.button.disabled = True
        self._say("busy", "generating …")
        settings = {"capacity": self.capacity.value, "exit_rate": self.exit_rate.value, "mode": self.mode.value}
        with self._told():
            self.adaptive.value = self.dense.value = ""
            self._found = None
            if self._dense is None:  # the first tokens of a process are slow, and speeds are to be compared
                self._generate(2, **DENSE)
                self._generate(2, **settings)
            if self._dense is None or self._dense[0] != self.prompt.value:
                self._dense = self.prompt.value, self._generate(self._tokens, **DENSE)
            dense, found = self._dense[1], self._generate(self._tokens, **settings)
            self._found = found
            self.dense.value = _plain("dense", dense)
            coloured = found.mode == "adaptive"
            self.adaptive.value = html(self._passage(found), meaning=MEANING) if coloured else _plain(found.mode, found)
            self._say("ready", _compared(found, dense))
        self.button.disabled = False

    def _generate(self, tokens: int, **settings) -> Generation:
        return self._infer.generate(self.prompt.value, max_new_tokens=tokens, measure=False, **settings)

    def _passage(self, found: Generation) -> Passage:
        ids = found.ids[0, found.prompt_length :].tolist()
        settings = f"capacity {found.requested_capacity:.2f}, exit rate {found.requested_exit_rate:.2f}"
        values = np.full(len(ids), np.nan)
        if found.token_share is not None:
            values = found.token_share[0, found.prompt_length - 1 :].numpy(force=True)
        return Passage(f"{found.mode}, {settings}", pieces(self._infer.hat.base.tokenizer, ids), values.tolist())

    def twin(self) -> Figure:
        """The last answer, and the dense text without colours. Raises `HatError` where there is none."""
        if self._found is None:
            raise HatError("no answer to draw: press Generate first")
        ours, dense = self._passage(self._found), self._passage(self._dense[1])
        known = np.array(ours.values)[~np.isnan(ours.values)]
        low, high = (known.min(), known.max()) if len(known) and known.min() < known.max() else (0.0, 1.0)
        plain = Passage("dense", dense.tokens, [np.nan] * len(dense.tokens))
        return figure(ours, plain, meaning=MEANING, low=float(low), high=float(high))


def _plain(title: str, found: Generation) -> str:
    """Text for whose tokens there is one work, or none that could be told."""
    return f'<div style="{PLAIN}"><p><strong>{title}</strong><br>{escape(visible(found.texts[0]))}</p></div>'


def _compared(found: Generation, dense: Generation) -> str:
    new, base = (g.ids[0, g.prompt_length :].tolist() for g in (found, dense))
    same = len(os.path.commonprefix([new, base]))
    drafts = "" if np.isnan(found.acceptance) else f"; {found.acceptance:.0%} of the drafts accepted"
    requested = found.requested_capacity, found.capacity, found.requested_exit_rate, found.exit_rate
    return (
        f"{found.mode}: {found.tokens_per_second:.1f} tokens/s; dense: {dense.tokens_per_second:.1f} tokens/s<br>"
        f"{work_said(*requested, found.model_share)}<br>"
        f"the first {same} of {len(new)} tokens are the dense model's{drafts}"
    )


class RoutingView(View):
    """Text × layer → the text coloured by executed share, and what that layer does with it.

    Everything was measured before, so an answer takes milliseconds and no model.

    Args:
        found: `hat_lib.evaluation.routing.patterns` of one or several texts, told apart by ``doc``.
    """

    def __init__(self, found: Patterns):
        self._tokens, self._share = found.tokens, found.share
        free = self._share[:, ~self._tokens["protected"].to_numpy()]
        low, high = np.nanquantile(free, [0.02, 0.98]) if np.isfinite(free).any() else (0.0, 1.0)
        self._scale = {"low": float(low), "high": float(high)}
        self.text = Dropdown(description="Text", options=list(self._tokens["doc"].unique()), **LOOK)
        self.layer = SelectionSlider(description="Layer", options=[ALL, *range(len(self._share))], **LOOK)
        self.shown = HTML()
        super().__init__([self.text, self.layer], self.shown)
        self._update()

    def _update(self, _change=None) -> None:
        with self._told():
            rows = np.flatnonzero(self._tokens["doc"] == self.text.value)
            part = self._tokens.iloc[rows]
            if self.layer.value == ALL:
                where, values = "all layers", part["share"].to_numpy()
            else:
                where, values = f"layer {self.layer.value}", self._share[self.layer.value, rows]
            passage = Passage(str(self.text.value), part["text"].tolist()[:SHOWN], values[:SHOWN].tolist())
            self.shown.value = html(passage, meaning=f"executed share in {where}", **self._scale)
            self._say("ready", _by_class(part, values, where))


def _by_class(part: pd.DataFrame, values: np.ndarray, where: str) -> str:
    free = ~part["protected"].to_numpy() & np.isfinite(values)
    left = int(np.isnan(values).sum())
    gone = f"; {left} of {len(part)} tokens had left before it" if left else ""
    if not free.any():
        return f"{where}: no token to route{gone}"
    classes = pd.Series(values[free]).groupby(part["class"].to_numpy()[free]).mean()
    ends = f"least {classes.idxmin()} {classes.min():.1%}, most {classes.idxmax()} {classes.max():.1%}"
    return f"{where}: mean executed share {values[free].mean():.1%}; by class {ends}{gone}"
