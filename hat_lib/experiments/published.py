"""The published recipe, measured like our own: ``data/results/published.csv``.

The rows are those of `hat_lib.experiments.quality`, for the checkpoint that was trained with the published
hyperparameters, at the grain that they are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from hat_lib.evaluation.baselines.controls import CONTROLS
from hat_lib.experiments import quality
from hat_lib.experiments.columns import CHECKPOINTS, TEXTS
from hat_lib.experiments.quality import KEY, Row
from hat_lib.experiments.tables import markdown, saved
from hat_lib.plotting.findings import promised, said

ABOUT = "as in quality, for the token grain trained by the published recipe"
MINUTES = 40

__all__ = ["ABOUT", "KEY", "MINUTES", "Row", "figures", "rows", "tables"]


def rows(
    done: Mapping[tuple, Row] | None = None,
    *,
    token: Path = CHECKPOINTS / "published",
    token_untrained: Path = CHECKPOINTS / "calibrated_token",
    dtype: str | None = None,
) -> Iterator[Row]:
    yield from quality.rows(done, token=token, token_untrained=token_untrained, grains=["token"], dtype=dtype)


def figures(results: Path | None = None) -> dict[str, Figure]:
    names = ("quality", "published", "published_claims")
    return {"08_promised": promised(*(saved(name, results) for name in names))}


def tables(results: Path | None = None) -> dict[str, str]:
    """The token grain by two recipes, each increase with the capacity realised; controls at the work of ours."""
    ours, theirs = (
        saved(name, results).query("granularity == 'token' and exit_rate == 0").sort_values("tokens")
        for name in ("quality", "published")
    )
    trained = [rows[rows["variant"] == "trained"] for rows in (ours, theirs)]
    header = ["capacity"]
    header += [f"{text}: {way}" for text in TEXTS for way in ("our recipe", "published recipe", "best control")]
    lines = []
    for capacity in sorted(set(trained[0]["capacity"]) & set(trained[1]["capacity"]), reverse=True):
        line = [f"{capacity:.2f}"]
        for text in TEXTS:
            for rows in trained:
                row = rows[(rows["text"] == text) & (rows["capacity"] == capacity)].iloc[-1]
                line.append(f"{said(row)} at {row['realised']:.2f}")
            rivals = ours[(ours["text"] == text) & (ours["capacity"] == capacity) & ours["variant"].isin(CONTROLS)]
            best = rivals.sort_values("increase").head(1).to_dict("records")
            line.append(f"{said(best[0])}, {best[0]['variant']}" if best else None)
        lines.append(line)
    return {"published": markdown(header, lines)}
