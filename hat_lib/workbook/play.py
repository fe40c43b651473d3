"""What one screen shows of a prompt at nine capacities: the map, the next tokens, the texts, their prices and speeds.

`answer` gives it as one block of bytes, which ``play.js`` reads, in a notebook and on a page alike: four bytes with the
length of a JSON header (little-endian), the header, and the executed share of each capacity, token, layer and site,
uint8 ``[C, T, L, S]``: 0 to 250 for 0 to 100 %, 255 in layers that the token did not enter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex

from hat_lib.config import HatError
from hat_lib.evaluation.coloured_text import PALETTE
from hat_lib.evaluation.tokens import MATRICES, TokenTable, explain
from hat_lib.inference.generate import AdaptiveInference
from hat_lib.model.cost import linear_work
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.rows import results_table
from hat_lib.text.plain import check_whole
from hat_lib.text.token_classes import pieces

CAPACITIES = (1.0, 0.9, 0.8, 0.7, 0.62, 0.55, 0.5, 0.45, 0.4)
NEW_TOKENS = 24
MOST = 128
"""tokens of a prompt; a map of more would be unreadable"""
WHOLE, LEFT = 250, 255  # a share of 100 %, and a layer that a token did not enter
PRESETS = {
    "A story": (
        "The old lighthouse keeper walked down to the harbour, because the storm was coming in.",
        "In the bundled base, watch “the”: in layers 3 to 9 it goes dark before any other token. One huge channel of "
        "its state makes all others small, so little is left to multiply.",
    ),
    "A program": (
        "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return",
        "Much of a program is easy to foresee. Move down to 0.40: does the text still go on as the dense one does?",
    ),
    "Names": (
        "Marie Curie, Lise Meitner and Irène Joliot-Curie all worked on",
        "Compare the pieces of a name with the commas between them: which of the two gets more of the work?",
    ),
}
"""name -> a prompt, and what to look for in it"""


def answer(hat: HierarchicalTransformer, question: Mapping) -> bytes:
    """A block about ``question["prompt"]``, as ``question["ask"]`` says; exits are as ``hat`` is set.

        map    what each token ran, and what both models would say next
        texts  greedy continuations of `NEW_TOKENS` tokens, at every capacity
        forced the map at ``capacity``, but for ``cells``: ``[token, layer, site, runs]``, a site of a layer that a
               token runs in full (1) or not at all (0)

    Raises `HatError` for another question, and for a prompt that is empty or too long.
    """
    if not isinstance(question, Mapping):
        raise HatError(f"a question must be an object, got {question!r}")
    ask, prompt = question.get("ask"), question.get("prompt")
    length = check_prompt(hat, prompt)
    if ask == "map":
        return _packed(*_map(hat, prompt))
    if ask == "texts":
        return _packed({"texts": texts(hat, prompt)})
    if ask == "forced":
        cells = _cells(hat, question.get("cells"), length)
        with hat.at(question.get("capacity")), hat.using(_forced(hat, cells)):
            found = explain(hat, prompt)
        words = _Words(hat, found)
        return _packed({"step": _step(words, found), "words": words.texts}, _shares([found]))
    raise HatError(f"ask must be map, texts or forced, got {ask!r}")


def check_prompt(hat: HierarchicalTransformer, prompt: object) -> int:
    """The tokens of a prompt; `HatError` unless it is text of at most `MOST`."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise HatError(f"a prompt must be text, got {prompt!r}")
    check_whole("the prompt", prompt)
    length = len(hat.base.tokenizer(prompt, verbose=False).input_ids)
    if length > MOST:
        raise HatError(f"a map shows up to {MOST} tokens, the prompt has {length}: make it shorter")
    return length


def whole(hat: HierarchicalTransformer, prompt: str) -> bytes:
    """Map and texts in one block: all that a page needs that has no model behind it. Raises as `check_prompt`."""
    check_prompt(hat, prompt)
    header, shares = _map(hat, prompt)
    return _packed(header | {"texts": texts(hat, prompt)}, shares)


