"""``hat analyze``: how compute is distributed over tokens and layers; a five-line summary, and the tables behind it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option, say
from hat_lib.text.plain import cell, printable

if TYPE_CHECKING:
    import pandas as pd

    from hat_lib.evaluation.tokens import TokenTable

QUANTITIES = {"surprisal": "the surprisal of the next token", "kl": "what skipping changed there (KL)"}
PAGE = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'


def analyze(
    base: str | None = options.BASE,
    checkpoint: Path | None = options.CHECKPOINT,
    text: str = options.TEXT,
    split: str | None = options.SPLIT,
    capacity: str | None = options.CAPACITY,
    exit_rate: str | None = options.EXIT_RATE,
    max_tokens: int = options.MAX_TOKENS,
    dtype: str | None = options.DTYPE,
    threads: int | None = options.THREADS,
    tables: bool = option(False, "Also the tables, and the beginning of the text coloured by compute.", "--tables"),
    out: Path | None = option(None, "Also write tables (CSV), figures (PNG) and coloured text (HTML) to this folder."),
) -> None:
    """How compute is distributed over tokens and layers.

    And whether harder tokens get more. Prints a five-line summary; --tables also prints tables by class, position,
    surprisal, entropy and layer, and --out writes all of them. All intervals are 95 % intervals.
    """
    if out is not None:
        options.check_writable(out, "an analysis")
    options.start(threads)
    options.check_text(text, split)
    hat = options.load(base, checkpoint, capacity, exit_rate, dtype)

    from hat_lib.evaluation.intervals import FEWEST, NONE
    from hat_lib.evaluation.routing import TABLES
    from hat_lib.evaluation.tokens import token_table
    from hat_lib.text.blocks import default_split, load_text
    from hat_lib.text.coloured import ansi, html, passages

    split = split or default_split(text, hat)
    found = token_table(hat, load_text(text, hat.base.tokenizer, split=split, max_tokens=max_tokens))
    made = {name: make(found) for name, make in TABLES.items()}
    tokens, n_blocks = found.tokens, found.tokens["block"].nunique()
    if n_blocks < FEWEST:
        say("warning", f"{NONE} of up to 512 tokens, got {n_blocks}")
    _, extent = options.measured(text, split, len(tokens), sum(len(t.encode(errors="replace")) for t in tokens["text"]))
    typer.echo(f"{printable(text)}: {len(tokens)} tokens in {n_blocks} blocks\nmeasured     {extent}")
    typer.echo("\n".join(_findings(found, made)))
    low, high = tokens.loc[~tokens["protected"], "model_share"].quantile([0.01, 0.99])
    scale = {"meaning": "share of the base's work that a token got", "low": low, "high": high}
    if tables:
        for name in ("classes", "positions", "quantiles", "layers", "correlations"):
            typer.echo(f"\n{name}\n{made[name].to_string(index=False, float_format='{:.3f}'.format, na_rep='')}")
        typer.echo("\n" + ansi(*passages(tokens.head(100), "model_share"), **scale))
    if out is not None:
        from hat_lib.plotting.routing import FIGURES
        from hat_lib.plotting.style import png, write

        files = {f"{name}.csv": _csv(table) for name, table in {"tokens": tokens, **made}.items()}
        files |= {f"{name}.png": png(draw(made[name])) for name, draw in FIGURES.items()}
        files["text.html"] = (PAGE + html(*passages(tokens, "model_share"), **scale)).encode()
        for name, payload in files.items():
            write(out.expanduser() / name, payload)
        typer.echo(f"\nwrote {', '.join(files)} to {out}")


def _findings(found: TokenTable, tables: dict[str, pd.DataFrame]) -> list[str]:
    """How much was executed, by which classes and layers, and whether hard tokens got more: one line each."""
    classes, layers, rho = tables["classes"], tables["layers"].query("site == 'all'"), tables["correlations"]
    classes = classes[(classes["measure"] == "share") & (classes["tokens"] >= min(20, classes["tokens"].max()))]
    rho = rho.query("compute == 'share' and quantity in ['surprisal', 'kl'] and of == 'next'").dropna(subset=["rho"])
    hard = [f"{QUANTITIES[r.quantity]} {r.rho:+.2f}{_interval(r.low, r.high, '+.2f')}" for r in rho.itertuples()]
    return [
        f"work         {found.work} of the base's work, head and routers included",
        f"classes      {_extremes(classes, 'class')}",
        f"layers       {_extremes(layers.assign(layer=[f'layer {n}' for n in layers['layer']]), 'layer')}",
        f"difficulty   rank correlation of a token's share with {', with '.join(hard) or 'anything: all are alike'}",
    ]


def _extremes(rows: pd.DataFrame, name: str) -> str:
    ends = rows.loc[rows["mean"].idxmax()], rows.loc[rows["mean"].idxmin()]
    if ends[0]["mean"] == ends[1]["mean"]:
        return f"every {name} ran {ends[0]['mean']:.1%}"
    most, least = (f"{end[name]}, {end['mean']:.1%}{_interval(end['low'], end['high'], '.1%')}" for end in ends)
    return f"most work: {most}, least work: {least}"


def _interval(low: float, high: float, form: str) -> str:
    return "" if low != low else f" ({low:{form}} to {high:{form}})"


def _csv(table: pd.DataFrame) -> bytes:
    """Numbers with six digits, and text that no terminal or spreadsheet will interpret."""
    safe = table.map(lambda value: cell(value) if isinstance(value, str) else value)
    return safe.to_csv(index=False, float_format="%.6g", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").encode()
