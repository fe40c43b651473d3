"""Interactive views for notebooks: the frontier, live generation, and where compute goes. Each has a still twin.

    widgets.show(widgets.FrontierView())                        still: plotting.frontier.twin
    widgets.show(widgets.GenerateView(AdaptiveInference(hat)))  still: its twin(), table and words
    widgets.show(widgets.TokenMapView(hat, {"fox": "The quick brown fox"}))  still: its twin() and about()

They work in JupyterLab, Notebook 7, Colab and Voila; a page that runs nothing, such as GitHub's, shows none of them.
"""

from hat_lib.workbook.frontier_view import FrontierView
from hat_lib.workbook.generate_view import GenerateView
from hat_lib.workbook.token_map_view import TokenMapView
from hat_lib.workbook.view import show

__all__ = ["FrontierView", "GenerateView", "TokenMapView", "show"]