def _packed(header: dict, shares: np.ndarray | None = None) -> bytes:
    if shares is not None:
        header = header | {"shape": shares.shape}
    text = json.dumps(header, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    return len(text).to_bytes(4, "little") + text + (b"" if shares is None else shares.tobytes())


def _map(hat: HierarchicalTransformer, prompt: str) -> tuple[dict, np.ndarray]:
    found = []
    for capacity in CAPACITIES:
        with hat.at(capacity):
            found.append(explain(hat, prompt))
    words, tokens = _Words(hat, found[0]), found[0].tokens
    work = hat.grain.site_work(hat.lm.config)
    steps = [_step(words, table) for table in found]
    for step, speed in zip(steps, _speeds(hat), strict=True):
        step["speed"] = speed
    header = {
        "prompt": prompt,
        "sites": [MATRICES[site] for site in found[0].sites],
        "site_work": [work[site] / sum(work.values()) for site in found[0].sites],
        "tokens": [
            {"text": t.text, "protected": bool(t.protected), "entropy": round(t.entropy_of_next, 3)}
            for t in tokens.itertuples()
        ],
        "steps": steps,
        "words": words.texts,
        "curves": [[p.text, p.capacity, p.increase, p.low, p.high] for p in hat.prices],
        "megabytes": _megabytes(hat),
        "colours": [to_hex(colour) for colour in colormaps[PALETTE](np.linspace(0, 1, 64))],
    }
    return header, _shares(found)


class _Words:
    """Next tokens as numbers of texts, each kept once."""

    def __init__(self, hat: HierarchicalTransformer, found: TokenTable):
        self._decode, self._first = hat.base.tokenizer.decode, int(found.tokens["id"].iloc[0])
        self._start = len(self._decode([self._first], clean_up_tokenization_spaces=False))
        self._known: dict[int, int] = {}
        self.texts: list[str] = []

    def number(self, token: int) -> int:
        """The number of a token's text, decoded after another token, as a tokenizer may drop a text's first space."""
        if token not in self._known:
            self._known[token] = len(self.texts)
            self.texts.append(self._decode([self._first, token], clean_up_tokenization_spaces=False)[self._start :])
        return self._known[token]


def _step(words: _Words, found: TokenTable) -> dict:
    """What a table says at its capacity: a list of [word, probability] for each token, of the adaptive model."""
    ids, p = found.next_ids[1], found.next_p[1]
    return {
        "capacity": found.requested_capacity,
        "realised": round(found.capacity, 4),
        "work": round(found.model_share, 4),
        "kl": found.tokens["kl_of_next"].clip(lower=0).round(4).tolist(),
        "next": [
            [[words.number(i), round(q, 4)] for i, q in zip(*pair, strict=True)]
            for pair in zip(ids.tolist(), p.tolist(), strict=True)
        ],
    }


def _shares(found: Sequence[TokenTable]) -> np.ndarray:
    """uint8 ``[C, T, L, S]``."""
    shares = np.stack([table.site_share for table in found]).transpose(0, 3, 1, 2)
    return np.where(np.isnan(shares), LEFT, np.round(WHOLE * shares)).astype(np.uint8)


def texts(hat: HierarchicalTransformer, prompt: str) -> list[dict]:
    """Greedy continuations at each of `CAPACITIES`: ``tokens``, the ``work`` that chose each, a share of the dense
    model's, and where the text first ``differs`` from the dense one."""
    infer, found, dense = AdaptiveInference(hat), [], []
    for capacity in CAPACITIES:
        text = infer.generate(prompt, capacity=capacity, max_new_tokens=NEW_TOKENS, measure=False)
        ids = text.ids[0, text.prompt_length :].tolist()
        dense = dense or ids
        differs = next((i for i, (a, b) in enumerate(zip(ids, dense, strict=False)) if a != b), None)
        tokens = pieces(hat.base.tokenizer, ids)
        if ids[-1] in hat.base.tokenizer.all_special_ids:
            tokens[-1] = "(end)"
        work = text.token_share[0, text.prompt_length - 1 :].numpy().round(4).tolist()
        found.append({"capacity": capacity, "tokens": tokens, "work": work, "differs": differs})
    return found


def _megabytes(hat: HierarchicalTransformer) -> float:
    """Weights that a dense token reads, in MB: of all linear layers and the head."""
    config = hat.lm.config
    weights = sum(linear_work(config).values()) * config.num_hidden_layers + config.vocab_size * config.hidden_size
    return weights * hat.lm.dtype.itemsize / 1e6


def _speeds(hat: HierarchicalTransformer) -> list[str]:
    """What is known of the speed at each capacity: of the channel grain, on the bases of `studies.decode`."""
    try:
        table = results_table("decode")
    except HatError:
        table = None
    if table is None or hat.config.granularity != "channel" or hat.base.name not in set(table["base"]):
        return [""] * len(CAPACITIES)
    rows = table[(table["base"] == hat.base.name) & (table["way"] == "engine") & (table["sequences"] == 1)]
    rows = rows[rows["weights"] == rows["dtype"]].sort_values("capacity")
    over = [np.interp(CAPACITIES, rows["capacity"], rows[name]) for name in ("over_dense", "over_hf")]
    where = "{threads:.0f} threads of a CPU, {dtype}".format(**rows.iloc[0])
    return [f"about {dense:.2f}x dense, {hf:.2f}x transformers ({where})" for dense, hf in zip(*over, strict=True)]


def _cells(hat: HierarchicalTransformer, cells: object, tokens: int) -> list[list[int]]:
    limits = (tokens, hat.config.n_layers, len(hat.grain.sites), 2)
    for cell in cells if isinstance(cells, list) else [cells]:
        fits = isinstance(cell, list) and len(cell) == 4
        if not fits or not all(number in range(limit) for number, limit in zip(cell, limits, strict=True)):
            raise HatError(f"a cell is [token, layer, site, 0 or 1], each less than {limits}, got {cell!r}")
    return cells


def _forced(hat: HierarchicalTransformer, cells: Sequence[Sequence[int]]):
    """The policy that ``hat`` has at its capacity, but for the cells."""
    sites, own = hat.grain.sites, None
    if hat.capacity < 1:
        own = hat.threshold_policy(hat.calibration.thresholds_at(hat.capacity))

    def policy(layer, site, x, rows, state):
        everything = x.new_ones(len(x), *state.mask_shapes.get(site, ()), dtype=torch.bool)
        keep = own(layer, site, x, rows, state) if own else everything
        for token, at, number, runs in cells:
            if (at, sites[number]) == (layer, site):
                keep = keep.clone()
                keep[slice(token, token + 1) if rows is None else rows == token] = bool(runs)
        return keep

    return policy
