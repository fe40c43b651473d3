"""Texts full of markup, shown by everything that turns text into HTML: no tag or attribute comes from a text."""

from __future__ import annotations

import random
from html.parser import HTMLParser

import torch
from tiny_runs import adaptive

from hat_lib import explain
from hat_lib.evaluation.coloured_text import Passage, html
from hat_lib.workbook.view import View
from soak import Found

MARKS = ["<script>", "<img src=x onerror=alert(1)>", "</span></div><b>", '"><svg onload=x>', "&lt;i&gt;", "<!--"]
MARKS += ["'\";--", "\x1b[31m", "\u202e"]


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found |= {tag, *(name for name, _ in attributes)}


def shown(count: int) -> Found:
    """Prompts and titles full of markup, shown by the coloured text, a sweep's table and a view's status."""
    found, hat = Found(), adaptive("channel")
    allowed = {"div", "p", "span", "strong", "br", "style", "title", "role", "data-state"}
    for number in range(count):
        rng = random.Random(f"shown {number}")
        text = "".join(rng.choice([*MARKS, "a", " ", "\n", "<", "&"]) for _ in range(rng.randrange(1, 12)))
        with found.case(f"shown {number}"):
            passage, view = Passage(text, list(text), [rng.random() for _ in text]), View([])
            view._say("error", text)
            parts = [html(passage, meaning=text), view.status.value]
            with torch.no_grad():
                parts += [explain(hat, text)._repr_html_()] if text.strip() else []
            for part in parts:
                assert (tags := Tags(part).found) <= allowed, f"{tags - allowed} from {text!r}"
    return found
