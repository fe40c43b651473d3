"""The commands that remake what the README shows: ``hat benchmark | foundation | quality | ablations |
step-cost | figures``."""

from __future__ import annotations

from typing import Annotated

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.console import app, say
from hat_lib.config import DATA, GRANULARITIES, REPO, HatConfig


@app.command()
def benchmark(
    base: take.TimedBase = "random:tinyllama",
    channel: take.ChannelCapacities = "1.0,0.75,0.6",
    token: take.TokenCapacities = "1.0,0.7,0.55,0.4",
    batch: take.Batch = "1,8",
    rounds: take.Rounds = 5,
    steps: take.Steps = 12,
    dtype: take.Dtype = None,
    out: take.Out = DATA / "results" / "benchmark.csv",
) -> None:
    """Wall-clock at forced shares against plain transformers.

    Both grains; decode and a prefill of 512 tokens, alone and in a batch; also what does not pay. Each grain runs in a
    process of its own, so that its peak memory is its own.
    """
    wanted = {"channel": given.capacities(channel), "token": given.capacities(token)}
    batches = given.numbers("--batch", batch, int)
    for name, value in (("batch", min(batches)), ("rounds", rounds), ("steps", steps)):
        given.check_count(name, value, 1)
    given.check_writable(out.parent)

    from multiprocessing import get_context

    from hat_lib.backbone.base import parse_dtype
    from hat_lib.experiments.benchmark import benchmark as measure
    from hat_lib.experiments.benchmark import write_rows

    if dtype is not None:
        parse_dtype(dtype)
    rows = []
    options = {"dtype": dtype, "batches": batches, "rounds": rounds, "steps": steps}
    for granularity, capacities in wanted.items():
        if capacities:
            with get_context("spawn").Pool(1) as pool:
                rows += pool.apply(measure, (granularity, capacities, base), options)
    write_rows(out, rows)
    typer.echo("grain    phase    batch  capacity  ideal  over transformers  over own dense path")
    for r in rows:
        typer.echo(
            f"{r.granularity:8} {r.phase:8} {r.batch:5d}  {r.realised:8.3f}  {r.ideal:5.2f}  "
            f"{r.speedup_hf:17.2f}  {r.speedup_dense:19.2f}"
        )
    typer.echo(f"wrote {out}")


@app.command()
def foundation(
    checkpoint: take.Checkpoint = None,
    max_tokens: take.MaxTokens = 20_000,
    rounds: take.Rounds = 9,
    dtype: take.Dtype = None,
    out: take.Out = DATA / "results" / "foundation.csv",
) -> None:
    """The reference result: price and gain on the bundled base.

    Perplexity on both texts and batch-1 decode, at 0.75 and 0.62. A few minutes on two cores.
    """
    given.check_count("max tokens", max_tokens, 1024)
    given.check_count("rounds", rounds, 1)
    given.check_writable(out.parent)

    from hat_lib.experiments.benchmark import write_rows
    from hat_lib.experiments.foundation import foundation as measure

    rows = measure(checkpoint or take.CALIBRATED, dtype=dtype, max_tokens=max_tokens, rounds=rounds)
    write_rows(out, rows)
    typer.echo("text        capacity  realised  perplexity over the base's       decode over transformers / own dense")
    for r in rows:
        typer.echo(
            f"{r.text:10}  {r.capacity:8.2f}  {r.realised:8.3f}  {r.increase:+7.2%} ({r.increase_low:+.2%} to "
            f"{r.increase_high:+.2%})  {r.speedup_hf:10.2f} / {r.speedup_dense:.2f}"
        )
    typer.echo(f"wrote {out}")


@app.command()
def quality(
    channel: take.ChannelTrained = take.CHECKPOINTS / "default",
    channel_untrained: take.ChannelUntrained = take.CALIBRATED,
    token: take.TokenTrained = take.CHECKPOINTS / "token",
    token_untrained: take.TokenUntrained = take.CHECKPOINTS / "calibrated_token",
    grains: take.Grains = "channel,token",
    dtype: take.Dtype = None,
    out: take.QualityOut = DATA / "results" / "quality.csv",
) -> None:
    """What trained checkpoints keep, beside every control.

    Both grains and both texts, at equal work; exits too. About an hour on two cores; stopped and started again, it
    goes on where it was.
    """
    wanted = given.grain_names(grains)
    given.check_writable(out.parent)

    from hat_lib.backbone.base import parse_dtype
    from hat_lib.experiments.quality import Grain
    from hat_lib.experiments.quality import quality as measure

    if dtype is not None:
        parse_dtype(dtype)
    chosen = {"channel": Grain(channel, channel_untrained), "token": Grain(token, token_untrained)}
    typer.echo("grain    text        capacity  realised  exits  variant       perplexity over the base's")
    for r in measure(out, {name: chosen[name] for name in wanted}, dtype=dtype, progress=False):
        typer.echo(
            f"{r.granularity:8} {r.text:10}  {r.capacity:8.2f}  {r.realised:8.3f}  {r.realised_exit:5.2f}  "
            f"{r.variant:12}  {r.increase:+8.2%} ({r.increase_low:+.2%} to {r.increase_high:+.2%})"
        )
    typer.echo(f"wrote {out}")


