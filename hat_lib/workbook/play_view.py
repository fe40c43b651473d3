"""The screen as a widget: a kernel answers what it asks::

    PlayView(hat)                              with the prompts of `screen.PRESETS`
    PlayView(hat, {"fox": ("The quick", "")})  with others: name -> a prompt, and what to look for

A notebook keeps the first prompt's answers, so its dial moves without a kernel, too.
"""

from collections.abc import Mapping
from importlib import import_module

import anywidget
import traitlets
from IPython.display import display

from hat_lib.config import HatError
from hat_lib.hat import HierarchicalTransformer
from hat_lib.workbook import screen
from hat_lib.workbook.environment import in_colab
from hat_lib.workbook.play_page import SCRIPT, STYLE


class PlayView(anywidget.AnyWidget):
    """A prompt and a dial; drawn by ``play.js``, which asks a `Screen`."""

    _esm, _css = SCRIPT, STYLE
    presets = traitlets.List().tag(sync=True)
    block = traitlets.Bytes().tag(sync=True)
    """the map of the first prompt"""
    texts = traitlets.Bytes().tag(sync=True)
    """its texts, from `show` on"""

    def __init__(self, hat: HierarchicalTransformer, prompts: Mapping[str, tuple[str, str]] = screen.PRESETS):
        self._screen = screen.Screen(hat)
        presets = [[name, *words] for name, words in prompts.items()]
        super().__init__(presets=presets, block=self._screen.answer({"ask": "map", "prompt": presets[0][1]}))
        self.on_msg(self._asked)

    def _asked(self, _, message: dict, __) -> None:
        try:
            self.send({"id": message["id"]}, [self._screen.answer(message["question"])])
        except (Exception, KeyboardInterrupt) as error:  # Jupyter hides them in a log that nobody reads
            words = str(error) if isinstance(error, HatError) else f"{type(error).__name__}: {error}"
            self.send({"id": message["id"], "error": words})

    def show(self) -> None:
        """Display it. On Colab, the page is first told to load ipywidgets 8, which it does not include."""
        if in_colab():
            import_module("google.colab.output").enable_custom_widget_manager()
        display(self)
        self.texts = self._screen.answer({"ask": "texts", "prompt": self.presets[0][1]})

    def __repr__(self) -> str:  # what pages that run nothing show in its place, and notebooks that are not trusted
        return f"{type(self).__name__}: run this cell, or trust this notebook, to use it"
