"""The screen as a widget: a kernel answers what it asks.

    PlayView(hat)                              with the prompts of `play.PRESETS`
    PlayView(hat, {"fox": ("The quick", "")})  with others: name -> a prompt, and what to look for

A page that runs nothing, such as GitHub's, shows `map_figure` and `text_figure` in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import anywidget
import traitlets
from IPython.display import display
from matplotlib.figure import Figure

from hat_lib.config import HatError
from hat_lib.evaluation.coloured_text import Passage
from hat_lib.evaluation.routing import layer_map
from hat_lib.evaluation.tokens import explain
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import routing, token_heatmap
from hat_lib.workbook import play
from hat_lib.workbook.environment import in_colab

HERE = Path(__file__).parent
SCALE = {"meaning": "framed: first token unlike dense; share of the dense work:", "low": 0.0, "high": 1.0}


class PlayView(anywidget.AnyWidget):
    """A prompt and a dial; drawn by ``play.js``, which asks `hat_lib.workbook.play.answer`."""

    _esm, _css = HERE / "play.js", HERE / "play.css"
    presets = traitlets.List().tag(sync=True)
    block = traitlets.Bytes().tag(sync=True)
    """the map of the first prompt"""

    def __init__(self, hat: HierarchicalTransformer, prompts: Mapping[str, tuple[str, str]] = play.PRESETS):
        self._hat = hat
        presets = [[name, prompt, hint] for name, (prompt, hint) in prompts.items()]
        super().__init__(presets=presets, block=play.answer(hat, {"ask": "map", "prompt": presets[0][1]}))
        self.on_msg(self._asked)

    def _asked(self, _, message: dict, __) -> None:
        try:
            self.send({"id": message["id"]}, [play.answer(self._hat, message["question"])])
        except (Exception, KeyboardInterrupt) as error:  # Jupyter hides them in a log that nobody reads
            words = str(error) if isinstance(error, HatError) else f"{type(error).__name__}: {error}"
            self.send({"id": message["id"], "error": words})

    def show(self) -> None:
        """Display it. On Colab, the page is first told to load ipywidgets 8, which it does not include."""
        if in_colab():
            import_module("google.colab.output").enable_custom_widget_manager()
        display(self)

    def __repr__(self) -> str:  # what pages that run nothing show in its place
        return f"{type(self).__name__}: run this cell to use it"


def map_figure(hat: HierarchicalTransformer, prompt: str) -> Figure:
    """The map of a prompt as a picture, as ``hat`` is set."""
    return routing.layer_map(layer_map(explain(hat, prompt), count=play.MOST))


def text_figure(
    hat: HierarchicalTransformer, prompt: str, capacities: Sequence[float] = (1.0, 0.7, 0.55, 0.4)
) -> Figure:
    """Texts that go on from a prompt as a picture, at some of `play.CAPACITIES`."""
    known = {text["capacity"]: text for text in play.texts(hat, prompt)}
    passages = []
    for capacity in capacities:
        name, text = "dense" if capacity == 1 else f"capacity {capacity:.2f}", known[capacity]
        passages.append(Passage(name, text["tokens"], text["work"], text["differs"]))
    return token_heatmap.figure(*passages, **SCALE)
