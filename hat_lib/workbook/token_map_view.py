"""A map of the work, token by layer: hover over a cell for its share, pick a token to see what it ran and led to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from ipywidgets import Dropdown, Textarea
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from hat_lib.evaluation.coloured_text import PALETTE
from hat_lib.evaluation.token_facts import TokenFacts, token_facts
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting.routing import label, layer_map
from hat_lib.workbook.view import LET_GO, LOOK, View, capacity_slider, exit_slider

HERE = Path(__file__).parent
COLOURS = [to_hex(colour) for colour in colormaps[PALETTE](np.linspace(0, 1, 64))]


class TokenMap(anywidget.AnyWidget):
    """The map itself, drawn by ``token_map.js``, which shares these traits."""

    _esm, _css = HERE / "token_map.js", HERE / "token_map.css"
    facts = traitlets.Dict().tag(sync=True)
    """what `drawn` makes of a prompt"""
    token = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    """the selected cell"""


class TokenMapView(View):
    """A prompt and two sliders → the map of what each token ran in each layer, and everything about the selected token.

    An answer takes two forwards, one of the base and one at the capacity.

    Args:
        hat: after each answer, left at the capacity and exit rate it had.
        prompts: to choose from, by name; any other can be typed.
    """

    def __init__(self, hat: HierarchicalTransformer, prompts: Mapping[str, str]):
        self._hat = hat
        self.found: TokenFacts | None = None
        """behind the map"""
        self.text = Dropdown(description="Text", options=list(prompts.items()), **LOOK)
        self.prompt = Textarea(self.text.value, description="Prompt", rows=3, **LET_GO)
        self.capacity, self.exit_rate = capacity_slider(hat.capacity), exit_slider(hat.exit_rate)
        self.map = TokenMap()
        self.text.observe(lambda change: setattr(self.prompt, "value", change["new"]), names="value")
        super().__init__([self.prompt, self.capacity, self.exit_rate], self.map)
        self.children = (self.text, *self.children)
        self._update()

    def _update(self, _change=None) -> None:
        with self._told():
            self._say("busy", "reading the prompt, as the base and as set")
            with self._hat.at(self.capacity.value, self.exit_rate.value):
                self.found = token_facts(self._hat, self.prompt.value)
            length = len(self.found.explanation.tokens)
            with self.map.hold_sync():
                self.map.token, self.map.facts = min(self.map.token, length - 1), drawn(self.found)
            self._say("ready", self.found.work)

    def about(self) -> str:
        """What the view says about the selected token and layer."""
        return self.found.about(self.map.token, self.map.layer)

    def twin(self) -> Figure:
        """The map as a picture."""
        return layer_map(self.found.explanation.layer_map())


def drawn(found: TokenFacts) -> dict:
    """What the map draws, as lists: a number for each cell, and the words about each token."""
    tokens = found.explanation.tokens
    free = found.share[:, ~tokens["protected"].to_numpy()]
    low, high = np.nanquantile(free, [0.02, 0.98]) if np.isfinite(free).any() else (0.0, 1.0)
    return {
        "sites": found.sites,
        "scored": found.scored,
        "colours": COLOURS,
        "low": float(low),
        "high": float(high),
        "share": _lists(found.share.T),
        "site_share": _lists(found.site_share.transpose(2, 1, 0)),
        "score": _lists(found.score.transpose(2, 1, 0)),
        "tokens": [
            {
                "label": label(row.token),
                "protected": bool(row.protected),
                "headline": found.headline(row.position),
                "lines": found.lines(row.position),
                "means": found.matrices(row.position)["mean"].tolist(),
                "next": found.next_tokens(row.position).to_numpy().tolist(),
                "odds": [[p for _, p in side[row.position]] for side in (found.base_next, found.hat_next)],
            }
            for row in tokens.itertuples()
        ],
    }


def _lists(values: np.ndarray) -> list:
    """Nested lists, with None for nan and infinity, which JSON does not have."""
    values = np.round(values.astype(float), 4)
    return np.where(np.isfinite(values), values, None).tolist()
