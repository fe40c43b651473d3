"""``hat sweep`` and ``hat reproduce``: files of results, row by row, and the figures and tables based on them."""

from __future__ import annotations

from pathlib import Path

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option, say
from hat_lib.config import DATA, REPO, RUNS, WHY, HatError, check_count

RESULTS = DATA / "results"


def sweep(
    out: Path = option(..., "CSV file; rows that it holds are kept. The figure goes beside it."),
    capacity: str = option("0.4,0.55,0.7,0.9", "Capacities, 0.1-1.0, comma-separated."),
    exit_rate: str = option("0", "Exit rates, 0-1, comma-separated."),
    seed: str = option("0", "Seeds of what is drawn at random, comma-separated."),
    grains: str = option("channel,token", "Which grains to measure, comma-separated: channel, token."),
    texts: str = option("addresses,docstrings", f"Comma-separated; each {options.TEXT_HELP}."),
    variants: str = option(
        "trained,uncorrected,untrained,random,static,cosine,removal,random_exits,no_exits,fine_tuned",
        "The trained model, the same without its corrections, and its controls.",
    ),
    max_tokens: int = option(4000, "Tokens of each text, at least 1024; more makes the interval narrower."),
    channel: Path = option(options.DEFAULT, "Trained channel-grain checkpoint."),
    channel_untrained: Path = option(
        options.CHECKPOINTS / "calibrated", "Untrained channel-grain checkpoint, calibrated alone: a control."
    ),
    token: Path = option(options.CHECKPOINTS / "token", "Trained token-grain checkpoint."),
    token_untrained: Path = option(
        options.CHECKPOINTS / "calibrated_token", "Untrained token-grain checkpoint, calibrated alone: a control."
    ),
    dtype: str | None = options.DTYPE,
) -> None:
    """Quality over a grid, beside every control at equal work.

    A row is written as soon as it is measured; if stopped and started again, a sweep resumes where it was. At the end,
    the frontier is drawn beside the file, with 95 % intervals. A text that is a file is measured whole, unless the
    trained checkpoint was made with it; of any other text, the test split is measured.
    """
    if out.suffix.lower() != ".csv":
        raise HatError(f"--out must be a .csv file, beside which the figure goes as .png, got {out}")
    wanted = options.names("--grains", grains)
    options.check_grains("grains", wanted)
    axes = {
        "capacities": _numbers("--capacity", capacity),
        "exit_rates": _numbers("--exit-rate", exit_rate),
        "seeds": _numbers("--seed", seed, int),
        "texts": options.names("--texts", texts),
        "variants": options.names("--variants", variants),
        "max_tokens": check_count("max tokens", max_tokens, 1024),
    }
    for source in axes["texts"]:
        options.check_text(source, None)
    options.check_writable(out.parent, "a sweep")

    import pandas as pd

    from hat_lib.backbone.base import parse_dtype
    from hat_lib.evaluation.intervals import NONE
    from hat_lib.experiments.quality import KEY, Row, grid, rows
    from hat_lib.experiments.rows import RowWriter
    from hat_lib.plotting.frontier import quality as frontier
    from hat_lib.plotting.style import png, write

    if dtype is not None:
        parse_dtype(dtype)
    points = [point for name in wanted for point in grid(name, **axes)]
    if not points:
        raise HatError(
            "nothing to measure at these settings: controls of routers need a capacity below 1 and exit rate 0, "
            "random_exits and no_exits one above 0; static, uncorrected and no_exits the channel grain"
        )
    sources = {"channel": channel, "channel_untrained": channel_untrained, "token": token,
               "token_untrained": token_untrained}  # fmt: skip
    typer.echo(f"{len(points)} points; those that {out} holds are kept")
    typer.echo(f"capacity and exit rate as requested, and (realised); they differ, for {WHY}")
    with RowWriter(out, Row, KEY) as writer:
        for r in rows(writer.done, **sources, grains=wanted, points=points, dtype=dtype):
            writer.write(r)
            interval = NONE if r.increase_low is None else f"{r.increase_low:+.2%} to {r.increase_high:+.2%}"
            typer.echo(
                f"{r.granularity:8} {r.text:12} capacity {r.capacity:.2f} ({r.realised:.3f})  exits {r.exit_rate:.2f} "
                f"({r.realised_exit:.3f})  {r.variant:12} seed {r.seed}  {r.increase:+.2%} ({interval})"
            )
    figure = write(out.with_suffix(".png"), png(frontier(pd.read_csv(out))))
    typer.echo(f"wrote {out} and {figure}")


