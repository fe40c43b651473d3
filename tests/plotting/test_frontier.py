"""The quality figure: every variant where its file says, exits left out, the better-measured row kept."""

import pandas as pd
import pytest

from hat_lib.config import HatError
from hat_lib.plotting import frontier


def table():
    rows = []
    for grain in ("channel", "token"):
        for text in ("addresses", "docstrings"):
            for variant, cost in {"trained": 0.02, "untrained": 0.03, "random": 40.0}.items():
                for capacity in (0.9, 0.7):
                    rows.append((grain, text, variant, capacity, 0.0, 4000, capacity, cost / capacity))
    rows.append(("channel", "addresses", "trained", 0.9, 0.0, 20_000, 0.91, 0.5))
    rows.append(("channel", "addresses", "trained", 0.9, 0.3, 4000, 0.5, 9.0))
    names = ["granularity", "text", "variant", "capacity", "exit_rate", "tokens", "model_share", "increase"]
    found = pd.DataFrame(rows, columns=names)
    return found.assign(increase_low=found["increase"] * 0.9, increase_high=found["increase"] * 1.1)


def test_points_stand_where_the_table_says():
    fig = frontier.quality(table())
    assert [ax.get_title(loc="left") for ax in fig.axes] == [
        f"{grain} grain, {text}" for grain in ("channel", "token") for text in ("addresses", "docstrings")
    ]
    trained = fig.axes[0].containers[0].lines[0]
    assert trained.get_xdata().tolist() == [0.7, 0.91]
    assert trained.get_ydata().tolist() == pytest.approx([100 * 0.02 / 0.7, 50])
    assert [len(ax.containers) for ax in fig.axes] == [3, 3, 3, 3]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["trained", "untrained", "random"]


def test_a_missing_column_is_named():
    with pytest.raises(HatError, match="model_share"):
        frontier.quality(table().drop(columns="model_share"))
