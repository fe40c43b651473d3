"""``hat sweep``: quality over a whole grid."""

from __future__ import annotations

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.console import app


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
    from hat_lib.experiments.quality import KEY, Grain, Row, grid, measure
    from hat_lib.experiments.rows import RowWriter
    from hat_lib.plotting.frontier import quality as frontier
    from hat_lib.plotting.style import png

    if dtype is not None:
        parse_dtype(dtype)
    axes = {"capacities": numbers["capacity"], "exit_rates": numbers["rate"], "seeds": numbers["seed"],
            "texts": sources, "variants": given.names("--variants", variants), "max_tokens": max_tokens}  # fmt: skip
    plan = {name: grid(name, **axes) for name in wanted}
    chosen = {"channel": Grain(channel, channel_untrained), "token": Grain(token, token_untrained)}
    typer.echo(f"{sum(map(len, plan.values()))} points; those that {out} holds are kept")
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
