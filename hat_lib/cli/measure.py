"""``hat evaluate``, ``hat analyze`` and ``hat sweep``, which measure the model on text."""

import json
from pathlib import Path

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option, with_model
from hat_lib.config import WHY, HatError, check_capacity, check_count, check_exit_rate, check_writable, literal

VARIANTS = "trained, uncorrected, untrained, random, static, cosine, removal, random_exits, no_exits, fine_tuned"


@with_model
def evaluate(
    text: str = options.TEXT,
    split: str | None = options.SPLIT,
    max_tokens: int = options.MAX_TOKENS,
    documents: bool = option(False, "Also a line for each document.", "--documents"),
    tasks: str | None = option(
        None, "Instead of a text, tasks of lm-evaluation-harness (address_cloze), comma-separated."
    ),
    tasks_path: Path | None = option(None, "Folder of tasks (YAML); Python they name is run. [default: data/tasks]"),
    batch_size: int = option(1, "Blocks or requests a forward; changes no result beyond rounding.", min=1),
    threads: int | None = options.THREADS,
    as_json: bool = option(False, "Print one JSON object on stdout and nothing else.", "--json"),
    **model,
) -> None:
    """Perplexity against the base, with its 95 % interval.

    Both are scored on the same blocks, and the interval is paired. Or, with --tasks, scores of lm-evaluation-harness,
    the base's beside the model's.
    """
    options.start(threads)
    from hat_lib.evaluation import report
    from hat_lib.text.blocks import check_text

    if tasks is None:
        if tasks_path is not None:
            raise HatError("--tasks-path needs --tasks NAME[,NAME]")
        check_text(text, split)
        row, lines = report.on_text(options.load(**model), text, split, max_tokens, batch_size, documents)
    else:
        if documents or (text, split, max_tokens) != (options.TEXT.default, None, options.MAX_TOKENS.default):
            raise HatError("--tasks brings its own text: leave out --text, --split, --max-tokens and --documents")
        from hat_lib.evaluation.lm_eval import TASKS, load_tasks

        loaded = load_tasks(options.names("--tasks", tasks), tasks_path or TASKS)
        row, lines = report.on_tasks(options.load(**model), loaded, batch_size)
    typer.echo(json.dumps(row) if as_json else "\n".join(lines))


@with_model
def analyze(
    text: str = options.TEXT,
    split: str | None = options.SPLIT,
    max_tokens: int = options.MAX_TOKENS,
    threads: int | None = options.THREADS,
    tables: bool = option(False, "Also the tables, and the beginning of the text coloured by compute.", "--tables"),
    out: Path | None = option(None, "Also write tables (CSV), figures (PNG) and coloured text (HTML) to this folder."),
    **model,
) -> None:
    """How compute is distributed over tokens and layers.

    And whether harder tokens get more. Prints a five-line summary; --tables also prints tables by class, position,
    surprisal, entropy and layer, and --out writes all of them. All intervals are 95 % intervals.
    """
    if out is not None:
        check_writable(out, "an analysis")
    options.start(threads)
    from hat_lib.evaluation import report
    from hat_lib.evaluation.routing import TABLES
    from hat_lib.evaluation.tokens import token_table
    from hat_lib.text.blocks import check_text, default_split, load_text

    check_text(text, split)
    hat = options.load(**model)
    split = split or default_split(text, hat)
    found = token_table(hat, load_text(text, hat.base.tokenizer, split=split, max_tokens=max_tokens))
    made = {name: make(found) for name, make in TABLES.items()}
    lines = report.on_tokens(found, made, text, split) + (report.tables_of_tokens(found, made) if tables else [])
    typer.echo("\n".join(lines))
    if out is not None:
        from hat_lib.plotting.routing import files
        from hat_lib.plotting.style import write

        written = [write(out.expanduser() / name, payload) for name, payload in files(found, made).items()]
        typer.echo(f"\nwrote {', '.join(path.name for path in written)} to {out}")


def sweep(
    out: Path = option(..., "CSV file; rows that it holds are kept. The figure goes beside it."),
    capacity: str = option("0.4, 0.55, 0.7, 0.9", "Capacities, 0.1-1.0, comma-separated."),
    exit_rate: str = option("0", "Exit rates, 0-1, comma-separated."),
    seed: str = option("0", "Seeds of what is drawn at random, comma-separated."),
    grains: str = option("channel, token", "Which grains to measure, comma-separated: channel, token."),
    texts: str = option("addresses, docstrings", f"Comma-separated; each {options.TEXTS}."),
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
    axes = {
        "capacities": [check_capacity(part) for part in options.names("--capacity", capacity)],
        "exit_rates": [check_exit_rate(part) for part in options.names("--exit-rate", exit_rate)],
        "seeds": [check_count("seed", literal(part), 0) for part in options.names("--seed", seed)],
        "texts": options.names("--texts", texts),
        "variants": options.names("--variants", variants),
    }
    given = {"channel": (channel, channel_untrained), "token": (token, token_untrained)}
    checkpoints = {options.check_grain(name): given[name] for name in options.names("--grains", grains)}
    check_writable(out.parent, "a sweep")
    options.start(threads)
    import pandas as pd

    from hat_lib import checkpoint
    from hat_lib.evaluation import equal_work, report
    from hat_lib.plotting.frontier import quality as frontier
    from hat_lib.plotting.style import png, write
    from hat_lib.text.blocks import check_text

    for source in axes["texts"]:
        check_text(source, None)
    points = equal_work.grid(list(checkpoints), **axes, max_tokens=max_tokens)
    typer.echo(f"{len(points)} points; those that {out} holds are kept")
    typer.echo(f"capacity and exit rate as requested, and (realised); they differ, for {WHY}")
    for line in report.on_grid(out, checkpoints, points, dtype):
        typer.echo(line)
    measured = pd.read_csv(out)
    if write_prices:
        for grain, (trained, _) in checkpoints.items():
            checkpoint.write_prices(trained, equal_work.prices(measured, grain))
            typer.echo(f"wrote prices to {trained}")
    figure = write(out.with_suffix(".png"), png(frontier(measured)))
    typer.echo(f"wrote {out} and {figure}")
