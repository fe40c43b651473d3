"""Text as it is generated, dense and at several capacities side by side, each token coloured by its work."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd
from ipywidgets import HTML, Button, Dropdown, GridBox, Layout, Text, Textarea
from matplotlib.figure import Figure

from hat_lib.config import WHY, HatError, check_capacity
from hat_lib.evaluation.coloured_text import Passage, html
from hat_lib.evaluation.tokens import quoted
from hat_lib.inference.generate import MODES, AdaptiveInference, Generation
from hat_lib.model.cost import state_cost
from hat_lib.plotting.token_heatmap import figure
from hat_lib.text.token_classes import pieces
from hat_lib.workbook.view import LET_GO, LOOK, View, exit_slider

DENSE = {"capacity": 1.0, "exit_rate": 0.0}
SCALE = {
    "meaning": "framed: first token unlike dense; share of the dense work:",
    "low": 0.4,
    "high": 1.0,
}
"""the same for all capacities, so that texts can be compared by eye"""
UNNAMED = SCALE | {"meaning": ""}
MOST = 4
"""capacities beside the dense text; there is no room for more"""
REPEATS, STRETCH = 3, 8
"""turns in which each way is timed, and new tokens per turn"""


class GenerateView(View):
    """A prompt, capacities and a mode → the dense text and one for each capacity, and how fast they come.

    Nothing runs until the button is pressed or a control is changed. A text replaces the old one when its first token
    arrives. Then the first tokens after the same prompt are timed, each way `REPEATS` times in turns, with nothing
    being shown meanwhile. Changes made while it runs are answered next, at their latest value.

    Args:
        infer: after each answer, its model is left at the capacity and exit rate it had.
        prompt, capacities: to begin with.
        max_new_tokens: of each text.
    """

    def __init__(
        self,
        infer: AdaptiveInference,
        prompt: str = "The future of AI is",
        capacities: Sequence[float] = (0.9, 0.7, 0.55),
        max_new_tokens: int = 40,
    ):
        self._infer, self._tokens = infer, max_new_tokens
        self._dense: tuple[str, Generation] | None = None
        self._found: list[Generation] = []
        self._passages: list[Passage] = []
        self.table = pd.DataFrame()
        """a row per text: how fast it came, what it executed and where it parts from the dense text. In lossless mode
        drafts are told apart, and the model share is that of all that ran, verification included"""
        self.prompt = Textarea(prompt, description="Prompt", rows=2, **LET_GO)
        self.capacities = Text(", ".join(f"{c:g}" for c in capacities), description="Capacities", **LET_GO)
        self.exit_rate = exit_slider(infer.hat.exit_rate)
        self.mode = Dropdown(description="Mode", options=MODES, **LOOK)
        self.button = Button(description="Generate", button_style="primary")
        self.button.on_click(self._update)
        self.texts = GridBox(layout=Layout(grid_template_columns="repeat(auto-fit, minmax(13em, 1fr))", grid_gap="1em"))
        legend, self.numbers = HTML(html(**SCALE)), HTML()
        controls = [self.prompt, self.capacities, self.exit_rate, self.mode, self.button]
        super().__init__(controls, legend, self.texts, self.numbers)
        self._say("ready", "press Generate, or change a control")

    def _update(self, _event=None) -> None:
        # Only the button: clicks would queue up, whereas ipywidgets sends only the last of a control's values. And a
        # disabled control loses its keys to the notebook, where an arrow key folds the section.
        self.button.disabled = True
        with self._told():
            ways, prompt = self._ways(), self.prompt.value
            self._say("busy", "generating: dense")
            if self._dense is None or self._dense[0] != prompt:
                self._dense = prompt, self._stream(prompt, [], "dense", DENSE)
            found = [self._dense[1]]
            for name, way in ways.items():
                self._say("busy", f"generating: {name}")
                found.append(self._stream(prompt, found, name, way))
            self.texts.children = self.texts.children[: len(found)]
            self._say("busy", "timing the same prompt again, in turns")
            speeds = self._speeds(prompt, [DENSE, *ways.values()])
            named = zip(["dense", *ways], found, strict=True)
            self._found, self._passages = found, [self._passage(*each, found[0]) for each in named]
            self.table = _table(self._passages, found, speeds)
            self.numbers.value = _page(self.table)
            self._say("ready", escape(self.remark))
        self.button.disabled = False

    @property
    def remark(self) -> str:
        """A remark on the last answer as a whole."""
        off = any(abs(g.capacity - g.requested_capacity) >= 0.005 for g in self._found[1:])
        why = f"; realised capacity is not what was asked: {WHY}" if off else ""
        return f"tokens/s: median, slowest and fastest of {REPEATS} stretches of {STRETCH} tokens, in turns{why}"

    def twin(self) -> Figure:
        """The last answer as a picture. Raises `HatError` if there is none."""
        if not self._found:
            raise HatError("no answer to draw: press Generate first")
        return figure(*self._passages, **SCALE)

    def _ways(self) -> dict[str, dict]:
        """Settings of the texts next to the dense one, by name."""
        given = [part.strip() for part in self.capacities.value.replace(";", ",").split(",")]
        capacities = list(dict.fromkeys(check_capacity(part) for part in given if part))
        if not 1 <= len(capacities) <= MOST:
            raise HatError(f"expected 1 to {MOST} capacities, such as 0.9, 0.55, got {self.capacities.value!r}")
        mode, rate = self.mode.value, self.exit_rate.value
        exits = f", exits {rate:.2f}" if rate else ""
        title = "capacity {:.2f}" if mode == "adaptive" else "lossless, drafts at {:.2f}"
        return {title.format(c) + exits: {"capacity": c, "exit_rate": rate, "mode": mode} for c in capacities}

    def _stream(self, prompt: str, before: list[Generation], name: str, way: dict) -> Generation:
        """Show a text after those before it, as it is generated; in lossless mode tokens have no work of their own to
        be coloured by."""
        ids, values, tokenizer = [], [], self._infer.hat.base.tokenizer
        coloured, dense = bool(before) and way["mode"] == "adaptive", before[0] if before else None

        def on_token(token: int) -> None:
            ids.append(token)
            values.append(self._work() if coloured else np.nan)
            passage = Passage(name, pieces(tokenizer, ids), values, _parting(ids, dense, ended=False))
            side.value = html(passage, **UNNAMED)

        while len(self.texts.children) <= len(before):
            self.texts.children += (HTML(),)
        side = self.texts.children[len(before)]
        found = self._generate(prompt, self._tokens, way, on_token)
        side.value = html(self._passage(name, found, dense), **UNNAMED)
        return found

    def _work(self) -> float:
        """Executed share of the latest token's work."""
        hat = self._infer.hat
        cost = state_cost(hat, hat.trace)
        return float((cost.executed / cost.dense)[0, -1])

    def _speeds(self, prompt: str, ways: list[dict]) -> np.ndarray:
        """Tokens per second after the first, ``[way, REPEATS]``; nan if a text ends at once."""
        speeds = np.full((len(ways), REPEATS), np.nan)
        for turn in range(REPEATS):
            for row in range(len(ways))[:: 1 if turn % 2 else -1]:
                times: list[float] = []
                self._generate(prompt, STRETCH, ways[row], lambda _, times=times: times.append(time.perf_counter()))
                if len(times) > 1 and times[-1] > times[0]:
                    speeds[row, turn] = (len(times) - 1) / (times[-1] - times[0])
        return speeds

    def _generate(self, prompt: str, tokens: int, way: dict, on_token) -> Generation:
        how = {"max_new_tokens": tokens, "measure": False, "streamer": _EachToken(on_token)}
        return self._infer.generate(prompt, **how, **way)

    def _passage(self, name: str, found: Generation, dense: Generation | None) -> Passage:
        ids = found.ids[0, found.prompt_length :].tolist()
        values = np.full(len(ids), np.nan)
        if dense is not None and found is not dense and found.token_share is not None:
            values = found.token_share[0, found.prompt_length - 1 :].numpy(force=True)
        tokens = pieces(self._infer.hat.base.tokenizer, ids)
        return Passage(name, tokens, values.tolist(), _parting(ids, dense))


