"""What each capacity costs on a text: ``sweep(hat, "addresses", capacities=(0.5, 0.75))``.

The base is run once for all capacities, and every difference from it is paired: same tokens, same blocks. For controls
at equal work, several grains and stored results, see ``hat sweep``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path

import pandas as pd

from hat_lib.config import WHY, check_capacity
from hat_lib.evaluation.intervals import FEWEST, NONE
from hat_lib.evaluation.perplexity import compare, score_each
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import default_split, first_ids, load_text, names_file
from hat_lib.text.plain import check_whole

CAPACITIES = (0.4, 0.55, 0.7, 0.9)


@dataclass(frozen=True)
class Sweep:
    """Capacities on one text. A notebook shows the table; `hat_lib.plotting.frontier.sweep` draws it."""

    frame: pd.DataFrame = field(repr=False)
    """a row per capacity: ``capacity`` (requested), ``realised``, ``exit_rate`` (realised), ``model_share`` (all work,
    head and routers included, / the base's), ``perplexity``, ``increase`` (over the base's, less 1),
    ``increase_low``, ``increase_high`` (95 % paired bootstrap interval; nan below six blocks), ``kl`` (base ||
    adaptive, nats per token), ``top1`` (share of tokens for which both have the same most likely next token)"""
    heading: str
    """base, text, and how much of it was measured"""

    def __str__(self) -> str:
        table = self.frame.to_string(index=False, float_format="{:.4f}".format)
        return f"{self.heading}\n{table}\nrealised differs from requested: {WHY}"

    def _repr_html_(self) -> str:
        table = self.frame.to_html(index=False, float_format="{:.4f}".format, border=0)
        return f"<p>{escape(self.heading)}</p>{table}<p>realised differs from requested: {WHY}</p>"


def sweep(
    hat: HierarchicalTransformer,
    text: str | Path | Sequence = "addresses",
    capacities: float | Sequence[float] = CAPACITIES,
    *,
    exit_rate: float | None = None,
    split: str | None = None,
    max_tokens: int | None = 4000,
    block_size: int = 512,
    batch_size: int = 1,
    progress: bool = True,
) -> Sweep:
    """Perplexity, divergence and work at each capacity, beside the base; ``hat`` is left as it was.

    Args:
        text: a name as for `load_text` (a corpus, a file, a Hub dataset), a text itself (two words or more that are not
            a file's name), or a list of texts, of blocks of token ids or of rows of `load_text`.
        exit_rate: requested at each capacity; None means what ``hat`` is set to.
        split: if ``text`` is a name; see `load_text`. None: see `default_split`.
        max_tokens, block_size: how much of a text to measure, in blocks of how many tokens; given blocks are measured
            as they are.

    Raises `HatError` for a bad argument, before anything is run.
    """
    capacities = [check_capacity(c) for c in (capacities if isinstance(capacities, Iterable) else [capacities])]
    settings = [partial(hat.at, c, exit_rate) for c in capacities]
    for setting in settings:  # so that an invalid one is reported before anything is measured
        with setting():
            pass
    name, blocks = _blocks(hat, text, split, max_tokens, block_size)
    base, scores = score_each(hat, blocks, settings, batch_size=batch_size, progress=progress)
    rows = []
    for capacity, found in zip(capacities, scores, strict=True):
        paired = compare(base, found)
        row = {"capacity": capacity, "realised": found.capacity, "exit_rate": found.exit_rate}
        row |= {"model_share": found.model_share, "perplexity": found.perplexity, "increase": paired.increase}
        row |= {"increase_low": paired.low, "increase_high": paired.high, "kl": found.kl, "top1": found.top1}
        rows.append(row)
    short = "" if len(blocks) >= FEWEST else f" ({NONE})"
    heading = f"{hat.base.name} on {name}: {base.tokens.sum()} scored tokens in {len(blocks)} blocks{short}; perplexity"
    return Sweep(pd.DataFrame(rows), f"{heading} of the base {base.perplexity:.3f}")


def _blocks(hat, text, split: str | None, max_tokens: int | None, block_size: int) -> tuple[str, Sequence[Mapping]]:
    """A name for the text, and its blocks. A string of one word names a text."""
    texts = [text] if isinstance(text, str | Path) else text
    for item in texts:
        if isinstance(item, str):
            check_whole("the text", item)
    if isinstance(text, Path) or (isinstance(text, str) and (names_file(text) or len(text.split()) == 1)):
        split = split or default_split(text, hat)
        rows = load_text(text, hat.base.tokenizer, split=split, max_tokens=max_tokens, block_size=block_size)
        return f"{text}, {split} split", rows
    rows = []
    for item in texts:
        if isinstance(item, str):
            ids = first_ids(hat.base.tokenizer, item, max_tokens)
            parts = [ids[i : i + block_size] for i in range(0, len(ids), block_size)]
            rows += [{"input_ids": part, "n_context": 0} for part in parts]
        else:
            rows.append(item if isinstance(item, Mapping) else {"input_ids": list(item), "n_context": 0})
    name = f'"{" ".join(text.split(None, 6)[:6])} …"' if isinstance(text, str) else f"{len(texts)} texts or blocks"
    return name, [row for row in rows if len(row["input_ids"]) > 1]