def _numbers(option: str, text: str, kind: type = float) -> list:
    """``"0.4,0.7"`` as numbers, at least one."""
    try:
        return [kind(part) for part in options.names(option, text)]
    except ValueError:
        raise HatError(f"{option} takes numbers, comma-separated, got {text!r}") from None


def reproduce(
    names: list[str] | None = typer.Argument(
        None, metavar="[NAME]...", help="Experiments; none lists them.", show_default=False
    ),
    everything: bool = option(False, "Every experiment, each after those whose files it reads.", "--all"),
    out: Path | None = option(
        None, "Folder of the CSV files; only rows that they lack are measured. [default: runs/results]"
    ),
    again: bool = option(False, "Measure every row again, and replace the old file once all are done.", "--again"),
    settings: list[str] | None = option(
        None, "An option of the experiment; may be repeated: --set channel=0.9,0.7.", "--set", metavar="NAME=VALUE"
    ),
    figures: bool = option(False, "Measure nothing: redraw figures/, or those of --out.", "--figures"),
    tables: bool = option(False, "Measure nothing: rewrite the tables of README and docs.", "--tables"),
) -> None:
    """Measure results again, row by row, and draw what uses them.

    Without a name, lists what there is and how long each takes. What was stopped resumes where it was. The committed
    files and figures change only with --out data/results, and the rows they already hold only with --again as well.
    """
    folder = out or RUNS / "results"
    options.check_writable(folder, "results")

    from hat_lib.experiments import registry

    wanted = list(registry.NAMES) if everything else names or []
    experiments = {name: registry.load(name) for name in wanted}
    if settings and len(wanted) != 1:
        raise HatError("--set goes with the name of one experiment")
    changed = registry.parse(wanted[0], settings) if settings else {}
    if figures:
        for name in wanted or registry.NAMES:
            _figures(name, registry.load(name), out or RESULTS)
    if tables:
        for path, text in registry.outdated(registry.all_tables()).items():
            path.write_text(text, encoding="utf-8")
            typer.echo(f"wrote {path}")
    if figures or tables:
        return
    for name in () if wanted else registry.NAMES:
        experiment = registry.load(name)
        typer.echo(f"{name:18} {experiment.MINUTES:4} min  {experiment.ABOUT}")
        typer.echo(f"{'':28}--set {', '.join(registry.option_kinds(name))}")
    for name, experiment in experiments.items():
        count = 0
        for row in registry.measure(name, folder, again=again, **changed):
            count += 1
            typer.echo(f"{name}: " + ", ".join(f"{key} {getattr(row, key)}" for key in experiment.KEY))
        known = "" if count else ", as it had them all (--again measures them once more)"
        typer.echo(f"{name}: {count} new rows in {folder / name}.csv{known}")
        _figures(name, experiment, folder)


def _figures(name: str, experiment, results: Path) -> None:
    from hat_lib.plotting.style import save_figure

    folder = REPO / "figures" if results.resolve() == RESULTS.resolve() else results / "figures"
    try:
        for figure, drawn in getattr(experiment, "figures", lambda results: {})(results).items():
            typer.echo(f"wrote {save_figure(drawn, figure, folder)}")
    except HatError as error:  # they also need a file that does not exist
        say("warning", f"the figures of {name} stay as they are: {error}")
