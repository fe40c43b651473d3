"""``hat sweep``: quality over a grid, beside every control, into a file of rows and a figure."""

from __future__ import annotations

from pathlib import Path

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option
from hat_lib.config import WHY, HatError, check_capacity, check_exit_rate

VARIANTS = "trained, uncorrected, untrained, random, static, cosine, removal, random_exits, no_exits, fine_tuned"


def sweep(
    out: Path = option(..., "CSV file; rows that it holds are kept. The figure goes beside it."),
    capacity: str = option("0.4, 0.55, 0.7, 0.9", "Capacities, 0.1-1.0, comma-separated."),
    exit_rate: str = option("0", "Exit rates, 0-1, comma-separated."),
    seed: str = option("0", "Seeds of what is drawn at random, comma-separated."),
    grains: str = option("channel, token", "Which grains to measure, comma-separated: channel, token."),
    texts: str = option("addresses, docstrings", f"Comma-separated; each {options.TEXT_HELP}."),
    variants: str = option(VARIANTS, "The trained model, the same without its corrections, and its controls."),
    max_tokens: int = option(4000, "Tokens of each text, at least 1024; more makes the interval narrower.", min=1024),
    channel: Path = option(Path("default"), "Trained checkpoint of the channel grain."),
    channel_untrained: Path = option(Path("calibrated"), "The same, calibrated alone: a control."),
    token: Path = option(Path("token"), "Trained checkpoint of the token grain."),
    token_untrained: Path = option(Path("calibrated_token"), "The same, calibrated alone: a control."),
    dtype: str | None = options.DTYPE,
    threads: int | None = options.THREADS,
    write_prices: bool = option(False, "Store increases in trained checkpoints, for `hat generate`.", "--write-prices"),
) -> None:
    """Quality over a grid, beside every control at equal work.

    A row is written as soon as it is measured; if stopped and started again, a sweep resumes where it was. A text that
    is a file is measured whole, unless the trained checkpoint was made with it; of any other text, the test split is.
    """
    if out.suffix.lower() != ".csv":
        raise HatError(f"--out must be a .csv file, beside which the figure goes as .png, got {out}")
    wanted = options.names("--grains", grains)
    axes = {
        "capacities": [check_capacity(part) for part in options.names("--capacity", capacity)],
        "exit_rates": [check_exit_rate(part) for part in options.names("--exit-rate", exit_rate)],
        "seeds": _seeds(seed),
        "texts": options.names("--texts", texts),
        "variants": options.names("--variants", variants),
    }
    options.check_writable(out.parent, "a sweep")
    options.start(threads)
    options.check_grains("grains", wanted)
    for source in axes["texts"]:
        options.check_text(source, None)

    import pandas as pd

    from hat_lib.evaluation.equal_work import KEY, Row, grid, prices, rows
    from hat_lib.evaluation.intervals import NONE
    from hat_lib.method import checkpoint
    from hat_lib.plotting.frontier import quality as frontier
    from hat_lib.plotting.style import png, write
    from hat_lib.rows import RowWriter

    points = [point for name in wanted for point in grid(name, **axes, max_tokens=max_tokens)]
    if not points:
        raise HatError(
            "nothing to measure at these settings: controls of routers need a capacity below 1 and exit rate 0, "
            "random_exits and no_exits one above 0; static, uncorrected and no_exits the channel grain"
        )
    checkpoints = {"channel": (channel, channel_untrained), "token": (token, token_untrained)}
    checkpoints = {name: checkpoints[name] for name in wanted}
    typer.echo(f"{len(points)} points; those that {out} holds are kept")
    typer.echo(f"capacity and exit rate as requested, and (realised); they differ, for {WHY}")
    with RowWriter(out, Row, KEY) as writer:
        for r in rows(writer.done, checkpoints, points, dtype):
            writer.write(r)
            interval = NONE if r.increase_low is None else f"{r.increase_low:+.2%} to {r.increase_high:+.2%}"
            typer.echo(
                f"{r.granularity:8} {r.text:12} capacity {r.capacity:.2f} ({r.realised:.3f})  exits {r.exit_rate:.2f} "
                f"({r.realised_exit:.3f})  {r.variant:12} seed {r.seed}  {r.increase:+.2%} ({interval})"
            )
    measured = pd.read_csv(out)
    if write_prices:
        for grain in wanted:
            checkpoint.write_prices(checkpoints[grain][0], prices(measured, grain))
            typer.echo(f"wrote prices to {checkpoints[grain][0]}")
    figure = write(out.with_suffix(".png"), png(frontier(measured)))
    typer.echo(f"wrote {out} and {figure}")


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in options.names("--seed", text)]
    except ValueError:
        raise HatError(f"--seed takes whole numbers, comma-separated, got {text!r}") from None
