"""Text as it is generated, dense and at several capacities side by side, each token coloured by its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import pandas as pd
from ipywidgets import HTML, Button, Dropdown, GridBox, Layout, Text, Textarea
from matplotlib.figure import Figure
from transformers.generation.streamers import BaseStreamer

from hat_lib.config import WHY, HatError, check_capacity
from hat_lib.evaluation.coloured_text import Passage, html
from hat_lib.evaluation.tokens import quoted
from hat_lib.inference.generate import MODES, AdaptiveInference, Generation
from hat_lib.inference.speed import Variant, take_turns
from hat_lib.model.cost import state_cost
from hat_lib.plotting.token_heatmap import figure
from hat_lib.text.token_classes import pieces
from hat_lib.workbook.view import CONTROL, ON_RELEASE, View, share_slider

DENSE = {"capacity": 1.0, "exit_rate": 0.0, "mode": "adaptive"}
SCALE = {"meaning": "framed: first token unlike dense; share of the dense work:", "low": 0.4, "high": 1.0}
"""the same for all capacities, so that texts can be compared by eye"""
MOST = 4
"""capacities beside the dense text"""
REPEATS, STRETCH = 3, 8
"""turns in which each way is timed, and new tokens per turn"""


class GenerateView(View):
    """A prompt, capacities and a mode → the dense text and one for each capacity, and how fast they come.

    Nothing runs until the button is pressed or a control is changed. A text replaces the old one when its first token
    arrives. Then the same prompt is continued again, `REPEATS` times in turns, to time it while nothing is shown.

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
        self._infer, self._max_new_tokens = infer, max_new_tokens
        self._passages: list[Passage] = []
        self.table = pd.DataFrame()
        """a row per text: its speed, what it executed (in lossless mode its drafts) and where it parts from dense"""
        self.prompt = Textarea(prompt, description="Prompt", rows=2, **ON_RELEASE)
        self.capacities = Text(", ".join(f"{c:g}" for c in capacities), description="Capacities", **ON_RELEASE)
        self.exit_rate = share_slider("Exit rate", infer.hat.exit_rate)
        self.mode = Dropdown(description="Mode", options=MODES, **CONTROL)
        self.button = Button(description="Generate", button_style="primary")
        self.button.on_click(self.answer)
        self.texts = GridBox(layout=Layout(grid_template_columns="repeat(auto-fit, minmax(13em, 1fr))", grid_gap="1em"))
        self.numbers = HTML(layout=Layout(overflow="auto"))
        controls = [self.prompt, self.capacities, self.exit_rate, self.mode, self.button]
        super().__init__(controls, HTML(html(**SCALE)), self.texts, self.numbers)
        self._say("ready", "press Generate, or change a control")

    def answer(self, _event=None) -> None:
        # Clicks would queue up, whereas ipywidgets sends only the last of a control's values.
        self.button.disabled = True
        super().answer()
        self.button.disabled = False

    def _update(self) -> None:
        ways, prompt = {"dense": DENSE, **self._ways()}, self.prompt.value
        new = tuple(HTML() for _ in range(len(ways) - len(self.texts.children)))
        self.texts.children = self.texts.children[: len(ways)] + new
        texts, passages = [], []
        for output, (name, way) in zip(self.texts.children, ways.items(), strict=True):
            self._say("busy", f"generating: {name}")
            text, passage = self._stream(output, prompt, name, way, texts[0] if texts else None)
            texts.append(text)
            passages.append(passage)
        self._say("busy", "timing the same prompt again, in turns")
        turns = [Variant(name, self._infer.hat.lm, nullcontext) for name in ways]
        take_turns(turns, lambda turn: self._tokens_per_second(prompt, ways[turn.name]), REPEATS, warm=0)
        self._passages, self.table = passages, _table(passages, texts, np.array([turn.times for turn in turns]))
        with pd.option_context("display.max_colwidth", None):
            self.numbers.value = self.table.to_html(index=False, border=0, justify="left")
        words = f"tokens/s: median, slowest and fastest of {REPEATS} stretches of {STRETCH} tokens, in turns"
        if any(abs(text.capacity - text.requested_capacity) >= 0.005 for text in texts):
            words += f"; realised capacity is not what was asked: {WHY}"
        self._say("ready", words)

    def twin(self) -> Figure:
        """The last answer as a picture. Raises `HatError` if there is none."""
        if not self._passages:
            raise HatError("no answer to draw: press Generate first")
        return figure(*self._passages, **SCALE)

    def _ways(self) -> dict[str, dict]:
        """Settings of the texts beside the dense one, by name."""
        parts = [part.strip() for part in self.capacities.value.replace(";", ",").split(",")]
        capacities = list(dict.fromkeys(check_capacity(part) for part in parts if part))
        if not 1 <= len(capacities) <= MOST:
            raise HatError(f"expected 1 to {MOST} capacities, such as 0.9, 0.55, got {self.capacities.value!r}")
        mode, rate = self.mode.value, self.exit_rate.value
        name = ("capacity {:.2f}" if mode == "adaptive" else "lossless, drafts at {:.2f}").format
        exits = f", exits {rate:.2f}" if rate else ""
        return {name(c) + exits: {"capacity": c, "exit_rate": rate, "mode": mode} for c in capacities}

    def _stream(self, output: HTML, prompt: str, name: str, way: dict, dense: Generation | None):
        """Show a text in ``output`` as it is generated; returns its `Generation` and `Passage`. The ``dense`` text is
        not coloured, as it runs everything, nor are those of lossless mode, whose tokens have no work of their own."""
        hat, ids, work = self._infer.hat, [], []
        coloured = dense is not None and way["mode"] == "adaptive"
        dense_ids = [] if dense is None else dense.ids[0, dense.prompt_length :].tolist()

        def passage() -> Passage:
            unlike = (i for i, pair in enumerate(zip(ids, dense_ids, strict=False)) if pair[0] != pair[1])
            return Passage(name, pieces(hat.base.tokenizer, ids), work, next(unlike, None))

        def on_token(token: int) -> None:
            ids.append(token)
            cost = state_cost(hat, hat.trace) if coloured else None
            work.append(float((cost.executed / cost.dense)[0, -1]) if coloured else np.nan)
            output.value = html(passage(), **SCALE | {"meaning": ""})

        how = {"max_new_tokens": self._max_new_tokens, "measure": False, **way}
        return self._infer.generate(prompt, streamer=_EachToken(on_token), **how), passage()

    def _tokens_per_second(self, prompt: str, way: dict) -> float:
        """Of the tokens after the first; nan if the text ends at once."""
        times: list[float] = []
        streamer = _EachToken(lambda _: times.append(time.perf_counter()))
        self._infer.generate(prompt, max_new_tokens=STRETCH, measure=False, streamer=streamer, **way)
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else np.nan


