"""Live generation: a prompt, two sliders and a mode → text coloured by compute, beside the dense model's.

Sliders answer when they are let go, not while they move: each answer runs the model for seconds, and the status says
so. What is moved meanwhile is answered next, at its last value. `GenerateView.twin` is the last answer as a picture.
"""

from __future__ import annotations

import os
from html import escape

import numpy as np
from ipywidgets import HTML, Button, Dropdown, FloatSlider, GridBox, Layout, Textarea, VBox
from matplotlib.figure import Figure

from hat_lib.config import CAPACITY_MIN, HatError
from hat_lib.inference.generate import MODES, AdaptiveInference, Generation
from hat_lib.plotting.token_heatmap import Passage, figure, html, visible
from hat_lib.text.token_classes import pieces
from hat_lib.workbook.widgets.parts import WIDE, say, told

PROMPT = "The future of AI is"
DENSE = {"capacity": 1.0, "exit_rate": 0.0}
MEANING = "work that chose the token, as a share of the dense model's"
PLAIN = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5"


class GenerateView(VBox):
    """Nothing runs until the button is pressed or a control is changed.

    Args:
        infer: its model is left, after each answer, at the capacity and exit rate that it had.
        prompt: to begin with.
        max_new_tokens: of each answer.
    """

    def __init__(self, infer: AdaptiveInference, prompt: str = PROMPT, max_new_tokens: int = 32):
        self._infer, self._tokens = infer, max_new_tokens
        self._dense: tuple[str, Generation] | None = None
        self._found: Generation | None = None
        hat, layout = infer.hat, Layout(width="min(32em, 95%)")
        how = {"continuous_update": False, "style": WIDE, "layout": layout}
        self.prompt = Textarea(prompt, description="Prompt", rows=3, **how)
        self.capacity = FloatSlider(hat.capacity, min=CAPACITY_MIN, max=1.0, step=0.01, description="Capacity", **how)
        self.exit_rate = FloatSlider(hat.exit_rate, min=0.0, max=1.0, step=0.01, description="Exit rate", **how)
        self.mode = Dropdown(description="Mode", options=MODES, style=WIDE, layout=layout)
        self.button = Button(description="Generate", button_style="primary")
        self.said, self.adaptive, self.dense = HTML(), HTML(), HTML()
        for control in (self.prompt, self.capacity, self.exit_rate, self.mode):
            control.observe(self._run, names="value")
        self.button.on_click(self._run)
        say(self.said, "ready", "press Generate, or move a slider")
        sides = GridBox([self.adaptive, self.dense], layout=Layout(grid_template_columns="1fr 1fr", grid_gap="1em"))
        controls = [self.prompt, self.capacity, self.exit_rate, self.mode, self.button]
        super().__init__([*controls, self.said, sides])

    def _run(self, _event=None) -> None:
        # The button alone: clicks would queue up, while of a control's values ipywidgets sends the last. And what is
        # switched off loses its keys to the notebook, where an arrow folds the section away.
        self.button.disabled = True
        try:
            with told(self.said, busy="generating …"):
                self.adaptive.value = self.dense.value = ""
                self._found = None
                if self._dense is None:  # the first tokens of a process are slow, and speeds are to be compared
                    self._generate(2, **DENSE)
                    self._generate(2, **self._settings)
                if self._dense is None or self._dense[0] != self.prompt.value:
                    self._dense = self.prompt.value, self._generate(self._tokens, **DENSE)
                dense, found = self._dense[1], self._generate(self._tokens, **self._settings)
                self._found = found
                self.dense.value = _plain("dense", dense)
                self.adaptive.value = self._coloured(found) if found.mode == "adaptive" else _plain(found.mode, found)
                say(self.said, "ready", _numbers(found, dense))
        finally:
            self.button.disabled = False

    @property
    def _settings(self) -> dict:
        return {"capacity": self.capacity.value, "exit_rate": self.exit_rate.value, "mode": self.mode.value}

    def _generate(self, tokens: int, **settings) -> Generation:
        return self._infer.generate(self.prompt.value, max_new_tokens=tokens, measure=False, **settings)

    def _coloured(self, found: Generation) -> str:
        return html(self._passage(found), meaning=MEANING)

    def _passage(self, found: Generation) -> Passage:
        ids = found.ids[0, found.prompt_length :].tolist()
        settings = f"capacity {found.requested_capacity:.2f}, exit rate {found.requested_exit_rate:.2f}"
        values = np.full(len(ids), np.nan)
        if found.token_share is not None:
            values = found.token_share[0, found.prompt_length - 1 :].numpy(force=True)
        return Passage(f"{found.mode}, {settings}", pieces(self._infer.hat.base.tokenizer, ids), values.tolist())

    def twin(self) -> Figure:
        """The last answer, and the dense text without colours. Raises `HatError` where there is none."""
        if self._found is None:
            raise HatError("no answer to draw: press Generate first")
        ours, dense = self._passage(self._found), self._passage(self._dense[1])
        known = np.array(ours.values)[~np.isnan(ours.values)]
        low, high = (known.min(), known.max()) if len(known) and known.min() < known.max() else (0.0, 1.0)
        plain = Passage("dense", dense.tokens, [np.nan] * len(dense.tokens))
        return figure(ours, plain, meaning=MEANING, low=float(low), high=float(high))


def _plain(title: str, found: Generation) -> str:
    """Text for whose tokens there is one work, or none that could be told."""
    return f'<div style="{PLAIN}"><p><strong>{title}</strong><br>{escape(visible(found.texts[0]))}</p></div>'


def _numbers(found: Generation, dense: Generation) -> str:
    new, base = (g.ids[0, g.prompt_length :].tolist() for g in (found, dense))
    same = len(os.path.commonprefix([new, base]))
    drafts = "" if np.isnan(found.acceptance) else f"; {found.acceptance:.0%} of the drafts accepted"
    return (
        f"{found.mode}: {found.tokens_per_second:.1f} tokens/s; dense: {dense.tokens_per_second:.1f} tokens/s<br>"
        f"capacity {found.requested_capacity:.2f} requested, {found.capacity:.3f} realised; exit rate "
        f"{found.requested_exit_rate:.2f} requested, {found.exit_rate:.3f} realised; model share "
        f"{found.model_share:.3f}<br>the first {same} of {len(new)} tokens are the dense model's{drafts}"
    )
