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

from hat_lib.config import CAPACITY_MIN, HatError
from hat_lib.evaluation.coloured_text import PALETTE
from hat_lib.evaluation.routing import layer_map as layer_table
from hat_lib.evaluation.tokens import MATRICES, TokenTable, explain
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting.routing import label, layer_map
from hat_lib.text.plain import check_whole
from hat_lib.workbook.view import CONTROL, ON_RELEASE, View, share_slider

MOST = 128
"""tokens of a prompt; a map of more would be unreadable"""
HERE = Path(__file__).parent
COLOURS = [to_hex(colour) for colour in colormaps[PALETTE](np.linspace(0, 1, 64))]


class TokenMap(anywidget.AnyWidget):
    """The map itself, drawn by ``token_map.js``, which shares these traits."""

    _esm, _css = HERE / "token_map.js", HERE / "token_map.css"
    facts = traitlets.Dict().tag(sync=True)
    """what `map_facts` makes of a prompt"""
    token = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    """the selected cell"""


class TokenMapView(View):
    """A prompt and two sliders → the map of what each token ran in each layer, and everything about the selected token.

    An answer takes two forwards, one of the base and one at the capacity. The model is left at the capacity and exit
    rate it had. ``prompts`` are to choose from, by name; any other can be typed.
    """

    def __init__(self, hat: HierarchicalTransformer, prompts: Mapping[str, str]):
        self._hat = hat
        self.found: TokenTable | None = None
        """behind the map"""
        self.text = Dropdown(description="Text", options=list(prompts.items()), **CONTROL)
        self.prompt = Textarea(self.text.value, description="Prompt", rows=3, **ON_RELEASE)
        self.capacity = share_slider("Capacity", hat.capacity, CAPACITY_MIN)
        self.exit_rate = share_slider("Exit rate", hat.exit_rate)
        self.map = TokenMap()
        self.text.observe(lambda change: setattr(self.prompt, "value", change["new"]), names="value")
        super().__init__([self.prompt, self.capacity, self.exit_rate], self.map)
        self.children = (self.text, *self.children)
        self.answer()

    def _update(self) -> None:
        self._say("busy", "reading the prompt, as the base and as set")
        with self._hat.at(self.capacity.value, self.exit_rate.value):
            self._check_length(self.prompt.value)
            self.found = explain(self._hat, self.prompt.value, scores=True)
        with self.map.hold_sync():
            self.map.token = min(self.map.token, len(self.found.tokens) - 1)
            self.map.facts = map_facts(self.found)
        self._say("ready", self.found.work)

    def _check_length(self, prompt: str) -> None:
        check_whole("the prompt", prompt)
        length = len(self._hat.base.tokenizer(prompt, verbose=False).input_ids)
        if length > MOST:
            raise HatError(f"a map shows up to {MOST} tokens, the prompt has {length}: make it shorter")

    def about(self) -> str:
        """What the view says about the selected token and layer."""
        return self.found.about(self.map.token, self.map.layer)

    def twin(self) -> Figure:
        """The map as a picture."""
        return layer_map(layer_table(self.found, count=MOST))


def map_facts(found: TokenTable) -> dict:
    """What the map draws, as lists: a number for each cell, and the words about each token."""
    free = found.share[:, ~found.tokens["protected"].to_numpy()]
    low, high = np.nanquantile(free, [0.02, 0.98]).tolist() if np.isfinite(free).any() else (0.0, 1.0)
    score = np.full_like(found.site_share, np.nan) if found.score is None else found.score
    facts = {"sites": [MATRICES[site] for site in found.sites], "scored": found.score_meaning, "colours": COLOURS}
    facts |= {"low": low, "high": high}
    facts |= {"share": _lists(found.share), "site_share": _lists(found.site_share), "score": _lists(score)}
    facts["tokens"] = [
        {
            "label": label(row.text),
            "protected": bool(row.protected),
            "headline": found.headline(row.position),
            "lines": found.lines(row.position),
            "means": found.matrices(row.position)["mean"].tolist(),
            "next": found.next_tokens(row.position).map(_percent).to_numpy().tolist(),
            "odds": found.next_p[:, row.position].tolist(),
        }
        for row in found.tokens.itertuples()
    ]
    return facts


def _percent(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1%}"


def _lists(values: np.ndarray) -> list:
    """Nested lists with the axes reversed, and None for nan and infinity, which JSON does not have."""
    values = np.round(values.T.astype(float), 4)
    return np.where(np.isfinite(values), values, None).tolist()
