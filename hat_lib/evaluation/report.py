"""What the commands print: what was measured, in lines for a reader and as a row for a program."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from hat_lib import __version__
from hat_lib.base.machine import machine
from hat_lib.config import work_text
from hat_lib.decoding.inference import Generation
from hat_lib.decoding.speed import VERSUS, speedup_text
from hat_lib.evaluation.equal_work import KEY, Point, Row, price_texts, rows
from hat_lib.evaluation.intervals import FEWEST, NONE
from hat_lib.evaluation.perplexity import bits_per_byte, by_document, compare, score_each, text_bytes
from hat_lib.evaluation.tokens import TokenTable
from hat_lib.hat import HierarchicalTransformer
from hat_lib.rows import RowWriter
from hat_lib.text.blocks import default_split, load_text, source_bytes, text_hash
from hat_lib.text.coloured import Passage, ansi, passages
from hat_lib.text.plain import printable
from hat_lib.text.token_classes import pieces

FOUR_BIT = "the bundled base is a 4-bit file, dequantised; its perplexity is not that of the published weights"
QUANTITIES = {"surprisal": "the surprisal of the next token", "kl": "what skipping changed there (KL)"}


def on_text(
    hat: HierarchicalTransformer, text: str, split: str | None, max_tokens: int, batch_size: int, documents: bool
) -> tuple[dict, list[str]]:
    """Perplexity against the base; with a line for each document if ``documents``."""
    split = split or default_split(text, hat)
    blocks = load_text(text, hat.base.tokenizer, split=split, max_tokens=max_tokens)
    dense, (adaptive,) = score_each(hat, blocks, batch_size=batch_size)
    paired, sizes = compare(dense, adaptive), text_bytes(blocks, hat.base.tokenizer)
    table, n_bytes = by_document(blocks, sizes, dense, adaptive), int(sizes.sum())
    share, extent = measured(text, split, paired.tokens, n_bytes)
    row = _about(hat, (adaptive.capacity, adaptive.exit_rate, adaptive.model_share))
    row |= {"text": text, "split": split, "text_hash": text_hash(blocks)[:16], "share_of_text": share}
    row |= {"tokens": paired.tokens, "blocks": paired.n_blocks, "bytes": n_bytes}
    row |= {"base_perplexity": paired.base_ppl, "perplexity": paired.ppl}
    row |= {name: None if math.isnan(value) else value for name, value in paired.ends().items()}
    row |= {"top1": adaptive.top1, "kl": adaptive.kl, "depth": adaptive.depth, "documents": table.to_dict("records")}
    for name, score in (("base_bits_per_byte", dense), ("bits_per_byte", adaptive)):
        row[name] = bits_per_byte(score.nll.sum(), n_bytes)
    row["exits"] = {depth: int(adaptive.exits[depth]) for depth in (*hat.config.exit_layers, hat.config.n_layers)}
    interval = f"95 % interval {paired.low:+.2%} to {paired.high:+.2%}"
    if row["increase_low"] is None:
        interval = f"{NONE} of up to 512 tokens, got {paired.n_blocks}; bring more text or raise --max-tokens"
    lines = [
        f"{printable(text)}: {paired.tokens} tokens in {paired.n_blocks} blocks, SHA-256 {row['text_hash']}",
        f"measured     {extent}",
        f"perplexity   {paired.base_ppl:.3f} for the base {row['base']} ({row['dtype']}), {paired.ppl:.3f} here",
        f"increase     {paired.increase:+.2%}, {interval}",
        f"bits/byte    {_estimate(row['base_bits_per_byte'])} for the base, {_estimate(row['bits_per_byte'])} here",
        f"agreement    {row['top1']:.2%} of the base's most likely tokens, KL {row['kl']:.4f} nats a token",
    ]
    if hat.exit_rate:
        lines.append(f"mean depth   {adaptive.depth:.2f} of {hat.config.n_layers} layers")
        total = sum(row["exits"].values())
        lines += [f"  {depth:3d} layers {n:7d} tokens, {n / total:.1%}" for depth, n in row["exits"].items()]
    if documents:
        table["document"] = table["document"].map(printable)
        lines.append("\n" + table.to_string(index=False, float_format="{:.4f}".format) + "\n")
    return row, lines + _work(row)


def on_tasks(hat: HierarchicalTransformer, tasks: Mapping, batch_size: int) -> tuple[dict, list[str]]:
    """Scores of lm-evaluation-harness, the base's beside the model's; ``tasks`` are from `load_tasks`."""
    import lm_eval

    from hat_lib.evaluation.lm_eval import run_tasks

    scores, spent = run_tasks(hat, tasks, batch_size=batch_size)
    row = _about(hat, spent.shares) | {"lm_eval": lm_eval.__version__, "batch_size": batch_size}
    row["tasks"] = [asdict(r) for r in scores]
    base = [_estimate(r.base, r.base_stderr) for r in scores]
    model = [_estimate(r.value, r.stderr) for r in scores]
    table = pd.DataFrame(row["tasks"]).assign(base=base, model=model)
    lines = [table.to_string(columns=["task", "metric", "base", "model", "samples"], index=False)]
    return row, lines + _work(row)


def on_tokens(found: TokenTable, tables: Mapping[str, pd.DataFrame], text: str, split: str) -> list[str]:
    """How much was executed, by which classes and layers, and whether hard tokens got more: one line each. Warns of a
    text too short for intervals; ``tables`` are by the names of `routing.TABLES`."""
    n_blocks = found.tokens["block"].nunique()
    if n_blocks < FEWEST:
        warnings.warn(f"{NONE} of up to 512 tokens, got {n_blocks}", stacklevel=2)
    tokens, classes, layers = found.tokens, tables["classes"], tables["layers"].query("site == 'all'")
    classes = classes[(classes["measure"] == "share") & (classes["tokens"] >= min(20, classes["tokens"].max()))]
    layers = layers.assign(layer=[f"layer {n}" for n in layers["layer"]])
    rho = tables["correlations"].dropna(subset=["rho"])
    rho = rho.query("compute == 'share' and quantity in ['surprisal', 'kl'] and of == 'next'")
    hard = [f"{QUANTITIES[r.quantity]} {r.rho:+.2f}{_interval(r.low, r.high, '+.2f')}" for r in rho.itertuples()]
    _, extent = measured(text, split, len(tokens), sum(len(t.encode(errors="replace")) for t in tokens["text"]))
    return [
        f"{printable(text)}: {len(tokens)} tokens in {n_blocks} blocks",
        f"measured     {extent}",
        f"work         {found.work} of the base's work, head and routers included",
        f"classes      {_extremes(classes, 'class')}",
        f"layers       {_extremes(layers, 'layer')}",
        f"difficulty   rank correlation of a token's share with {', with '.join(hard) or 'anything: all are alike'}",
    ]


def tables_of_tokens(found: TokenTable, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The tables, and the beginning of the text coloured by compute."""
    names = ("classes", "positions", "quantiles", "layers", "correlations")
    form = {"index": False, "float_format": "{:.3f}".format, "na_rep": ""}
    lines = [f"\n{name}\n{tables[name].to_string(**form)}" for name in names]
    return [*lines, "\n" + ansi(*passages(found.tokens.head(100), "model_share"), **colours(found))]


