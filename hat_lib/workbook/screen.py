"""What one screen shows of a prompt at nine capacities: the map, the next tokens, the texts, their prices and speeds.

A `Screen` answers with one block of bytes, which ``workbook/play.js`` reads, in a notebook and on a page alike: four
bytes with the length of a JSON header (little-endian), the header, and the executed share of each capacity, token,
layer and site, uint8 ``[C, T, L, S]``: 0 to 250 for 0 to 100 %, 255 in layers that the token did not enter.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

import numpy as np
import torch

from hat_lib.base.families import linear_work
from hat_lib.base.watch import Watch
from hat_lib.config import HatError
from hat_lib.decoding.inference import AdaptiveInference
from hat_lib.evaluation.tokens import TokenTable, prompt_blocks, prompt_ids, token_table
from hat_lib.hat import HierarchicalTransformer
from hat_lib.rows import results_table
from hat_lib.text.coloured import Passage, colours
from hat_lib.text.token_classes import pieces

CAPACITIES = (1.0, 0.9, 0.8, 0.7, 0.62, 0.55, 0.5, 0.45, 0.4)
NEW_TOKENS = 24
KEPT = 32  # answers
MOST = 128
"""tokens of a prompt; a map of more would be unreadable"""
WHOLE, LEFT = 250, 255  # a share of 100 %, and a layer that a token did not enter
BYTES = {"int8": 1, "q4": 0.5 + 3 / 32}
"""of a weight in fewer bits than the base's, with its part of its group's scale"""
MATRICES = {"qkv": "q | k | v", "o": "o", "gate_up": "gate | up", "down": "down", "ffn": "FFN"}
"""site -> the matrices behind it"""
PRESETS = json.loads(files("hat_lib.workbook").joinpath("presets.json").read_text(encoding="utf-8"))
"""name -> a prompt, and what to look for in it"""


class Screen:
    """Answers questions about prompts, with the exits that ``hat`` is set to when the screen is made."""

    def __init__(self, hat: HierarchicalTransformer):
        self.hat, self._exit_rate = hat, hat.exit_rate
        self._made_with = None
        self._answers: dict[tuple[str, str], bytes] = {}  # the same examples are chosen again and again
        self._base_states: dict[str, dict] = {}  # of the last prompt

    def answer(self, question: Mapping) -> bytes:
        """A block about ``question["prompt"]``, as ``question["ask"]`` says:

        - ``map``: what each token ran, and what both models would say next
        - ``texts``: greedy continuations of `NEW_TOKENS` tokens, at every capacity
        - ``whole``: both
        - ``forced``: the map at ``capacity``, but for ``cells``: ``[token, layer, site, runs]``, a site of a layer that
          a token runs in full (1) or not at all (0)

        Raises `HatError` for another question, and for a prompt that is empty or too long.
        """
        if not isinstance(question, Mapping):
            raise HatError(f"a question must be an object, got {question!r}")
        ask, prompt = question.get("ask"), question.get("prompt")
        length = len(prompt_ids(self.hat, prompt))
        if length > MOST:
            raise HatError(f"a map shows up to {MOST} tokens, the prompt has {length}: make it shorter")
        if ask not in ("map", "texts", "whole", "forced"):
            raise HatError(f"ask must be map, texts, whole or forced, got {ask!r}")
        with self.hat.at(exit_rate=self._exit_rate):
            self._forget_stale()
            if ask != "forced":
                if (ask, prompt) not in self._answers:
                    if len(self._answers) == KEPT:
                        del self._answers[next(iter(self._answers))]
                    self._answers[ask, prompt] = self._about(ask, prompt)
                return self._answers[ask, prompt]
            cells = self._cells(question.get("cells"), length)
            with self.hat.at(question.get("capacity")), self.hat.using(_forced(self.hat, cells)):
                found = [self._table(prompt)]
        return _packed({"words": _words(self.hat, found), "step": _step(found[0])}, found)

    def _forget_stale(self) -> None:
        """Drop what was made with other weights, another calibration or another setting, but for the capacity."""
        self.hat.refresh()  # now, as it writes what follows from changed weights
        with self.hat.at(1.0):
            setting = repr(self.hat.new_forward().setting)  # its arrays have no one equality
        made_with = setting, self.hat.calibration, list(self.hat.prices), Watch(self.hat).seen
        if made_with != self._made_with:
            self._made_with = made_with
            self._answers.clear()
            self._base_states.clear()

    def _about(self, ask: str, prompt: str) -> bytes:
        header, found = ({}, []) if ask == "texts" else self._map(prompt)
        if ask != "map":
            header["texts"] = [vars(text) for text in texts(self.hat, prompt)]
        return _packed(header, found)

    def _table(self, prompt: str) -> TokenTable:
        blocks = prompt_blocks(self.hat.base.tokenizer, {"prompt": prompt})
        self._base_states = {prompt: self._base_states.get(prompt, {})}
        return token_table(self.hat, blocks, base_states=self._base_states[prompt], progress=False)

    def _map(self, prompt: str) -> tuple[dict, list[TokenTable]]:
        hat, found, lm = self.hat, [], self.hat.lm.config
        for capacity in CAPACITIES:
            with hat.at(capacity):
                found.append(self._table(prompt))
        weights = sum(linear_work(lm).values()) * lm.num_hidden_layers + lm.vocab_size * lm.hidden_size
        return {
            "prompt": prompt,
            "sites": [MATRICES[site] for site in found[0].sites],
            "site_work": list(hat.site_work),
            "tokens": [{"text": t.text, "protected": bool(t.protected), "entropy": round(t.entropy_of_next, 3)}
                       for t in found[0].tokens.itertuples()],
            "words": _words(hat, found),
            "steps": [_step(table) | {"speed": speed} for table, speed in zip(found, _speeds(hat), strict=True)],
            "curves": [[p.text, p.capacity, p.increase, p.low, p.high] for p in hat.prices],
            "megabytes": weights * BYTES.get(hat.weight_format, hat.lm.dtype.itemsize) / 1e6,  # read by a dense token
            "weights": _weights(hat),
            "colours": [colours(at)[0] for at in np.linspace(0, 1, 64)],
        }, found  # fmt: skip

    def _cells(self, cells: object, tokens: int) -> list[list[int]]:
        limits = (tokens, self.hat.config.n_layers, len(self.hat.grain.sites), 2)
        for cell in cells if isinstance(cells, list) else [cells]:
            fits = isinstance(cell, list) and [type(number) for number in cell] == [int] * 4
            if not fits or not all(number in range(limit) for number, limit in zip(cell, limits, strict=True)):
                raise HatError(f"a cell is [token, layer, site, 0 or 1], whole and less than {limits}, got {cell!r}")
        return cells


def texts(hat: HierarchicalTransformer, prompt: str) -> list[Passage]:
    """Greedy continuations at each of `CAPACITIES`, with the work that chose each token, a share of the dense model's;
    the first token that differs from the dense text's is marked."""
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
        found.append(Passage("dense" if capacity == 1 else f"capacity {capacity:.2f}", tokens, work, differs))
    return found


