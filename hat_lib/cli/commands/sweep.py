"""The commands that run whole grids: ``hat sweep | promise | targets | lossless``."""

from __future__ import annotations

import statistics

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.console import app
from hat_lib.config import DATA

RESULTS = DATA / "results"


@app.command()
def sweep(
    out: take.SweepOut,
    capacity: take.SweepCapacities = "0.4,0.55,0.7,0.9",
    exit_rate: take.SweepRates = "0",
    seed: take.SweepSeeds = "0",
    grains: take.Grains = "channel,token",
    texts: take.SweepTexts = "addresses,docstrings",
    variants: take.SweepVariants = "trained,untrained,random,static,cosine,removal,random_exits",
    max_tokens: take.MaxTokens = 4000,
    channel: take.ChannelTrained = take.CHECKPOINTS / "default",
    channel_untrained: take.ChannelUntrained = take.CALIBRATED,
    token: take.TokenTrained = take.CHECKPOINTS / "token",
    token_untrained: take.TokenUntrained = take.CHECKPOINTS / "calibrated_token",
    dtype: take.Dtype = None,
) -> None:
    """Quality over a grid, beside every control at equal work.

    A row is written as soon as it is measured; stopped and started again, a sweep goes on where it was. At its end the
    frontier is drawn beside the file, with 95 % intervals.
    """
    wanted = given.grain_names(grains)
    numbers = {"capacity": given.numbers("--capacity", capacity), "rate": given.numbers("--exit-rate", exit_rate),
               "seed": given.numbers("--seed", seed, int)}  # fmt: skip
    given.check_count("max tokens", max_tokens, 1024)
    sources = given.names("--texts", texts)
    for source in sources:
        given.check_text(source, "test")
    given.check_writable(out.parent, "a sweep")

    import pandas as pd

    from hat_lib.backbone.base import parse_dtype
    from hat_lib.experiments.quality import Grain, quality
    from hat_lib.experiments.sweep import points
    from hat_lib.plotting.frontier import quality as frontier
    from hat_lib.plotting.style import png

    if dtype is not None:
        parse_dtype(dtype)
    axes = {"capacities": numbers["capacity"], "exit_rates": numbers["rate"], "seeds": numbers["seed"],
            "texts": sources, "variants": given.names("--variants", variants), "max_tokens": max_tokens}  # fmt: skip
    plan = {name: points(name, **axes) for name in wanted}
    chosen = {"channel": Grain(channel, channel_untrained), "token": Grain(token, token_untrained)}
    typer.echo(f"{sum(map(len, plan.values()))} points; those that {out} holds are kept")
    for r in quality(out, {n: chosen[n] for n in wanted}, dtype=dtype, points=plan.__getitem__, progress=False):
        typer.echo(
            f"{r.granularity:8} {r.text:12} capacity {r.capacity:.2f} ({r.realised:.3f})  exits {r.exit_rate:.2f} "
            f"({r.realised_exit:.3f})  {r.variant:12} seed {r.seed}  {r.increase:+.2%} "
            f"({r.increase_low:+.2%} to {r.increase_high:+.2%})"
        )
    figure = out.with_suffix(".png")
    figure.write_bytes(png(frontier(pd.read_csv(out))))
    typer.echo(f"wrote {out} and {figure}")


@app.command()
def promise(
    channel: take.ChannelTrained = take.CHECKPOINTS / "default",
    token: take.TokenTrained = take.CHECKPOINTS / "token",
    quality: take.QualityFile = RESULTS / "quality.csv",
    rounds: take.Rounds = 5,
    steps: take.Steps = 64,
    dtype: take.Dtype = None,
    out: take.Out = RESULTS / "published_claims.csv",
) -> None:
    """What was promised beside what is there.

    Both grains; quality from `hat quality`, speed measured now, on the bundled base and on TinyLlama's shape. About a
    quarter of an hour on two quiet cores.
    """
    for name, value in (("rounds", rounds), ("steps", steps)):
        given.check_count(name, value, 1)
    given.check_writable(out.parent, "results")

    from hat_lib.backbone.base import parse_dtype
    from hat_lib.experiments.benchmark import write_rows
    from hat_lib.experiments.published_claims import promise as measure

    if dtype is not None:
        parse_dtype(dtype)
    rows = []
    typer.echo(
        "base              grain    capacity  exits  realised  decode: ideal  dense     hf  prefill: dense     hf"
    )
    for r in measure({"channel": channel, "token": token}, quality, dtype=dtype, rounds=rounds, steps=steps):
        rows.append(r)
        typer.echo(
            f"{r.base:17} {r.granularity:8} {r.capacity:8.2f} {r.exit_rate:6.2f} {r.realised:9.3f} "
            f"{r.ideal_decode:14.2f} {r.decode_dense:6.2f} {r.decode_hf:6.2f} {r.prefill_dense:15.2f} "
            f"{r.prefill_hf:6.2f}"
        )
    write_rows(out, rows)
    typer.echo(f"wrote {out}")


