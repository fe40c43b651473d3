"""What the interactive views share: how one is shown, its status line, and how it reports an error.

Jupyter hides the exceptions of a widget's callback in a log that nobody reads, so a view shows them in its status line.
"""

from __future__ import annotations

from html import escape
from importlib import import_module

from IPython.display import display
from ipywidgets import HTML, FloatSlider, Layout, VBox, Widget

from hat_lib.config import HatError
from hat_lib.workbook.environment import in_colab

CONTROL = {"style": {"description_width": "7em"}, "layout": Layout(width="min(32em, 95%)")}
ON_RELEASE = {"continuous_update": False, **CONTROL}
"""for controls that answer only when released, because each answer runs the model"""


def show(view: Widget) -> None:
    """Display a view. On Colab, the page is first told to load ipywidgets 8, which it does not include."""
    if in_colab():
        import_module("google.colab.output").enable_custom_widget_manager()
    display(view)


class View(VBox):
    """Controls, a status line, and what they lead to. A subclass updates them in `_update`."""

    words = ""
    """the status line as text"""

    def __init__(self, controls: list[Widget], *outputs: Widget):
        self.status = HTML()
        for control in controls:
            control.observe(self.answer, names="value")
        super().__init__([*controls, self.status, *outputs])

    def answer(self, _change=None) -> None:
        """Update the view, whenever a control changes; an exception, such as that of the stop button, is its status."""
        try:
            self._update()
        except (HatError, KeyboardInterrupt) as error:
            self._say("error", str(error) or "interrupted")
        except Exception as error:
            self._say("error", f"{type(error).__name__}: {error}")

    def _say(self, state: str, words: str) -> None:
        """Set the status: ready, busy or error, and its text. Screen readers announce it."""
        self.words = words
        sign = {"error": "⚠ ", "busy": "⏳ "}.get(state, "")
        text = escape(words).replace("\n", "<br>")
        self.status.value = f'<div role="status" data-state="{state}" style="line-height:1.5">{sign}{text}</div>'

    def __repr__(self) -> str:  # what pages that run nothing show in its place
        return f"{type(self).__name__}: run this cell to use it"


def share_slider(description: str, value: float, least: float = 0.0) -> FloatSlider:
    return FloatSlider(value, min=least, max=1.0, step=0.01, description=description, **ON_RELEASE)
