"""``hat evaluate``: quality compared with the base's, on a text or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hat_lib import __version__
from hat_lib.cli import options
from hat_lib.cli.options import option
from hat_lib.config import HatError, work_text
from hat_lib.text.plain import printable

if TYPE_CHECKING:
    from hat_lib.hat import HierarchicalTransformer

FOUR_BIT = "the bundled base is a 4-bit file, dequantised; its perplexity is not that of the published weights"


def evaluate(
    base: str | None = options.BASE,
    checkpoint: Path | None = options.CHECKPOINT,
    text: str = options.TEXT,
    split: str | None = options.SPLIT,
    capacity: str | None = options.CAPACITY,
    exit_rate: str | None = options.EXIT_RATE,
    max_tokens: int = options.MAX_TOKENS,
    documents: bool = option(False, "Also a line for each document.", "--documents"),
    tasks: str | None = option(
        None, "Instead of a text: lm-evaluation-harness tasks (address_cloze), comma-separated."
    ),
    tasks_path: Path | None = option(None, "Folder of tasks (YAML); Python they name is run. [default: data/tasks]"),
    batch_size: int = option(1, "Blocks or requests a forward; changes no result beyond rounding.", min=1),
    dtype: str | None = options.DTYPE,
    threads: int | None = options.THREADS,
    as_json: bool = option(False, "Print one JSON object on stdout and nothing else.", "--json"),
) -> None:
    """Perplexity against the base, with its 95 % interval.

    Both are scored on the same blocks, and the interval is paired. Or, with --tasks, scores of lm-evaluation-harness,
    the base's beside the model's.
    """
    options.start(threads)
    if tasks is None:
        if tasks_path is not None:
            raise HatError("--tasks-path needs --tasks NAME[,NAME]")
        options.check_text(text, split)
        hat = options.load(base, checkpoint, capacity, exit_rate, dtype)
        row, lines = _on_text(hat, text, split, max_tokens, batch_size, documents)
    else:
        if documents or (text, split, max_tokens) != (options.TEXT.default, None, options.MAX_TOKENS.default):
            raise HatError("--tasks brings its own text: leave out --text, --split, --max-tokens and --documents")
        from hat_lib.evaluation.lm_eval import TASKS, load_tasks

        loaded = load_tasks(options.names("--tasks", tasks), tasks_path or TASKS)
        hat = options.load(base, checkpoint, capacity, exit_rate, dtype)
        row, lines = _on_tasks(hat, loaded, batch_size)
    shares = ("requested_capacity", "capacity", "requested_exit_rate", "exit_rate", "model_share")
    lines.append(f"work         {work_text(*map(row.get, shares))} of the base's work, head and routers included")
    if row["note"]:
        lines.append(f"note         {row['note']}")
    typer.echo(json.dumps(row) if as_json else "\n".join(lines))


def _on_text(
    hat: HierarchicalTransformer, text: str, split: str | None, max_tokens: int, batch_size: int, documents: bool
) -> tuple[dict, list[str]]:
    """What was measured, for a program and for a reader."""
    from hat_lib.evaluation.intervals import NONE
    from hat_lib.evaluation.perplexity import bits_per_byte, by_document, compare, score_each, text_bytes
    from hat_lib.text.blocks import default_split, load_text, text_hash

    split = split or default_split(text, hat)
    blocks = load_text(text, hat.base.tokenizer, split=split, max_tokens=max_tokens)
    dense, (adaptive,) = score_each(hat, blocks, batch_size=batch_size)
    paired, sizes = compare(dense, adaptive), text_bytes(blocks, hat.base.tokenizer)
    table, n_bytes = by_document(blocks, sizes, dense, adaptive), int(sizes.sum())
    share, extent = options.measured(text, split, paired.tokens, n_bytes)
    low, high = (None, None) if math.isnan(paired.low) else (paired.low, paired.high)
    row = _about(hat, adaptive.capacity, adaptive.exit_rate, adaptive.model_share) | {
        "text": text,
        "split": split,
        "text_hash": text_hash(blocks)[:16],
        "tokens": paired.tokens,
        "blocks": paired.n_blocks,
        "bytes": n_bytes,
        "share_of_text": share,
        "base_perplexity": paired.base_ppl,
        "perplexity": paired.ppl,
        "increase": paired.increase,
        "increase_low": low,
        "increase_high": high,
        "base_bits_per_byte": bits_per_byte(dense.nll.sum(), n_bytes),
        "bits_per_byte": bits_per_byte(adaptive.nll.sum(), n_bytes),
        "top1": adaptive.top1,
        "kl": adaptive.kl,
        "depth": adaptive.depth,
        "exits": {depth: int(adaptive.exits[depth]) for depth in (*hat.config.exit_layers, hat.config.n_layers)},
        "documents": table.to_dict("records"),
    }
    interval = f"{NONE} of up to 512 tokens, got {paired.n_blocks}; bring more text or raise --max-tokens"
    if low is not None:
        interval = f"95 % interval {low:+.2%} to {high:+.2%}"
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
    return row, lines


def _on_tasks(hat: HierarchicalTransformer, tasks: dict, batch_size: int) -> tuple[dict, list[str]]:
    import lm_eval
    import pandas as pd

    from hat_lib.evaluation.lm_eval import run_tasks

    rows, spent = run_tasks(hat, tasks, batch_size=batch_size)
    row = _about(hat, *spent.shares) | {"lm_eval": lm_eval.__version__, "batch_size": batch_size}
    row["tasks"] = [asdict(r) for r in rows]
    base = [_estimate(r.base, r.base_stderr) for r in rows]
    model = [_estimate(r.value, r.stderr) for r in rows]
    table = pd.DataFrame(row["tasks"]).assign(base=base, model=model)
    return row, [table.to_string(columns=["task", "metric", "base", "model", "samples"], index=False)]


def _about(hat: HierarchicalTransformer, capacity: float, exit_rate: float, model_share: float) -> dict:
    from hat_lib.base.machine import machine

    return machine(hat.base) | {
        "hat_lib": __version__,
        "base_fingerprint": hat.base.fingerprint[:16],
        "granularity": hat.config.granularity,
        "calibrated_on": hat.calibration.text if hat.calibration else "",
        "requested_capacity": hat.capacity,
        "capacity": capacity,
        "requested_exit_rate": hat.exit_rate,
        "exit_rate": exit_rate,
        "model_share": model_share,
        "note": FOUR_BIT if hat.base.name == "bundled" else "",
    }


def _estimate(value: float | None, stderr: float | None = None) -> str:
    return "-" if value is None else f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
