"""The routing explorer: pick a text and a layer, and see what each token executed there.

Everything was measured before (`hat_lib.evaluation.routing.patterns`), so an answer takes milliseconds and no model.
Its static twin is `hat_lib.plotting.routing.layer_map`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from ipywidgets import HTML, Dropdown, Layout, SelectionSlider, VBox

from hat_lib.evaluation.routing import Patterns
from hat_lib.plotting.token_heatmap import Passage, html
from hat_lib.workbook.widgets.parts import WIDE, say, told

SHOWN = 200
"""tokens of a text that are shown"""
ALL = "all"


class RoutingView(VBox):
    """Text × layer → the text coloured by executed share, and what that layer does with it.

    Args:
        found: of one or several texts, told apart by ``doc``.
    """

    def __init__(self, found: Patterns):
        self._tokens, self._share = found.tokens, found.share
        free = self._share[:, ~self._tokens["protected"].to_numpy()]
        low, high = np.nanquantile(free, [0.02, 0.98]) if np.isfinite(free).any() else (0.0, 1.0)
        self._scale = {"low": float(low), "high": float(high)}
        docs = list(self._tokens["doc"].unique())
        self.text = Dropdown(description="Text", options=docs, style=WIDE)
        layers = [ALL, *range(len(self._share))]
        wide = Layout(width="min(32em, 95%)")
        self.layer = SelectionSlider(description="Layer", options=layers, style=WIDE, layout=wide)
        self.said, self.shown = HTML(), HTML()
        for control in (self.text, self.layer):
            control.observe(self._update, names="value")
        self._update()
        super().__init__([self.text, self.layer, self.said, self.shown])

    def _update(self, _change=None) -> None:
        with told(self.said):
            rows = np.flatnonzero(self._tokens["doc"] == self.text.value)
            part = self._tokens.iloc[rows]
            if self.layer.value == ALL:
                where, values = "all layers", part["share"].to_numpy()
            else:
                where, values = f"layer {self.layer.value}", self._share[self.layer.value, rows]
            passage = Passage(str(self.text.value), part["text"].tolist()[:SHOWN], values[:SHOWN].tolist())
            self.shown.value = html(passage, meaning=f"executed share in {where}", **self._scale)
            say(self.said, "ready", _summary(part, values, where))


def _summary(part: pd.DataFrame, values: np.ndarray, where: str) -> str:
    free = ~part["protected"].to_numpy() & np.isfinite(values)
    left = int(np.isnan(values).sum())
    gone = f"; {left} of {len(part)} tokens had left before it" if left else ""
    if not free.any():
        return f"{where}: no token to route{gone}"
    classes = pd.Series(values[free]).groupby(part["class"].to_numpy()[free]).mean()
    ends = f"least {classes.idxmin()} {classes.min():.1%}, most {classes.idxmax()} {classes.max():.1%}"
    return f"{where}: mean executed share {values[free].mean():.1%}; by class {ends}{gone}"
