"""What a screen says of a prompt, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import skipping, tune, unpacked

from hat_lib.config import HatError
from hat_lib.decoding.inference import AdaptiveInference
from hat_lib.evaluation.tokens import explain
from hat_lib.text.token_classes import pieces
from hat_lib.workbook import screen
from hat_lib.workbook.screen import Screen

pytestmark = pytest.mark.filterwarnings("ignore:token grain")

PROMPT = "One, <b>two</b>, three, four!"
TOKENS, LAYERS = len(PROMPT), 4


@pytest.fixture(scope="module")
def hat():
    hat = skipping("channel")
    hat.capacity, hat.exit_rate = 0.6, 0.0
    return hat


def asked(hat, ask, **more):
    return unpacked(Screen(hat).answer({"ask": ask, "prompt": PROMPT, **more}))


def test_the_map_is_what_explain_finds(hat):
    header, shares = asked(hat, "map")
    assert shares.shape == (len(screen.CAPACITIES), TOKENS, LAYERS, 4)
    assert "".join(token["text"] for token in header["tokens"]) == PROMPT
    for capacity, step, found in zip(screen.CAPACITIES, header["steps"], shares, strict=True):
        with hat.at(capacity):
            table = explain(hat, PROMPT)
        np.testing.assert_allclose(found / screen.WHOLE, table.site_share.transpose(2, 0, 1), atol=0.6 / screen.WHOLE)
        np.testing.assert_allclose(step["kl"], table.tokens["kl_of_next"], atol=1e-4)
        assert step["work"] == pytest.approx(table.model_share, abs=1e-4)
        assert [pair[1] for pair in step["next"][3]] == pytest.approx(table.next_p[1, 3].tolist(), abs=1e-4)
    assert header["steps"][0]["work"] == 1 and (hat.capacity, hat.exit_rate) == (0.6, 0.0)


def test_a_layer_that_a_token_did_not_enter_is_marked(hat):
    with hat.at(exit_rate=0.9):
        _, shares = asked(hat, "map")
    assert (shares == screen.LEFT).any() and shares[shares != screen.LEFT].max() <= screen.WHOLE


def test_exits_stay_those_that_the_screen_was_made_with(hat):
    made = Screen(hat)
    with hat.at(exit_rate=0.9):
        answer = made.answer({"ask": "map", "prompt": PROMPT})
    assert unpacked(answer)[0]["steps"] == asked(hat, "map")[0]["steps"]
    assert made.answer({"ask": "map", "prompt": PROMPT}) is answer  # kept


def test_answers_are_not_kept_beyond_what_they_were_made_with():
    """The weights and their format, the calibration, and whatever a context holds."""
    hat = skipping("channel")
    made, question = Screen(hat), {"ask": "whole", "prompt": PROMPT}
    answers = [made.answer(question)]

    def differs():
        answers.append(made.answer(question))
        assert made.answer(question) is answers[-1]
        return answers[-1] is not answers[-2]

    assert not differs()
    hat.weight_format = "int8"
    assert differs() and unpacked(answers[-1])[0]["weights"] == "int8"
    hat.calibration = replace(hat.calibration, thresholds=(np.array(hat.calibration.thresholds) - 0.1).tolist())
    assert differs() and answers[-1] != answers[-2]
    with torch.no_grad():
        next(hat.routers.parameters()).mul_(2)
    assert differs()
    with hat.changed(shortlist=None):
        assert differs()
    assert differs()
    hat.capacity = 0.5
    assert not differs()
    tune(hat.lm)  # other modules in place of some
    assert differs() and not differs()


def test_texts_are_those_of_generate(hat):
    texts = asked(hat, "texts")[0]["texts"]
    infer, dense = AdaptiveInference(hat), texts[0]["tokens"]
    for text, capacity in ((texts[0], 1.0), (texts[-1], 0.4)):
        made = infer.generate(PROMPT, capacity=capacity, max_new_tokens=screen.NEW_TOKENS)
        assert text["tokens"] == pieces(hat.base.tokenizer, made.ids[0, made.prompt_length :].tolist())
        np.testing.assert_allclose(text["values"], made.token_share[0, made.prompt_length - 1 :], atol=1e-4)
        at = text["mark"]
        assert text["tokens"][:at] == dense[:at] and (at is None or text["tokens"][at] != dense[at])
    assert texts[0]["mark"] is None and texts[-1]["mark"] is not None


def test_forced_cells_run_in_full_or_not_at_all(hat):
    header, own = asked(hat, "map")
    same, shares = asked(hat, "forced", capacity=0.4, cells=[])
    assert (shares[0] == own[-1]).all() and same["step"]["kl"] == header["steps"][-1]["kl"]
    step, shares = asked(hat, "forced", capacity=0.4, cells=[[5, 1, 2, 1], [5, 2, 3, 0]])
    assert shares[0, 5, 1, 2] == screen.WHOLE and shares[0, 5, 2, 3] == 0
    assert (shares[0, :5] == own[-1, :5]).all(), "the future changed the past"
    everything = [[token, layer, site, 1] for token in range(TOKENS) for layer in range(LAYERS) for site in range(4)]
    with hat.changed(shortlist=None):
        dense = asked(hat, "forced", capacity=1.0, cells=everything)[0]["step"]
    assert dense["work"] == pytest.approx(1, abs=0.01)  # routers included
    assert max(dense["kl"]) < 1e-4


def test_the_token_grain_has_a_screen_too():
    token = skipping("token")
    header, shares = asked(token, "map")
    assert header["sites"] == ["FFN"] and shares.shape[-1] == 1
    _, shares = asked(token, "forced", capacity=0.7, cells=[[4, 2, 0, 0], [5, 2, 0, 1]])
    assert shares[0, 4, 2, 0] == 0 and shares[0, 5, 2, 0] == screen.WHOLE


@pytest.mark.parametrize(
    "question",
    [{"ask": "map", "prompt": " "}, {"ask": "map"}, {"ask": "map", "prompt": "ab " * 100}, {"ask": "rm", "prompt": "a"}]
    + [{"ask": "forced", "prompt": "abc", "capacity": c, "cells": [cell]}
       for c, cell in ((0.5, [0, 0, 0]), (0.5, [3, 0, 0, 1]), (0.5, [0, 9, 0, 1]), (0.5, "x"), (5, [0, 0, 0, 1]))],
)  # fmt: skip
def test_questions_that_are_refused(hat, question):
    with pytest.raises(HatError):
        Screen(hat).answer(question)
