"""The command that looks into routing: ``hat analyze``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.console import app, say
from hat_lib.config import HatError

if TYPE_CHECKING:
    import pandas as pd


@app.command()
def analyze(
    base: take.Base = None,
    checkpoint: take.Checkpoint = None,
    text: take.Text = "addresses",
    split: take.Split = "test",
    capacity: take.Capacity = None,
    exit_rate: take.ExitRate = None,
    max_tokens: take.MaxTokens = 4000,
    dtype: take.Dtype = None,
    out: take.AnalysisOut = None,
) -> None:
    """Which tokens get how much, where in the model, and how hard they are.

    By class, position, surprisal, entropy and layer, with 95 % intervals; then the beginning of the text, coloured by
    the work that each token got.
    """
    given.check_count("max tokens", max_tokens, 2)
    given.check_shares(capacity, exit_rate)
    given.check_text(text, split)
    if out is not None:
        given.check_writable(out, "an analysis")
    hat = given.load(base, checkpoint, capacity, exit_rate, dtype)

    from hat_lib.evaluation.routing import patterns
    from hat_lib.evaluation.routing_tables import TABLES
    from hat_lib.plotting.token_heatmap import ansi, html, passages
    from hat_lib.text.blocks import load_text

    found = patterns(hat, load_text(text, hat.base.tokenizer, split=split, max_tokens=max_tokens))
    tables = {name: make(found) for name, make in TABLES.items()}
    tokens, free = found.tokens, found.tokens.loc[~found.tokens["protected"], "model_share"]
    n_blocks = tokens["block"].nunique()
    if n_blocks < 2:
        say("warning", f"intervals need at least 2 blocks of up to 512 tokens, got {len(tokens)} tokens in one")
    typer.echo(
        f"{text}, {split} split: {len(tokens)} tokens in {n_blocks} blocks\n"
        f"capacity     {hat.capacity:.2f} requested, {found.capacity:.3f} realised\n"
        f"exit rate    {hat.exit_rate:.2f} requested, {found.exit_rate:.3f} realised\n"
        f"model share  {tokens['model_share'].mean():.3f} of the base's work, head and routers included\n"
        "+ or - behind an interval: above or below the mean of all tokens; the difference is clear of its own interval"
    )
    for name, keys in (("classes", ["class"]), ("positions", ["first", "last"]), ("quantiles", ["quantity", "least"])):
        typer.echo(f"\n{name}\n{_by_group(tables[name], keys)}")
    typer.echo(f"\nlayers: executed share, mean ± standard deviation over tokens\n{_by_layer(tables['layers'])}")
    typer.echo(f"\nrank correlations\n{_correlations(tables['correlations'])}\n")

    low, high = free.quantile([0.01, 0.99])
    scale = {"meaning": "share of the base's work that a token got", "low": low, "high": high}
    typer.echo(ansi(*passages(tokens.head(100), "model_share"), **scale))
    if out is None:
        return
    from hat_lib.plotting.routing import FIGURES
    from hat_lib.plotting.style import png

    page = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    files = {f"{name}.csv": _csv(table) for name, table in {"tokens": tokens, **tables}.items()}
    files |= {f"{name}.png": png(draw(tables[name])) for name, draw in FIGURES.items()}
    files["text.html"] = (page + html(*passages(tokens, "model_share"), **scale)).encode()
    _write(out.expanduser(), files)
    typer.echo(f"\nwrote {', '.join(files)} to {out}")


def _by_group(table: pd.DataFrame, keys: list[str]) -> str:
    """A line a group: some of its measures, each with its interval and the sign of its difference."""

    def cell(row) -> str:
        spec = ".1%" if row["measure"] in ("share", "left") else ".3f"
        sign = "+" if row["difference_low"] > 0 else "-" if row["difference_high"] < 0 else " "
        interval = "" if row["low"] != row["low"] else f" ({row['low']:{spec}} to {row['high']:{spec}})"
        return f"{row['mean']:{spec}}{interval} {sign}"

    shown = table[table["measure"] == "share"][[*keys, "tokens"]]
    for measure in ("share", "left", "surprisal_of_token", "kl_of_next"):
        part = table[table["measure"] == measure]
        if part["mean"].any():
            part = part[keys].assign(**{measure: part.apply(cell, axis=1)})
            shown = shown.merge(part, on=keys, how="left").fillna({measure: ""})
    return shown.to_string(index=False, float_format="{:.2f}".format)


def _by_layer(table: pd.DataFrame) -> str:
    cells = [f"{mean:.1%} ± {sd:.1%}" for mean, sd in zip(table["mean"], table["sd"], strict=True)]
    wide = table.assign(cell=cells).pivot(index="layer", columns="site", values="cell")
    return wide[table["site"].unique()].reset_index().to_string(index=False)


def _correlations(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format="{:+.3f}".format)


def _csv(table: pd.DataFrame) -> bytes:
    """Six digits; quotes around every text, for a token may be a line's end."""
    rounded = table.apply(lambda c: c.map(lambda v: float(f"{v:.6g}")) if c.dtype.kind == "f" else c)
    return rounded.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").encode()


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Each file is written beside its place and renamed, so that no reader finds half of one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, payload in files.items():
            part = folder / f".{name}.part"
            part.write_bytes(payload)
            part.replace(folder / name)
    except OSError as error:
        raise HatError(f"cannot write an analysis to {folder}: {error.strerror or error}") from error
