"""``hat evaluate``: quality beside the base's, on a text or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hat_lib import __version__
from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.console import realised
from hat_lib.cli.options import option
from hat_lib.config import HatError, check_count
from hat_lib.text.plain import printable

if TYPE_CHECKING:
    from hat_lib.model.transformer import HierarchicalTransformer

FOUR_BIT = "the bundled base is a 4-bit file, dequantised; its perplexity is not that of the published weights"
TEXT_OPTIONS = TEXT, SPLIT, MAX_TOKENS = "addresses", None, 4000


def evaluate(
    base: take.Base = None,
    checkpoint: take.Checkpoint = None,
    text: take.Text = TEXT,
    split: take.Split = SPLIT,
    capacity: take.Capacity = None,
    exit_rate: take.ExitRate = None,
    max_tokens: take.MaxTokens = MAX_TOKENS,
    documents: Annotated[bool, option("Also a line for each document.", "--documents")] = False,
    tasks: Annotated[
        str | None,
        option(
            "Instead of a text: tasks of lm-evaluation-harness, comma-separated, such as address_cloze and "
            'address_perplexity. Needs pip install -e ".[eval]".',
            metavar="NAMES",
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        option(
            "Folder of the tasks: YAML files, with their data. Python that a task names is run. [default: data/tasks]",
            metavar="DIR",
        ),
    ] = None,
    batch_size: Annotated[
        int, option("Blocks or requests a forward, at least 1; changes no result beyond rounding.")
    ] = 1,
    dtype: take.Dtype = None,
    as_json: Annotated[bool, option("Print one JSON object on stdout and nothing else.", "--json")] = False,
) -> None:
    """Perplexity against the base, with its 95 % interval.

    Both are scored on the same blocks, and the interval is a paired one. Or, with --tasks, scores of
    lm-evaluation-harness, the base's beside the model's.
    """
    check_count("max tokens", max_tokens, 2)
    check_count("batch size", batch_size, 1)
    if tasks is None:
        if tasks_path is not None:
            raise HatError("--tasks-path needs --tasks NAME[,NAME]")
        given.check_text(text, split)
        hat = given.load(base, checkpoint, capacity, exit_rate, dtype)
        row, told = _on_text(hat, text, split, max_tokens, batch_size, documents)
    else:
        if documents or (text, split, max_tokens) != TEXT_OPTIONS:
            raise HatError("--tasks brings its own text: leave out --text, --split, --max-tokens and --documents")
        from hat_lib.evaluation.lm_eval import TASKS, load_tasks

        loaded = load_tasks(given.names("--tasks", tasks), tasks_path or TASKS)
        hat = given.load(base, checkpoint, capacity, exit_rate, dtype)
        row, told = _on_tasks(hat, loaded, batch_size)
    typer.echo(json.dumps(row) if as_json else told)


def _on_text(
    hat: HierarchicalTransformer, text: str, split: str | None, max_tokens: int, batch_size: int, documents: bool
) -> tuple[dict, str]:
    """What was measured, for a program and for a reader."""
    from hat_lib.evaluation.documents import bits_per_byte, by_document, text_bytes
    from hat_lib.evaluation.perplexity import compare, score_pair
    from hat_lib.text.blocks import default_split, load_text, text_hash

    split = split or default_split(text, hat)
    blocks = load_text(text, hat.base.tokenizer, split=split, max_tokens=max_tokens)
    if len(blocks) < 2:
        tokens = len(blocks[0]["input_ids"])
        raise HatError(
            f"{text}, split {split}: an interval needs at least 2 blocks of up to 512 tokens, got {tokens} tokens: "
            "bring more text (5 % of a file are its split test), name another --split, or raise --max-tokens"
        )
    dense, adaptive = score_pair(hat, blocks, batch_size=batch_size)
    paired, n_bytes = compare(dense, adaptive), text_bytes(blocks, hat.base.tokenizer)
    rows = by_document(blocks, n_bytes, dense, adaptive)
    share, said = given.measured(text, split, paired.tokens, int(n_bytes.sum()))
    row = _about(hat) | {
        "text": text,
        "split": split,
        "text_hash": text_hash(blocks)[:16],
        "tokens": paired.tokens,
        "blocks": paired.n_blocks,
        "bytes": int(n_bytes.sum()),
        "share_of_text": share,
        "capacity": adaptive.capacity,
        "exit_rate": adaptive.exit_rate,
        "model_share": adaptive.model_share,
        "base_perplexity": paired.base_ppl,
        "perplexity": paired.ppl,
        "increase": paired.increase,
        "increase_low": paired.low,
        "increase_high": paired.high,
        "base_bits_per_byte": bits_per_byte(dense.nll.sum(), n_bytes.sum()),
        "bits_per_byte": bits_per_byte(adaptive.nll.sum(), n_bytes.sum()),
        "top1": adaptive.agreement.top1,
        "kl": adaptive.agreement.kl,
        "depth": adaptive.depth,
        "exits": {depth: int(adaptive.exits[depth]) for depth in (*hat.config.exit_layers, hat.config.n_layers)},
        "documents": [asdict(r) for r in rows],
    }
    bits = {name: _estimate(row[name]) for name in ("base_bits_per_byte", "bits_per_byte")}
    lines = [ON_TEXT.format(**row | bits | {"text": printable(text), "measured": said}), *_work(row)]
    if hat.exit_rate:
        total = sum(row["exits"].values())
        lines.append(f"mean depth   {adaptive.depth:.2f} of {hat.config.n_layers} layers")
        lines += [f"  {depth:3d} layers {n:7d} tokens, {n / total:.1%}" for depth, n in row["exits"].items()]
    if documents:
        lines.append("\ntokens    bytes  base ppl       ppl  increase  bits/byte, base  and model  document")
        lines += [
            f"{r.tokens:6d}  {r.bytes:7d}  {r.base_perplexity:8.2f}  {r.perplexity:8.2f}  {r.increase:+8.2%}  "
            f"{_estimate(r.base_bits_per_byte):>15}  {_estimate(r.bits_per_byte):>9}  {printable(r.document)}"
            for r in rows
        ]
    return row, "\n".join(lines)


def _on_tasks(hat: HierarchicalTransformer, tasks: dict, batch_size: int) -> tuple[dict, str]:
    import lm_eval

    from hat_lib.evaluation.lm_eval import run_tasks

    rows, spent = run_tasks(hat, tasks, batch_size=batch_size)
    capacity, exit_rate, model_share = spent.shares
    row = _about(hat) | {
        "lm_eval": lm_eval.__version__,
        "batch_size": batch_size,
        "capacity": capacity,
        "exit_rate": exit_rate,
        "model_share": model_share,
        "tasks": [asdict(r) for r in rows],
    }
    width = max(4, *(len(r.task) for r in rows))
    lines = [f"{'task':{width}}  {'metric':20}  {'base':>20}  {'model':>20}  samples"]
    lines += [
        f"{r.task:{width}}  {r.metric:20}  {_estimate(r.base, r.base_stderr):>20}  "
        f"{_estimate(r.value, r.stderr):>20}  {r.samples:7d}"
        for r in rows
    ]
    return row, "\n".join(lines + _work(row))


ON_TEXT = """\
{text}: {tokens} tokens in {blocks} blocks, SHA-256 {text_hash}
measured     {measured}
perplexity   {base_perplexity:.3f} for the base {base} ({dtype}), {perplexity:.3f} for the model
increase     {increase:+.2%}, 95 % interval {increase_low:+.2%} to {increase_high:+.2%}
bits/byte    {base_bits_per_byte} for the base, {bits_per_byte} for the model
agreement    {top1:.2%} of the base's most likely tokens, KL {kl:.4f} nats a token"""

WORK = """\
capacity     {both}
exit rate    {requested_exit_rate:.2f} requested, {exit_rate:.3f} realised
model share  {model_share:.3f} of the dense model's work, head and routers included"""


def _about(hat: HierarchicalTransformer) -> dict:
    import torch

    return {
        "hat_lib": __version__,
        "base": hat.base.name,
        "base_fingerprint": hat.base.fingerprint[:16],
        "granularity": hat.config.granularity,
        "calibrated_on": hat.calibration.text if hat.calibration else "",
        "requested_capacity": hat.capacity,
        "requested_exit_rate": hat.exit_rate,
        "device": hat.base.device.type,
        "dtype": str(hat.base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "note": FOUR_BIT if hat.base.name == "bundled" else "",
    }


def _work(row: dict) -> list[str]:
    both = realised(row["requested_capacity"], row["capacity"])
    return [WORK.format(**row, both=both)] + ([f"note         {row['note']}"] if row["note"] else [])


def _estimate(value: float | None, stderr: float | None = None) -> str:
    return "-" if value is None else f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