@app.command()
def ablations(
    base: take.TrainedBase = "bundled",
    steps: take.TrainSteps = 40,
    tokens: take.MaxTokens = 4_000,
    grains: take.Grains = "channel,token",
    dtype: take.TrainDtype = "bf16",
    out: take.QualityOut = DATA / "results" / "ablations.csv",
) -> None:
    """What each choice of the training recipe is worth.

    Short runs that differ in one thing, measured at equal work. About two hours on two cores; stopped and started
    again, it goes on where it was.
    """
    wanted = given.grain_names(grains)
    given.check_count("steps", steps, 1)
    given.check_count("tokens", tokens, 1024)
    given.check_writable(out.parent)

    from hat_lib.backbone.base import parse_dtype
    from hat_lib.experiments.ablations import CHANGES
    from hat_lib.experiments.ablations import ablations as measure

    parse_dtype(dtype)
    typer.echo("grain    text        capacity  realised  perplexity over the base's    change")
    changes = [change for change in CHANGES if change.granularity in wanted]
    for r in measure(out, base=base, changes=changes, steps=steps, tokens=tokens, dtype=dtype, progress=False):
        typer.echo(
            f"{r.granularity:8} {r.text:10}  {r.capacity:8.2f}  {r.realised:8.3f}  {r.increase:+8.2%} "
            f"({r.increase_low:+.2%} to {r.increase_high:+.2%})  {r.change}"
        )
    typer.echo(f"wrote {out}")


@app.command()
def step_cost(
    base: take.TrainedBase = "bundled",
    rounds: take.Rounds = 5,
    dtype: take.TrainDtype = "bf16",
    out: take.Out = DATA / "results" / "step_cost.csv",
) -> None:
    """Time of a training step beside a plain forward and backward.

    Both grains, teacher's pass included, on two blocks of 512 tokens; a minute on two cores.
    """
    given.check_count("rounds", rounds, 1)
    given.check_writable(out.parent)

    from hat_lib.backbone.base import load_base, parse_dtype
    from hat_lib.calibration.capacity import calibrate as measure
    from hat_lib.experiments.benchmark import write_rows
    from hat_lib.experiments.step_cost import step_ratio
    from hat_lib.model.transformer import HierarchicalTransformer
    from hat_lib.text.mixture import training_text
    from hat_lib.training.trainer import collate

    parse_dtype(dtype)
    rows = []
    for granularity in GRANULARITIES:
        loaded = load_base(base, dtype=dtype)
        text = training_text(loaded, "addresses", 1024)
        shape = HatConfig.published if granularity == "token" else HatConfig.default
        hat = HierarchicalTransformer(loaded, shape(loaded))
        if granularity == "channel":
            measure(hat, text["input_ids"], split="uniform", progress=False)
        rows.append(step_ratio(hat, collate(list(text)), rounds))
        typer.echo(f"{granularity:8} {rows[-1].ratio:.2f} times a plain forward and backward")
    write_rows(out, rows)
    typer.echo(f"wrote {out}")


@app.command()
def figures() -> None:
    """Redraw the figures from data/results, in seconds.

    A figure whose CSV files are not all there is named and left out.
    """
    import pandas as pd

    from hat_lib.plotting import findings, frontier, trained_frontier
    from hat_lib.plotting import speed as inference_plots
    from hat_lib.plotting import style as plots

    drawn = {
        "01_weight_shares": (plots.weight_shares, "weight_shares"),
        "02_skipped_ffn": (plots.skipped_ffn, "ffn_skip_by_layer"),
        "02_grain_frontier": (plots.grain_frontier, "grain_frontier"),
        "05_targets": (inference_plots.targets, "speed_targets"),
        "05_lossless": (inference_plots.lossless, "self_speculative"),
        "06_work_and_time": (inference_plots.work_and_time, "published_claims"),
        "06_promise": (inference_plots.promise, "published_claims"),
        "07_frontier": (trained_frontier.twin, "quality", "layer_shares"),
        "08_promised": (findings.promised, "quality", "published", "published_claims"),
        "08_speeds": (findings.speeds, "published_claims"),
        "08_exits": (findings.exits, "quality"),
        "08_choices": (findings.choices, "ablations"),
        "benchmark": (plots.benchmark, "benchmark"),
        "quality": (frontier.quality, "quality"),
    }
    for name, (draw, *tables) in drawn.items():
        sources = [DATA / "results" / f"{table}.csv" for table in tables]
        missing = [source for source in sources if not source.is_file()]
        if missing:
            say("warning", f"no {missing[0]}, so {name}.png stays as it is")
        else:
            figure = draw(*map(pd.read_csv, sources))
            typer.echo(f"wrote {plots.save_figure(figure, name, REPO / 'figures')}")


@app.command()
def reproduce(
    tables: Annotated[
        bool, take.option("Rewrite the marked tables of README, data/README and docs.", "--tables")
    ] = False,
) -> None:
    """Rewrite the tables of README and docs from data/results."""
    from hat_lib.experiments.registry import all_tables
    from hat_lib.experiments.tables import outdated

    for path, text in outdated(all_tables()).items():
        path.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {path}")
