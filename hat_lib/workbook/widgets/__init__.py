"""Interactive views for notebooks: the frontier, live generation, and where compute goes. Each has a static figure.

    widgets.show(widgets.FrontierView.saved())
    widgets.show(widgets.GenerateView(AdaptiveInference(hat)))
    widgets.show(widgets.RoutingView(patterns(hat, blocks)))

They are plain ipywidgets with pictures as PNG and text as HTML, so they need no front-end parts of their own, in
JupyterLab, Notebook 7, Colab and Voila. A page that runs nothing, such as GitHub's, shows none of them: beside each
stands its static twin, `plotting.frontier.twin`, `GenerateView.twin` or `plotting.routing.layer_map`.
"""

from hat_lib.workbook.widgets.frontier import FrontierView
from hat_lib.workbook.widgets.generate import GenerateView
from hat_lib.workbook.widgets.parts import show
from hat_lib.workbook.widgets.routing import RoutingView

__all__ = ["FrontierView", "GenerateView", "RoutingView", "show"]
