"""What the interactive views share: how one is shown, how it says what it found, and how it reports an error.

Sliders have a description and a visible value, and move with the arrow keys; Notebook 7 takes those for itself and
leaves Home, End, Page Up and Page Down. Jupyter hides exceptions in a widget's callback in a log that nobody reads, so
every callback runs inside `View._told`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape, unescape
from importlib import import_module

from IPython.display import display
from ipywidgets import HTML, FloatSlider, Layout, VBox, Widget

from hat_lib.config import CAPACITY_MIN, HatError
from hat_lib.workbook.environment import in_colab

LOOK = {"style": {"description_width": "7em"}, "layout": Layout(width="min(32em, 95%)")}
LET_GO = {"continuous_update": False, **LOOK}
"""for controls that answer only when released, because each answer runs the model"""


def show(view: Widget) -> None:
    """Display a view, or a line in its place on pages that run nothing.

    On Colab, the page is first told to load ipywidgets 8, which it does not include.
    """
    if in_colab():
        import_module("google.colab.output").enable_custom_widget_manager()
    bundle = view._repr_mimebundle_()
    display(bundle | {"text/plain": f"{type(view).__name__}: run this cell to use it"}, raw=True)


class View(VBox):
    """Controls, a line ``said`` about what they found, and what they show; `_update` answers when a control moves."""

    def __init__(self, controls: list[Widget], *shown: Widget):
        self.said = HTML()
        for control in controls:
            control.observe(self._update, names="value")
        super().__init__([*controls, self.said, *shown])

    @property
    def words(self) -> str:
        """What ``said`` says, as text."""
        return unescape(re.sub("<[^>]*>", "", self.said.value.replace("<br>", "\n")))

    def _say(self, state: str, message: str) -> None:
        """``message`` is HTML, ``state`` is ready, busy or error. Screen readers announce it when it changes."""
        sign = {"error": "⚠ ", "busy": "⏳ "}.get(state, "")
        self.said.value = f'<div role="status" data-state="{state}" style="line-height:1.5">{sign}{message}</div>'

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Context for a callback that says what went wrong instead of raising an exception.

        This includes `KeyboardInterrupt`: the kernel's stop button ends a long callback, and the view stays usable.
        """
        try:
            yield
        except HatError as error:
            self._say("error", escape(str(error)))
        except KeyboardInterrupt:
            self._say("error", "interrupted")
        except Exception as error:
            self._say("error", escape(f"{type(error).__name__}: {error}"))


def capacity_slider(value: float) -> FloatSlider:
    return FloatSlider(value, min=CAPACITY_MIN, max=1.0, step=0.01, description="Capacity", **LET_GO)


def exit_slider(value: float) -> FloatSlider:
    return FloatSlider(value, min=0.0, max=1.0, step=0.01, description="Exit rate", **LET_GO)
