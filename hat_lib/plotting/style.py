"""What figures share. A figure is a function from a table to a matplotlib `Figure`, which raises `HatError` for a
missing column or an empty table; none is registered with pyplot.

Colours are seaborn's "colorblind" set; each series also has its own marker or line. Pages may be dark, so a figure has
its own white background.
"""

from collections.abc import Callable
from functools import wraps
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image as Picture
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from PIL import Image

from hat_lib import config
from hat_lib.config import HatError

BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = sns.color_palette("colorblind").as_hex()
COST = ["increase", "increase_low", "increase_high"]
WORK = "executed share of the model's work"
WIDTH, WIDE, HEIGHT, DPI = 7.0, 9.4, 3.8, 130  # inches: one panel, several side by side; inches; dots per inch
STYLE = mpl.rc_params_from_file(Path(__file__).with_name("house.mplstyle"), use_default_template=False)


def PERCENT(share: float, _=None) -> str:
    """Ticks of an axis of shares, shortened without losing accuracy: 55%, 57.5%."""
    return f"{round(100 * share, 6):g}%"


def save_figure(fig: Figure, name: str, folder: Path | None = None) -> Path:
    """Write ``fig`` as ``name``.png to ``folder`` (default `config.FIGURES`)."""
    return write((folder or config.FIGURES) / f"{name}.png", png(fig))


def write(path: Path, payload: bytes) -> Path:
    """Write a file and its folders; `HatError` where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
    except OSError as error:  # that of a full disk names no file
        raise HatError(f"cannot write {path}: {error.strerror}") from error
    return path


def png(fig: Figure) -> bytes:
    """``fig`` as a PNG file; the same figure gives the same bytes."""
    drawn, file = BytesIO(), BytesIO()
    with mpl.rc_context(STYLE):
        fig.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)
    image = Image.open(drawn).convert("RGB")
    # A palette of 256 colours cuts the size to a third, but causes banding in colour scales.
    shaded = any(isinstance(part, QuadMesh | AxesImage) for ax in fig.axes for part in ax.get_children())
    (image if shaded else image.quantize(256)).save(file, format="png", optimize=True)
    return file.getvalue()


def show(fig: Figure, name: str, alt: str) -> None:
    """`save_figure`, then show only the picture in a notebook, with ``alt`` for those who cannot see it."""
    display(Picture(save_figure(fig, name).read_bytes(), alt=alt), include=["image/png"])


def draws(*columns: str) -> Callable:
    """Decorator: draw in the house style, after checking that the first table has these columns."""

    def decorate(draw: Callable) -> Callable:
        @wraps(draw)
        def inside(table: pd.DataFrame, *args, **settings) -> Figure:
            check_table(table, *columns)
            with mpl.rc_context(STYLE):
                return draw(table, *args, **settings)

        return inside

    return decorate


def check_table(table: pd.DataFrame, *columns: str) -> None:
    """Raise `HatError` unless the table has the columns and at least one row."""
    missing = [c for c in columns if c not in table]
    if missing or table.empty:
        raise HatError(f"a figure needs rows with the columns {', '.join(columns)}; missing: {missing or 'any row'}")


def panels(columns: int, rows: int = 1, height: float = HEIGHT, width: float = 0, **more) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, row by row; sizes of the whole figure in inches. ``more`` is for `subplots`."""
    width = width or (WIDTH if columns == 1 else max(WIDTH, 3.0 * columns))
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, list(fig.subplots(rows, columns, squeeze=False, **{"sharey": "row"} | more).flat)


def whiskers(
    ax: Axes, x, ends: pd.DataFrame, colour: str, marker: str, line: str = "none", horizontal: bool = False, **more
) -> None:
    """Points joined by a line, with their intervals: ``ends`` are the value, and the low and the high end (nan: none),
    along the x axis if ``horizontal``."""
    middle, low, high = ends.to_numpy().T
    reach = np.nan_to_num([middle - low, high - middle]).clip(min=0)
    where = {"x": middle, "y": x, "xerr": reach} if horizontal else {"x": x, "y": middle, "yerr": reach}
    look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "capsize": 2, "elinewidth": 1}
    ax.errorbar(**where, **look | more)


def increases(ax: Axes, ticks, xlabel: str, linscale: float = 1) -> None:
    """Axes for an increase in perplexity, in per cent, over a share: linear below 1 %, logarithmic above."""
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set_yscale("symlog", linthresh=1, linscale=linscale)
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(_increase)
    ax.xaxis.set_major_formatter(PERCENT)
    ax.set(xlabel=xlabel, ylabel="perplexity increase")


def _increase(percent: float, _=None) -> str:
    """+10 %, +1,000 %, +10^6 %"""
    if percent < 1e4:
        return f"{percent:+,.0f} %" if percent else "0"
    return f"+$10^{{{np.log10(percent):.0f}}}$ %"


def entry(label: str, colour: str = "black", marker: str | None = None, line: str = "none", **more) -> Line2D:
    return Line2D([], [], **{"color": colour, "marker": marker, "linestyle": line, "label": label} | more)


def legend_below(fig: Figure, entries: list[Line2D], **more) -> None:
    """The legend of a whole figure, below it, in one row."""
    fig.legend(handles=entries, **{"ncols": len(entries), "loc": "outside lower center"} | more)
