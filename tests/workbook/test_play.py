"""The screen as a widget, as a page and served, without a browser."""

import json
import threading
from http.client import HTTPConnection

import pytest
from tiny_runs import skipping, unpacked
from typer.testing import CliRunner

from hat_lib.cli.app import app
from hat_lib.config import REPO, HatError
from hat_lib.plotting.style import png
from hat_lib.workbook import play_page, play_view
from hat_lib.workbook.play_page import Server, html
from hat_lib.workbook.screen import CAPACITIES, Screen
from studies.plotting.notebooks import prompt_map, prompt_texts

PROMPT = "One, <b>two</b>, three, four!"


@pytest.fixture(scope="module")
def hat():
    hat = skipping("channel")
    hat.capacity, hat.exit_rate = 0.6, 0.0
    return hat


def test_a_view_answers_and_shows_errors_in_place(hat, monkeypatch):
    view, sent = play_view.PlayView(hat, {"first": (PROMPT, "look")}), []
    assert unpacked(view.block)[0]["prompt"] == PROMPT and view.presets == [["first", PROMPT, "look"]]
    monkeypatch.setattr(view, "send", lambda message, buffers=None: sent.append((message, buffers)))
    for number, prompt in enumerate((PROMPT, "")):
        view._asked(view, {"id": number, "question": {"ask": "map", "prompt": prompt}}, [])
    (first, (block,)), (second, none) = sent
    monkeypatch.setattr(play_view, "display", lambda shown: sent.append(shown))
    view.show()
    assert sent[-1] is view and len(unpacked(view.texts)[0]["texts"]) == len(CAPACITIES)
    assert first == {"id": 0} and unpacked(block)[0]["prompt"] == PROMPT
    assert second["id"] == 1 and second["error"] and none is None
    assert png(prompt_map(hat, PROMPT)).startswith(b"\x89PNG") and png(prompt_texts(hat, PROMPT)).startswith(b"\x89PNG")


def test_a_page_holds_all_it_shows_and_no_prompt_ends_its_script(hat):
    text = html({"a": ("</script><script>alert(1)</script>", "")}, Screen(hat))
    assert text.count("</script>") == 1 and "https://" not in text
    committed = (REPO / "docs" / "explore.html").read_text(encoding="utf-8")
    assert play_page.SCRIPT in committed and play_page.STYLE in committed, (
        "the committed page is older than what draws it: python -m studies.make_page"
    )
    kept = (REPO / "notebooks" / "07_routing_patterns.ipynb").read_text(encoding="utf-8")
    assert json.dumps(play_page.SCRIPT, ensure_ascii=False) in kept, "as is the screen that 07 keeps: execute 07"


@pytest.fixture
def served(hat):
    server = Server(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.screen.set_result(Screen(hat))
    yield server
    server.shutdown()
    server.server_close()


def reply(server, method, path, body=None, **headers):
    connection = HTTPConnection(server.host, timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def test_a_server_answers_its_own_page_alone(served, monkeypatch):
    status, text = reply(served, "GET", "/")
    assert status == 200 and text.startswith(b"<!doctype html>") and reply(served, "GET", "/etc/passwd")[0] == 404
    question = json.dumps({"ask": "map", "prompt": PROMPT})
    status, block = reply(served, "POST", "/ask", question, Origin=f"http://{served.host}")
    assert status == 200 and unpacked(block)[0]["prompt"] == PROMPT
    forced = '{"ask": "forced", "prompt": "abc", "capacity": 0.5, "cells": [[0, 0, 0, 1.0]]}'
    for body in ('{"ask": "map"}', "[1]", "no JSON", "[" * 99999, forced, forced.replace("0.5", "1" * 400)):
        status, text = reply(served, "POST", "/ask", body)
        assert status == 400 and text and b"\n" not in text
    monkeypatch.setattr(play_page._Handler, "timeout", 0.1)
    for length, status in (("1000000000000", 413), ("-1", 413), ("", 413), ("9", 408)):
        assert reply(served, "POST", "/ask", **{"Content-Length": length})[0] == status
    monkeypatch.undo()
    local = f"localhost:{served.server_port}"
    assert reply(served, "POST", "/ask", question, Host=local, Origin=f"http://{local}")[0] == 200
    assert reply(served, "POST", "/ask", question, Origin="http://example.org")[0] == 403
    assert reply(served, "POST", "/ask", question, Host="example.org")[0] == 403
    with pytest.raises(HatError):
        Server(served.server_port)


def test_a_closed_tab_prints_nothing(served, capsys):
    for error, printed in ((BrokenPipeError, False), (KeyError, True)):
        try:
            raise error
        except error:
            served.handle_error(None, "127.0.0.1")
        assert bool(capsys.readouterr().err) == printed


@pytest.mark.slow
@pytest.mark.bundled
def test_explain_writes_a_page(tmp_path):
    file = tmp_path / "new" / "page.html"
    ran = CliRunner().invoke(app, ["explain", "The sea is", "--capacity", "0.6", "--html", str(file)])
    assert ran.exit_code == 0 and "sea" in ran.output and file.stat().st_size < 1e6
    assert CliRunner().invoke(app, ["explain", "word " * 300, "--html", str(file)]).exit_code == 2
