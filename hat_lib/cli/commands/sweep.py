"""``hat sweep``: quality over a whole grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.console import WHY
from hat_lib.cli.options import option
from hat_lib.config import HatError, check_count

Trained = Annotated[Path, option("Trained checkpoint of this grain.")]
Untrained = Annotated[Path, option("Calibrated, untrained checkpoint of this grain, as a control.")]


def sweep(
    out: Annotated[Path, option("CSV file; rows that it holds are kept. The figure goes beside it.", metavar="CSV")],
    capacity: Annotated[str, option("Capacities, 0.1-1.0, comma-separated.", metavar="SHARES")] = "0.4,0.55,0.7,0.9",
    exit_rate: Annotated[str, option("Exit rates, 0-1, comma-separated.", metavar="SHARES")] = "0",
    seed: Annotated[str, option("Seeds of what is drawn at random, comma-separated.", metavar="SEEDS")] = "0",
    grains: Annotated[
        str, option("Which grains to measure, comma-separated: channel, token.", metavar="GRAINS")
    ] = "channel,token",
    texts: Annotated[
        str, option(f"Texts, whose split test is measured, comma-separated; each {take.TEXT_HELP}.", metavar="TEXTS")
    ] = "addresses,docstrings",
    variants: Annotated[
        str, option("The trained model and its controls, comma-separated.", metavar="NAMES")
    ] = "trained,untrained,random,static,cosine,removal,random_exits",
    max_tokens: take.MaxTokens = 4000,
    channel: Trained = take.CHECKPOINTS / "default",
    channel_untrained: Untrained = take.CALIBRATED,
    token: Trained = take.CHECKPOINTS / "token",
    token_untrained: Untrained = take.CHECKPOINTS / "calibrated_token",
    dtype: take.Dtype = None,
) -> None:
    """Quality over a grid, beside every control at equal work.

    A row is written as soon as it is measured; stopped and started again, a sweep goes on where it was. At its end the
    frontier is drawn beside the file, with 95 % intervals.
    """
    if out.suffix.lower() != ".csv":
        raise HatError(f"--out must be a .csv file, beside which the figure goes as .png, got {out}")
    wanted, sources = given.grain_names(grains), given.names("--texts", texts)
    axes = {
        "capacities": _numbers("--capacity", capacity),
        "exit_rates": _numbers("--exit-rate", exit_rate),
        "seeds": _numbers("--seed", seed, int),
        "texts": sources,
        "variants": given.names("--variants", variants),
        "max_tokens": check_count("max tokens", max_tokens, 1024),
    }
    for source in sources:
        given.check_text(source, "test")
    given.check_writable(out.parent, "a sweep")
    given.check_dtype(dtype)

    import pandas as pd

    from hat_lib.experiments.quality import KEY, Grain, Row, grid, measure
    from hat_lib.experiments.rows import RowWriter
    from hat_lib.plotting.frontier import quality as frontier
    from hat_lib.plotting.style import png

    plan = {name: grid(name, **axes) for name in wanted}
    chosen = {"channel": Grain(channel, channel_untrained), "token": Grain(token, token_untrained)}
    typer.echo(f"{sum(map(len, plan.values()))} points; those that {out} holds are kept")
    typer.echo(f"capacity and exit rate as requested, and (realised); they differ, for {WHY}")
    with RowWriter(out, Row, KEY) as writer:
        for r in measure({n: chosen[n] for n in wanted}, writer.done, points=plan.__getitem__, dtype=dtype):
            writer.write(r)
            typer.echo(
                f"{r.granularity:8} {r.text:12} capacity {r.capacity:.2f} ({r.realised:.3f})  exits {r.exit_rate:.2f} "
                f"({r.realised_exit:.3f})  {r.variant:12} seed {r.seed}  {r.increase:+.2%} "
                f"({r.increase_low:+.2%} to {r.increase_high:+.2%})"
            )
    figure = out.with_suffix(".png")
    figure.write_bytes(png(frontier(pd.read_csv(out))))
    typer.echo(f"wrote {out} and {figure}")


def _numbers(option: str, text: str, kind: type = float) -> list:
    """``"0.4,0.7"`` as numbers, at least one."""
    try:
        return [kind(part) for part in given.names(option, text)]
    except ValueError:
        raise HatError(f"{option} takes numbers, comma-separated, got {text!r}") from None