def colours(found: TokenTable) -> dict:
    """What the colours of a text mean: its tokens' share of the work, from a low one to a high one."""
    low, high = found.tokens.loc[~found.tokens["protected"], "model_share"].quantile([0.01, 0.99])
    return {"meaning": "share of the base's work that a token got", "low": low, "high": high}


def on_generation(out: Generation, decoding: str) -> list[str]:
    """What one text took; ``decoding`` is the path that it was decoded on."""
    lossless = bool(out.speculation)
    realised = {"capacity": out.capacity, "exit_rate": out.exit_rate}
    work = work_text(**vars(out) | realised | ({"model_share": out.draft_share} if lossless else {}))
    spent = f"{out.new_tokens} new tokens, {out.tokens_per_second:.1f} tokens/s; {decoding}"
    lines = [f"[{'drafts alone: ' if lossless else ''}{work}; {spent}]"]
    speedup = speedup_text(out.realised_speedup, VERSUS[out.versus])
    if out.predicted_speedup is not None:
        low, high = out.predicted_range
        predicted = f"{out.predicted_speedup:.3f} predicted ({low:.3f} to {high:.3f} when measured)"
        lines.append(f"[speedup {out.target_speedup:g} requested, {predicted}; realised: {speedup}]")
    if lossless:
        (speculation,) = out.speculation
        read = f"{1 / speculation.ideal_speedup:.2f} times the weights it reads"
        lines.append(
            f"[lossless: {speculation.drafted} drafted, {out.acceptance:.0%} accepted, {speculation.passes} passes of "
            f"the base; with verification {out.model_share:.2f} times the dense model's work and {read}; {speedup}]"
        )
    return lines


