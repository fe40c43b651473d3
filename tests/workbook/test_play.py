"""The screen without a browser: what it is told, what it may ask, and what it refuses."""

import json
import threading
from http.client import HTTPConnection

import numpy as np
import pytest
from tiny_runs import skipping
from typer.testing import CliRunner

from hat_lib.cli.app import app
from hat_lib.config import REPO, HatError
from hat_lib.evaluation.tokens import explain
from hat_lib.inference.generate import AdaptiveInference
from hat_lib.plotting.style import png
from hat_lib.text.token_classes import pieces
from hat_lib.workbook import play, play_page
from hat_lib.workbook.play_page import Server, still_page
from hat_lib.workbook.play_view import PlayView, map_figure, text_figure

pytestmark = pytest.mark.filterwarnings("ignore:token grain")

PROMPT = "One, <b>two</b>, three, four!"
TOKENS, LAYERS = len(PROMPT), 4


@pytest.fixture(scope="module")
def hat():
    hat = skipping("channel")
    hat.capacity, hat.exit_rate = 0.6, 0.0
    return hat


def unpacked(block):
    """Header and shares of a block, the latter ``[C, T, L, S]``."""
    end = 4 + int.from_bytes(block[:4], "little")
    header = json.loads(block[4:end])
    return header, np.frombuffer(block[end:], np.uint8).reshape(header.get("shape", (0,)))


def asked(hat, ask, **more):
    return unpacked(play.answer(hat, {"ask": ask, "prompt": PROMPT, **more}))


def test_the_map_is_what_explain_finds(hat):
    header, shares = asked(hat, "map")
    assert shares.shape == (len(play.CAPACITIES), TOKENS, LAYERS, 4)
    assert "".join(token["text"] for token in header["tokens"]) == PROMPT
    for capacity, step, found in zip(play.CAPACITIES, header["steps"], shares, strict=True):
        with hat.at(capacity):
            table = explain(hat, PROMPT)
        np.testing.assert_allclose(found / play.WHOLE, table.site_share.transpose(2, 0, 1), atol=0.6 / play.WHOLE)
        np.testing.assert_allclose(step["kl"], table.tokens["kl_of_next"], atol=1e-4)
        assert step["work"] == pytest.approx(table.model_share, abs=1e-4)
        assert [pair[1] for pair in step["next"][3]] == pytest.approx(table.next_p[1, 3].tolist(), abs=1e-4)
    assert header["steps"][0]["work"] == 1 and (hat.capacity, hat.exit_rate) == (0.6, 0.0)


def test_a_layer_that_a_token_did_not_enter_is_marked(hat):
    with hat.at(exit_rate=0.9):
        _, shares = asked(hat, "map")
    assert (shares == play.LEFT).any() and shares[shares != play.LEFT].max() <= play.WHOLE


def test_texts_are_those_of_generate(hat):
    texts = asked(hat, "texts")[0]["texts"]
    infer, dense = AdaptiveInference(hat), texts[0]["tokens"]
    for text in texts[:: len(texts) - 1]:
        made = infer.generate(PROMPT, capacity=text["capacity"], max_new_tokens=play.NEW_TOKENS)
        assert text["tokens"] == pieces(hat.base.tokenizer, made.ids[0, made.prompt_length :].tolist())
        np.testing.assert_allclose(text["work"], made.token_share[0, made.prompt_length - 1 :], atol=1e-4)
        at = text["differs"]
        assert text["tokens"][:at] == dense[:at] and (at is None or text["tokens"][at] != dense[at])
    assert texts[0]["differs"] is None and texts[-1]["differs"] is not None


def test_forced_cells_run_in_full_or_not_at_all(hat):
    header, own = asked(hat, "map")
    same, shares = asked(hat, "forced", capacity=0.4, cells=[])
    assert (shares[0] == own[-1]).all() and same["step"]["kl"] == header["steps"][-1]["kl"]
    step, shares = asked(hat, "forced", capacity=0.4, cells=[[5, 1, 2, 1], [5, 2, 3, 0]])
    assert shares[0, 5, 1, 2] == play.WHOLE and shares[0, 5, 2, 3] == 0
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
    assert shares[0, 4, 2, 0] == 0 and shares[0, 5, 2, 0] == play.WHOLE


