"""Interactive views for notebooks: the frontier, live generation, and where compute goes.

    widgets.show(widgets.frontier())
    widgets.show(widgets.GenerateView(AdaptiveInference(hat)))
    widgets.show(widgets.RoutingView(patterns(hat, blocks)))

They are plain ipywidgets with pictures as PNG and text as HTML, so they need no front-end parts of their own, in
JupyterLab, Notebook 7, Colab and Voila. A page that runs nothing, such as GitHub's, shows none of them: beside each
stands its static twin, `trained_frontier.twin`, `GenerateView.twin` or `pattern_plots.layer_map`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pandas as pd
from IPython.display import display
from ipywidgets import Widget

from hat_lib.config import DATA, HatError
from hat_lib.plotting.trained_frontier import points
from hat_lib.workbook.environment import in_colab
from hat_lib.workbook.widgets.frontier import FrontierView
from hat_lib.workbook.widgets.generate import GenerateView
from hat_lib.workbook.widgets.routing import RoutingView

__all__ = ["FrontierView", "GenerateView", "RoutingView", "frontier", "show"]


def frontier(results: Path = DATA / "results", granularity: str = "channel", text: str = "docstrings") -> FrontierView:
    """The saved sweep under two sliders.

    Args:
        results: folder of ``quality.csv`` and ``layer_shares.csv``; of
            ``published_claims.csv`` too, where speed was measured.

    Raises `HatError` for a missing file, and where the sweep has no row for the grain and text.
    """
    tables = {}
    for name, made_by in (("quality", "hat quality"), ("layer_shares", "notebook 07")):
        path = results / f"{name}.csv"
        if not path.is_file():
            raise HatError(f"no {path}: it is made by {made_by}")
        tables[name] = pd.read_csv(path)
    promise = results / "published_claims.csv"
    speed = pd.read_csv(promise) if promise.is_file() else None
    return FrontierView(points(tables["quality"], granularity, text), tables["layer_shares"], speed)


def show(view: Widget) -> None:
    """Display a view, with a line in its place on pages that run nothing.

    On Colab the page is first told to load ipywidgets 8, which it does not bring along.
    """
    if in_colab():
        import_module("google.colab.output").enable_custom_widget_manager()
    bundle = view._repr_mimebundle_()
    display(bundle | {"text/plain": f"{type(view).__name__}: run this cell to use it"}, raw=True)
