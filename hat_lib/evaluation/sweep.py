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

from hat_lib.config import WHY, HatError, check_capacity
from hat_lib.evaluation.intervals import FEWEST, NONE
from hat_lib.evaluation.perplexity import compare, score_each
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import default_split, first_ids, load_text, names_file
from hat_lib.text.plain import check_whole

CAPACITIES = (0.4, 0.55, 0.7, 0.9)
OTHER_FILES = (".md", ".rst", ".tex", ".html", ".csv", ".tsv", ".json", ".log", ".pdf", ".docx")
"""text file extensions that `load_text` does not read; a file name with one is not to be measured as if it were text"""
SHOWN = {"index": False, "float_format": "{:.4f}".format}


@dataclass(frozen=True)
class Sweep:
    """Capacities on one text. A notebook shows the table; `hat_lib.plotting.frontier.sweep` draws it."""

    frame: pd.DataFrame = field(repr=False)
    """a row per capacity: ``capacity`` (requested), ``realised``, ``exit_rate`` (realised), ``model_share`` (all work,
    head and routers included, / the base's), ``perplexity``, ``increase`` (over the base's, less 1),
    ``increase_low``, ``increase_high`` (95 % paired bootstrap interval; nan below six blocks), ``kl`` (base ||
    adaptive, nats per token), ``top1`` (share of tokens for which both have the same most likely next token)"""
    text: str
    """name of the text, or its beginning"""
    base: str
    base_perplexity: float
    tokens: int
    """number of scored tokens"""
    blocks: int

    def __str__(self) -> str:
        return f"{self._what()}\n{self.frame.to_string(**SHOWN)}\nrealised differs from requested: {WHY}"

    def _repr_html_(self) -> str:
        table = self.frame.to_html(**SHOWN, border=0)
        return f"<p>{escape(self._what())}</p>{table}<p>realised differs from requested: {WHY}</p>"

    def _what(self) -> str:
        short = "" if self.blocks >= FEWEST else f" ({NONE})"
        return (
            f"{self.base} on {self.text}: {self.tokens} scored tokens in {self.blocks} blocks{short}; "
            f"perplexity of the base {self.base_perplexity:.3f}"
        )


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
        text: a name as for `load_text` (a corpus, a file, a Hub dataset), a text itself (anything with a space or a
            line break that is not a file name), or a list of texts, of blocks of token ids or of rows of `load_text`.
        capacities: requested, in [0.1, 1]; one or several.
        exit_rate: requested at each of them; None means what ``hat`` is set to.
        split: if ``text`` is a name; see `load_text`. None: see `default_split`.
        max_tokens, block_size: how many tokens of a text to measure, and in blocks of how many; given blocks are
            measured as they are.
        batch_size: blocks per forward.

    Raises `HatError` for a bad argument, before anything is run.
    """
    capacities = [check_capacity(c) for c in (capacities if isinstance(capacities, Iterable) else [capacities])]
    if not capacities or len(set(capacities)) < len(capacities):
        raise HatError(f"a sweep needs capacities, each once, got {capacities}")
    settings = [partial(hat.at, c, exit_rate) for c in capacities]
    for setting in settings:  # so that an invalid one is reported before anything is measured
        with setting():
            pass
    name, dataset = _blocks(hat, text, split, max_tokens, block_size)
    base, scores = score_each(hat, dataset, settings, batch_size=batch_size, progress=progress)
    rows = []
    for capacity, found in zip(capacities, scores, strict=True):
        versus = compare(base, found)
        row = {"capacity": capacity, "realised": found.capacity, "exit_rate": found.exit_rate}
        row |= {"model_share": found.model_share, "perplexity": found.perplexity}
        row |= {"increase": versus.increase, "increase_low": versus.low, "increase_high": versus.high}
        rows.append(row | {"kl": found.agreement.kl, "top1": found.agreement.top1})
    what = hat.base.name, base.perplexity, int(base.tokens.sum()), len(dataset)
    return Sweep(pd.DataFrame(rows), name, *what)


def _blocks(hat, text, split: str | None, max_tokens: int | None, block_size: int) -> tuple[str, Sequence[Mapping]]:
    """A name for the text, and its blocks."""
    tokenizer, texts = hat.base.tokenizer, [text] if isinstance(text, str | Path) else list(text)
    for item in texts:
        if isinstance(item, str):
            check_whole("the text", item)
    words = isinstance(text, str) and any(c.isspace() for c in text.strip())
    if words and "\n" not in text.strip():
        words = not (names_file(text) or Path(text).suffix.lower() in OTHER_FILES)
    if isinstance(text, str | Path) and not words:
        split = split or default_split(text, hat)
        rows = load_text(text, tokenizer, split=split, max_tokens=max_tokens, block_size=block_size)
        return f"{text}, {split} split", rows
    rows = []
    for item in texts:
        if isinstance(item, Mapping):
            rows.append(item)
            continue
        ids = first_ids(tokenizer, item, max_tokens) if isinstance(item, str) else list(item)
        size = block_size if isinstance(item, str) else max(1, len(ids))
        rows += [{"input_ids": ids[i : i + size], "n_context": 0} for i in range(0, len(ids), size)]
    name = f'"{" ".join(text.split(None, 6)[:6])} …"' if isinstance(text, str) else f"{len(texts)} texts or blocks"
    return name, [row for row in rows if len(row["input_ids"]) > 1]