@pytest.mark.parametrize(
    "question",
    [{"ask": "map", "prompt": " "}, {"ask": "map"}, {"ask": "map", "prompt": "ab " * 100}, {"ask": "rm", "prompt": "a"}]
    + [{"ask": "forced", "prompt": "abc", "capacity": c, "cells": [cell]}
       for c, cell in ((0.5, [0, 0, 0]), (0.5, [3, 0, 0, 1]), (0.5, [0, 9, 0, 1]), (0.5, "x"), (5, [0, 0, 0, 1]))],
)  # fmt: skip
def test_questions_that_are_refused(hat, question):
    with pytest.raises(HatError):
        play.answer(hat, question)


def test_a_view_answers_and_shows_errors_in_place(hat, monkeypatch):
    view, sent = PlayView(hat, {"first": (PROMPT, "look")}), []
    assert unpacked(view.block)[0]["prompt"] == PROMPT and view.presets == [["first", PROMPT, "look"]]
    monkeypatch.setattr(view, "send", lambda message, buffers=None: sent.append((message, buffers)))
    for number, prompt in enumerate((PROMPT, "")):
        view._asked(view, {"id": number, "question": {"ask": "map", "prompt": prompt}}, [])
    (first, (block,)), (second, none) = sent
    assert first == {"id": 0} and unpacked(block)[0]["prompt"] == PROMPT
    assert second["id"] == 1 and second["error"] and none is None
    assert png(map_figure(hat, PROMPT)).startswith(b"\x89PNG") and png(text_figure(hat, PROMPT)).startswith(b"\x89PNG")


def test_a_page_holds_all_it_shows_and_no_prompt_ends_its_script(hat):
    text = still_page(hat, {"a": ("</script><script>alert(1)</script>", "")})
    assert text.count("</script>") == 1 and "https://" not in text
    committed = (REPO / "docs" / "explore.html").read_text(encoding="utf-8")
    assert all((play_page.HERE / name).read_text(encoding="utf-8") in committed for name in ("play.js", "play.css")), (
        "the committed page is older than what draws it: python -m studies.make_page"
    )


@pytest.fixture
def served(hat):
    server = Server(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.hat.set_result(hat)
    yield server
    server.shutdown()
    server.server_close()


def reply(server, method, path, body=None, **headers):
    connection = HTTPConnection(server.host)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def test_a_server_answers_its_own_page_alone(served):
    status, text = reply(served, "GET", "/")
    assert status == 200 and text.startswith(b"<!doctype html>") and reply(served, "GET", "/etc/passwd")[0] == 404
    question = json.dumps({"ask": "map", "prompt": PROMPT})
    status, block = reply(served, "POST", "/ask", question, Origin=f"http://{served.host}")
    assert status == 200 and unpacked(block)[0]["prompt"] == PROMPT
    for body in (json.dumps({"ask": "map", "prompt": ""}), "[1]", "no JSON", None):
        assert reply(served, "POST", "/ask", body)[0] == 400
    local = f"localhost:{served.server_port}"
    assert reply(served, "POST", "/ask", question, Host=local, Origin=f"http://{local}")[0] == 200
    assert reply(served, "POST", "/ask", question, Origin="http://example.org")[0] == 403
    assert reply(served, "POST", "/ask", question, Host="example.org")[0] == 403
    with pytest.raises(HatError):
        Server(served.server_port)


@pytest.mark.slow
@pytest.mark.bundled
def test_explain_writes_a_page(tmp_path):
    file = tmp_path / "new" / "page.html"
    ran = CliRunner().invoke(app, ["explain", "The sea is", "--capacity", "0.6", "--html", str(file)])
    assert ran.exit_code == 0 and "sea" in ran.output and file.stat().st_size < 1e6
    assert CliRunner().invoke(app, ["explain", " "]).exit_code == 2
    assert CliRunner().invoke(app, ["explain", "word " * 300, "--html", str(file)]).exit_code == 2
