"""What each capacity costs on a text: ``sweep(hat, "addresses", capacities=(0.5, 0.75))``.

A policy of your own is measured beside random decisions at its work: ``policies={"mine": policy}``. For the other
controls, several grains and stored results, see ``hat sweep``.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path

import pandas as pd

from hat_lib.config import WHY, HatError, check_capacity, shown
from hat_lib.evaluation.choices import Random
from hat_lib.evaluation.controls import matched, own_choice, under, work_on
from hat_lib.evaluation.intervals import FEWEST, NONE
from hat_lib.evaluation.perplexity import columns, score_each
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.setting import Policy
from hat_lib.text.blocks import default_split, first_ids, load_text, names_file
from hat_lib.text.plain import check_whole

CAPACITIES = (0.4, 0.55, 0.7, 0.9)
METHOD = "method"
COLUMNS = ["decides", "capacity", "realised", "exit_rate", "model_share", "perplexity", "increase", "increase_low",
           "increase_high", "kl", "top1"]  # fmt: skip
Setting = tuple[str, float, Callable]  # what decides, the capacity that is asked for, and the context


@dataclass(frozen=True)
class Sweep:
    """Capacities on one text. A notebook shows the table; `studies.plotting.notebooks.sweep` draws it."""

    frame: pd.DataFrame = field(repr=False)
    """a row per capacity and policy: ``decides`` (what decides), ``capacity`` (requested; nan for a policy of your
    own), ``realised``, ``exit_rate`` (realised), ``model_share`` (all work / the base's), ``perplexity``, ``increase``
    (over the base's, less 1), ``increase_low``, ``increase_high`` (95 % paired interval; nan below six blocks), ``kl``
    (base || adaptive, nats per token), ``top1`` (share of tokens with the base's most likely next token)"""
    heading: str  #: base, text, and how much of it was measured

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
    policies: Mapping[str, Policy] | None = None,
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
        policies: decisions of your own, by name. Each decides alone: no exits, no corrections, the head in full. So do
            ``random at NAME`` and, if ``hat`` is calibrated, ``method at NAME``, at the work of this policy.
        exit_rate: requested at each capacity; None means what ``hat`` is set to.
        split: of a text that is named; see `load_text`. None: see `default_split`.
        max_tokens, block_size: how much of a text to measure, in blocks of how many tokens.

    Raises `HatError` for a bad argument before anything is run, and inside ``hat.using(...)``. Warns where nothing else
    can do the work of a policy.

    >>> found = sweep(hat, rows, [1.0, 0.5], progress=False)
    >>> found.frame["realised"].round(1).tolist()
    [1.0, 0.5]
    """
    if hat.controlled:
        raise HatError("inside hat.using(...) no capacity is realised: leave it, and pass policies={name: policy}")
    policies = {} if policies is None else policies
    _check(policies)
    capacities = [check_capacity(c) for c in (capacities if isinstance(capacities, Iterable) else [capacities])]
    settings: list[Setting] = [(METHOD, c, partial(hat.at, c, exit_rate)) for c in capacities]
    for *_, setting in settings:  # so that an invalid one is reported before anything is measured
        with setting():
            pass
    if not settings and not policies:
        raise HatError("nothing to measure: expected at least one capacity or policy")
    name, blocks = _blocks(hat, text, split, max_tokens, block_size)
    settings += _beside(hat, blocks, policies) if policies else []
    around = [setting for *_, setting in settings]
    base, scores = score_each(hat, blocks, around, batch_size=batch_size, progress=progress)
    rows = [{"decides": decides, "capacity": capacity} | columns(base, found)
            for (decides, capacity, _), found in zip(settings, scores, strict=True)]  # fmt: skip
    frame = pd.DataFrame(rows).rename(columns={"realised_exit": "exit_rate", "ppl": "perplexity"})[COLUMNS]
    short = "" if len(blocks) >= FEWEST else f" ({NONE})"
    heading = f"{hat.base.name} on {name}: {base.tokens.sum()} scored tokens in {len(blocks)} blocks{short}; perplexity"
    return Sweep(frame, f"{heading} of the base {base.perplexity:.3f}")


def _check(policies: object) -> None:
    if not isinstance(policies, Mapping):
        raise HatError(f"policies must be a dict from names to policies, got {type(policies).__name__}")
    for name, policy in policies.items():
        if not isinstance(name, str) or name == METHOD or " at " in name:
            raise HatError(f"a policy needs a name of its own, such as 'mine', got {name!r}")
        if isinstance(policy, type) or not callable(policy):
            raise HatError(
                f"policy {name!r} must be called as policy(layer, site, x, rows, trace), got {shown(policy)}"
            )


def _beside(hat: HierarchicalTransformer, blocks: Sequence[Mapping], policies) -> Iterator[Setting]:
    """Each policy alone, and others at its work."""
    families = {"random": Random}
    if hat.calibration is not None:
        families[METHOD] = own_choice(hat)
    for name, policy in policies.items():
        around = under(hat, policy)
        capacity = work_on(hat, blocks, around).shares[0]
        yield name, math.nan, around
        for other, family in families.items():
            try:
                yield f"{other} at {name}", capacity, under(hat, matched(hat, family, blocks, capacity))
            except HatError as error:
                warnings.warn(f"no row for {other} at the work of {name}, {capacity:.3f}: {error}", stacklevel=3)


def _blocks(hat, text, split: str | None, max_tokens: int | None, block_size: int) -> tuple[str, Sequence[Mapping]]:
    """A name for the text, and its blocks. A string of one word names a text."""
    if isinstance(text, Path) or (isinstance(text, str) and (names_file(text) or len(text.split()) == 1)):
        split = split or default_split(text, hat)
        rows = load_text(text, hat.base.tokenizer, split=split, max_tokens=max_tokens, block_size=block_size)
        return f"{text}, {split} split", rows
    rows, texts = [], [text] if isinstance(text, str) else text
    for number, item in enumerate(texts):
        if isinstance(item, str):
            check_whole("the text", item)
            ids = first_ids(hat.base.tokenizer, item, max_tokens)
            parts = [ids[i : i + block_size] for i in range(0, len(ids), block_size)]
            rows += [{"input_ids": part, "doc": f"text {number}", "n_context": 0} for part in parts]
        else:
            rows.append(item if isinstance(item, Mapping) else {"input_ids": list(item), "n_context": 0})
    name = f'"{" ".join(text.split(None, 6)[:6])} …"' if isinstance(text, str) else f"{len(texts)} texts or blocks"
    return name, [row for row in rows if len(row["input_ids"]) > 1]
