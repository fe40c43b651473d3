"""What the interactive views share: labelled controls, text that changes, and errors told where they happen.

Jupyter hides an exception in a widget's callback: it goes to a log that nobody reads. So every callback here runs
inside `told`. Sliders have a description and a visible value, and move with the arrow keys; Notebook 7 takes these for
itself and leaves Home, End, Page Up and Page Down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib import import_module

from IPython.display import display
from ipywidgets import HTML, Layout, SelectionSlider, Widget

from hat_lib.config import HatError
from hat_lib.workbook.environment import in_colab

WIDE = {"description_width": "7em"}


def show(view: Widget) -> None:
    """Display a view, with a line in its place on pages that run nothing.

    On Colab the page is first told to load ipywidgets 8, which it does not bring along.
    """
    if in_colab():
        import_module("google.colab.output").enable_custom_widget_manager()
    bundle = view._repr_mimebundle_()
    display(bundle | {"text/plain": f"{type(view).__name__}: run this cell to use it"}, raw=True)


def stops(description: str, values: Sequence[float], value: float) -> SelectionSlider:
    """A slider over the given values alone."""
    options = [(f"{v:.2f}", v) for v in values]
    layout = Layout(width="min(32em, 95%)")
    return SelectionSlider(description=description, options=options, value=value, style=WIDE, layout=layout)


def say(out: HTML, state: str, message: str) -> None:
    """Write ``message`` (HTML) with a ``state``: ready, busy or error. Screen readers read it out as it changes."""
    sign = {"error": "⚠ ", "busy": "⏳ "}.get(state, "")
    out.value = f'<div role="status" data-state="{state}">{sign}{message}</div>'


@contextmanager
def told(out: HTML, busy: str = "") -> Iterator[None]:
    """Context of a callback: says ``busy`` while it runs, and in place of an exception what went wrong.

    `KeyboardInterrupt` is told too: the kernel's stop button ends a long callback, and the view stays usable.
    """
    if busy:
        say(out, "busy", escape(busy))
    try:
        yield
    except HatError as error:
        say(out, "error", escape(str(error)))
    except KeyboardInterrupt:
        say(out, "error", "interrupted")
    except Exception as error:
        say(out, "error", escape(f"{type(error).__name__}: {error}"))