class _EachToken:
    """A transformers-style streamer: calls ``on_token`` with each new token of one sequence."""

    def __init__(self, on_token):
        self.on_token, self.prompt_seen = on_token, False

    def put(self, ids) -> None:
        if self.prompt_seen:
            for token in ids.flatten().tolist():
                self.on_token(token)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def _parting(ids: list[int], dense: Generation | None, ended: bool = True) -> int | None:
    """Index of the first token that differs from the dense text's; None if none does (yet, unless it has ended)."""
    base = [] if dense is None else dense.ids[0, dense.prompt_length :].tolist()
    same = len(os.path.commonprefix([ids, base]))
    return None if dense is None or same >= (max if ended else min)(len(ids), len(base)) else same


def _table(passages: list[Passage], found: list[Generation], speeds: np.ndarray) -> pd.DataFrame:
    """The table below the texts, as strings; the first row is the dense text."""
    rows = []
    for ours, g, times in zip(passages, found, speeds, strict=True):
        known = times[~np.isnan(times)]
        ends = (np.median(known), known.min(), known.max()) if len(known) else ()
        row = {"text": ours.title, "tokens/s": "{:.1f} ({:.1f} to {:.1f})".format(*ends) if ends else "too short"}
        row["speed"] = "" if g is found[0] else _speed(np.median(times / speeds[0]))
        drafts, verified = (" of drafts", " with verification") if g.mode == "lossless" else ("", "")
        row["realised"] = _or_none(g.capacity, "{:.3f}" + drafts)
        row["left early"] = _or_none(g.exit_rate, "{:.1%}" + drafts)
        row["model share"] = _or_none(g.model_share, "{:.1%}" + verified)
        row["parts from dense"] = "" if g is found[0] else _parts(ours, passages[0])
        if not np.isnan(g.acceptance):
            row["parts from dense"] += f"; {g.acceptance:.0%} of the drafts stood"
        rows.append(row)
    return pd.DataFrame(rows)


def _speed(ratio: float) -> str:
    """Speed over the dense text's, nan if a text was too short."""
    return _or_none(ratio, "{:.2f}x, slower than dense" if round(ratio, 2) < 1 else "{:.2f}x")


def _parts(ours: Passage, dense: Passage) -> str:
    if ours.mark is None:
        return f"nowhere in {len(ours.tokens)} tokens"
    texts = [quoted(p.tokens[ours.mark]) if ours.mark < len(p.tokens) else "the end" for p in (ours, dense)]
    return f"at token {ours.mark + 1}: {texts[0]} for {texts[1]}"


def _or_none(value: float, form: str) -> str:
    return "–" if np.isnan(value) else form.format(value)


def _page(table: pd.DataFrame) -> str:
    """The table as HTML in the colours of the page."""
    cell = '<t{kind} style="padding:.15em 1.2em .15em 0;white-space:nowrap">{text}</t{kind}>'
    rows = [("h", table.columns), *(("d", row) for row in table.itertuples(index=False))]
    cells = ["".join(cell.format(kind=kind, text=escape(text)) for text in row) for kind, row in rows]
    body = "".join(f'<tr style="text-align:left">{row}</tr>' for row in cells)
    return f'<div style="overflow-x:auto"><table style="border-collapse:collapse;line-height:1.4">{body}</table></div>'