def _packed(header: dict, found: Sequence[TokenTable]) -> bytes:
    shares = b""
    if found:
        share = np.stack([table.site_share for table in found]).transpose(0, 3, 1, 2)
        header["shape"] = share.shape
        shares = np.where(np.isnan(share), LEFT, np.round(WHOLE * share)).astype(np.uint8).tobytes()
    text = json.dumps(header, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    return len(text).to_bytes(4, "little") + text + shares


def _words(hat: HierarchicalTransformer, found: Sequence[TokenTable]) -> dict[int, str]:
    """The texts of next tokens by id, each after another token, as a tokenizer may drop a text's first space."""
    first = int(found[0].tokens["id"].iloc[0])
    known = np.unique([table.next_ids[1] for table in found]).tolist()
    return {token: pieces(hat.base.tokenizer, [first, token])[1] for token in known}


def _step(found: TokenTable) -> dict:
    """What a table says at its capacity; ``next`` is a list of [id, probability] for each token."""
    p = found.next_p[1].astype(float).round(4)
    return {
        "capacity": found.requested_capacity,
        "work": round(found.model_share, 4),
        "kl": found.tokens["kl_of_next"].clip(lower=0).round(4).tolist(),
        "next": [list(zip(*pair, strict=True)) for pair in zip(found.next_ids[1].tolist(), p.tolist(), strict=True)],
    }


def _weights(hat: HierarchicalTransformer) -> str:
    """The format of the weights that decoding reads."""
    return str(hat.lm.dtype).removeprefix("torch.") if hat.weight_format == "base" else hat.weight_format


def _speeds(hat: HierarchicalTransformer) -> list[str]:
    """What is known of the speed at each capacity: of the channel grain on the base of `studies.frontier`, with weights
    in the same format; "about" between measured capacities."""
    try:
        rows = results_table("frontier").query("way == 'engine'").sort_values("capacity")
    except HatError:  # a data folder of one's own
        return [""] * len(CAPACITIES)
    rows = rows[(rows["base"] == hat.base.name) & (rows["weights"] == _weights(hat))]
    if rows.empty or hat.config.granularity != "channel":
        return [""] * len(CAPACITIES)
    over = [np.interp(CAPACITIES, rows["capacity"], rows[name]) for name in ("over_dense", "over_hf")]
    about = ["" if capacity in set(rows["capacity"]) else "about " for capacity in CAPACITIES]
    where = "{threads:.0f} threads of a CPU, {weights}".format(**rows.iloc[0])
    return [
        f"{a}{dense:.2f}x dense, {hf:.2f}x transformers ({where})" for a, dense, hf in zip(about, *over, strict=True)
    ]


def _forced(hat: HierarchicalTransformer, cells: Sequence[Sequence[int]]):
    """The policy that ``hat`` has at its capacity, but for the cells."""

    def policy(layer, site, x, rows, trace):
        if (keep := hat.keeps(layer, site, x)) is None:
            keep = x.new_ones(len(x), *trace.mask_shapes[site], dtype=torch.bool)
        for token, at, number, runs in cells:
            if (at, hat.grain.sites[number]) == (layer, site):
                keep = keep.clone()
                keep[slice(token, token + 1) if rows is None else rows == token] = bool(runs)
        return keep

    return policy