@app.command()
def targets(
    channel: take.ChannelTrained = take.CHECKPOINTS / "default",
    token: take.TokenTrained = take.CHECKPOINTS / "token",
    versus: take.Versus = "dense",
    count: take.PromptCount = 10,
    dtype: take.Dtype = None,
    out: take.Out = RESULTS / "speed_targets.csv",
) -> None:
    """Does a target speedup come true?

    1.05, 1.1, 1.2 and the largest within reach, of both grains, measured on the text that is generated.
    """
    given.check_count("prompts", count, 1)
    given.check_writable(out.parent, "results")

    from hat_lib.backbone.base import parse_dtype
    from hat_lib.experiments.benchmark import write_rows
    from hat_lib.experiments.speed_targets import target_rows
    from hat_lib.inference.speed import check_versus

    check_versus(versus)

    if dtype is not None:
        parse_dtype(dtype)
    rows = []
    for r in target_rows([channel, token], versus=versus, dtype=dtype, count=count):
        rows.append(r)
        found = f"capacity {r.capacity:.3f}, measured {r.measured:.3f}" if r.reachable else f"at most {r.largest:.3f}"
        typer.echo(f"{r.granularity:8} {r.requested:.3f} over {r.versus}: {found}")
    write_rows(out, rows)
    typer.echo(f"wrote {out}")


@app.command()
def lossless(
    checkpoint: take.Drafter = take.CHECKPOINTS / "default",
    capacity: take.DraftCapacity = "0.5",
    count: take.PromptCount = 200,
    max_new_tokens: take.MaxNewTokens = 24,
    dtype: take.Dtype = None,
    out: take.QualityOut = RESULTS / "self_speculative.csv",
) -> None:
    """Is lossless decoding the base's text, and how fast is it?

    Beside plain transformers, our own dense path and transformers' own early-exit drafts, prompt by prompt; a row each.
    """
    given.check_count("prompts", count, 1)
    given.check_count("max new tokens", max_new_tokens, 2)
    share, _ = given.check_shares(capacity, None)
    given.check_writable(out.parent, "results")

    from hat_lib.backbone.base import parse_dtype
    from hat_lib.experiments.rows import read_rows
    from hat_lib.experiments.self_speculative import LosslessRow, lossless_rows

    if dtype is not None:
        parse_dtype(dtype)
    how = {"capacity": share, "dtype": dtype, "count": count, "max_new_tokens": max_new_tokens}
    for r in lossless_rows(out, checkpoint, **how):
        kept = "" if r.identical else f"; parts at {r.parted_at}, gap {r.gap_ulp:.1f} ulp"
        typer.echo(
            f"{r.prompt:4} {r.kind:10} {r.accepted} of {r.drafted} drafts, {r.ms_dense / r.ms_lossless:.2f}x{kept}"
        )
    rows = read_rows(out, LosslessRow)
    for key in sorted({(r.granularity, r.capacity, r.dtype) for r in rows}):
        mine = [r for r in rows if (r.granularity, r.capacity, r.dtype) == key]
        drafted, accepted = sum(r.drafted for r in mine), sum(r.accepted for r in mine)
        over = {}
        for name in ("dense", "hf", "early_exit"):
            times = [(getattr(r, f"ms_{name}"), r.ms_lossless) for r in mine]
            over[name] = statistics.median(ms / ours for ms, ours in times if ms is not None)
        typer.echo(
            f"{' '.join(map(str, key))}: {sum(r.identical for r in mine)} of {len(mine)} identical; "
            f"{accepted / max(1, drafted):.0%} accepted; {over['dense']:.2f}x over our dense path, "
            f"{over['hf']:.2f}x over transformers, {over['early_exit']:.2f}x over its early-exit drafts"
        )
    typer.echo(f"wrote {out}")