class _EachToken(BaseStreamer):
    """Calls ``on_token`` with each new token of one sequence."""

    def __init__(self, on_token: Callable[[int], None]):
        self.on_token, self.prompt_seen = on_token, False

    def put(self, ids) -> None:
        if self.prompt_seen:
            for token in ids.flatten().tolist():
                self.on_token(token)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def _table(passages: list[Passage], texts: list[Generation], speeds: np.ndarray) -> pd.DataFrame:
    """The table below the texts, as strings, the dense text first; ``speeds`` are tokens per second, ``[text, turn]``,
    nan where a text is too short."""
    rows, dense = [], passages[0]
    for passage, text, own in zip(passages, texts, speeds, strict=True):
        ratio, at, lossless = np.median(own / speeds[0]), passage.mark, text.mode == "lossless"
        drafts, verified = (" of drafts", " with verification") if lossless else ("", "")
        parting = f"nowhere in {len(passage.tokens)} tokens"
        if at is not None:
            parting = f"at token {at + 1}: {quoted(passage.tokens[at])} for {quoted(dense.tokens[at])}"
        rows.append({
            "text": passage.title,
            "tokens/s": f"{np.median(own):.1f} ({min(own):.1f} to {max(own):.1f})",
            "speed": f"{ratio:.2f}x" + (", slower than dense" if round(ratio, 2) < 1 else ""),
            "realised": f"{text.capacity:.3f}" + drafts,
            "left early": f"{text.exit_rate:.1%}" + drafts,
            "model share": f"{text.model_share:.1%}" + verified,
            "parts from dense": parting + (f"; {text.acceptance:.0%} of the drafts stood" if lossless else ""),
        })  # fmt: skip
    rows[0] |= {"speed": "", "parts from dense": ""}
    return pd.DataFrame(rows)