def new_tokens(hat: HierarchicalTransformer, out: Generation) -> str:
    """The new tokens of one text, coloured by their compute."""
    tokens = pieces(hat.base.tokenizer, out.ids[0, out.prompt_length :].tolist())
    passage = Passage("new tokens", tokens, out.token_share[0, out.prompt_length - 1 :].tolist())
    return ansi(passage, meaning="compute spent predicting the token, as a share of the dense model's")


def price(hat: HierarchicalTransformer, capacity: float, weights: str) -> str:
    """What is known about the perplexity at a capacity, before any text is generated at it."""
    more = "" if weights == "base" else f", and what {weights} costs, see `python -m studies decode`"
    if capacity == 1:
        return "the base's perplexity" + more
    if known := price_texts(hat.prices, capacity):
        return "perplexity about " + ", ".join(f"{increase} on {text}" for text, increase in known.items()) + more
    return f"what that costs was not measured, see `hat evaluate --capacity {capacity:.2f}`" + more


def measured(source: str, split: str, tokens: int, n_bytes: int) -> tuple[float | None, str]:
    """The share of the whole text that ``n_bytes`` are, None if unknown; and the same in words."""
    whole = source_bytes(source, "all")
    if not whole or not n_bytes:
        return None, f"{tokens:,} tokens, split {split}"
    share = min(1.0, n_bytes / whole)
    if share > 0.995:
        return share, f"{tokens:,} tokens, the whole text"
    return share, f"{tokens:,} tokens, {share:.1%} of the text, split {split}; see --split and --max-tokens"


def _about(hat: HierarchicalTransformer, shares: tuple[float, float, float]) -> dict:
    """What ran, and where; ``shares`` are the realised capacity, exit rate and model share."""
    capacity, exit_rate, model_share = shares
    row = machine(hat.base) | {"hat_lib": __version__, "base_fingerprint": hat.base.fingerprint[:16]}
    row |= {"granularity": hat.config.granularity, "calibrated_on": hat.calibration.text if hat.calibration else ""}
    row |= {"requested_capacity": hat.capacity, "capacity": capacity, "model_share": model_share}
    row |= {"requested_exit_rate": hat.exit_rate, "exit_rate": exit_rate}
    return row | {"note": FOUR_BIT if hat.base.name == "bundled" else ""}


def _work(row: Mapping) -> list[str]:
    lines = [f"work         {work_text(**row)} of the base's work, head and routers included"]
    return lines + ([f"note         {row['note']}"] if row["note"] else [])


def on_grid(out: Path, checkpoints: Mapping, points: Sequence[Point], dtype: str | None) -> Iterator[str]:
    """Measure the ``points`` that the file ``out`` lacks; each row is written before its line is given."""
    with RowWriter(out, Row, KEY) as writer:
        for r in rows(writer.done, checkpoints, points, dtype, out):
            writer.write(r)
            interval = NONE if r.increase_low is None else f"{r.increase_low:+.2%} to {r.increase_high:+.2%}"
            yield (
                f"{r.granularity:8} {r.text:12} capacity {r.capacity:.2f} ({r.realised:.3f})  exits {r.exit_rate:.2f} "
                f"({r.realised_exit:.3f})  {r.variant:12} seed {r.seed}  {r.increase:+.2%} ({interval})"
            )


def _estimate(value: float | None, stderr: float | None = None) -> str:
    return "-" if value is None else f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _extremes(rows: pd.DataFrame, name: str) -> str:
    ends = rows.loc[rows["mean"].idxmax()], rows.loc[rows["mean"].idxmin()]
    if ends[0]["mean"] == ends[1]["mean"]:
        return f"every {name} ran {ends[0]['mean']:.1%}"
    most, least = (f"{end[name]}, {end['mean']:.1%}{_interval(end['low'], end['high'], '.1%')}" for end in ends)
    return f"most work: {most}, least work: {least}"


def _interval(low: float, high: float, form: str) -> str:
    return "" if low != low else f" ({low:{form}} to {high:{form}})"
