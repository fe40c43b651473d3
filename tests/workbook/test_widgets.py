"""The interactive views without a browser: controls are set, text and pictures respond, errors are shown in place."""

import json
import re
import sys
from html import unescape
from types import ModuleType

import numpy as np
import pytest
from tiny_runs import skipping

from hat_lib.config import HatError
from hat_lib.inference.generate import AdaptiveInference
from hat_lib.plotting.style import png
from hat_lib.rows import results_table
from hat_lib.text.token_classes import pieces
from hat_lib.workbook import generate_view
from hat_lib.workbook import view as views
from hat_lib.workbook.generate_view import STRETCH
from hat_lib.workbook.widgets import FrontierView, GenerateView, TokenMapView, show

LAYERS, CAPACITIES = 4, (0.9, 0.45)
PROMPTS = {"first": "The quick brown fox jumps.", "second": "One, <b>two</b>, three, four!"}


def state(view):
    return re.search(r'data-state="(\w+)"', view.status.value)[1]


def texts(view):
    """Title -> text of a `GenerateView`."""
    shown = (unescape(re.sub("<[^>]*>", "", text.value.replace("<br>", "\n"))) for text in view.texts.children)
    return dict(text.split("\n", 1) for text in shown)


@pytest.fixture(scope="module")
def hat():
    return skipping("channel")


@pytest.fixture(scope="module")
def frontier():
    return FrontierView()


@pytest.fixture
def generate(hat, monkeypatch):
    monkeypatch.setattr(generate_view, "REPEATS", 2)
    hat.capacity, hat.exit_rate = 0.6, 0.0
    return GenerateView(AdaptiveInference(hat), "one two three", CAPACITIES, max_new_tokens=6)


@pytest.fixture
def tokens(hat):
    hat.capacity, hat.exit_rate = 0.6, 0.6
    return TokenMapView(hat, PROMPTS)


def test_frontier_has_numbers_for_every_setting(frontier, monkeypatch):
    monkeypatch.setattr(FrontierView, "_picture", lambda *_: b"")
    settings = [value for _, value in frontier.setting.options]
    speeds = results_table("published_claims").query("granularity == 'channel' and base == 'bundled'")
    speeds = speeds.set_index(["capacity", "exit_rate"])["decode_dense"].to_dict()
    assert (1.0, 0.0) in settings
    for setting in settings:
        frontier.setting.value = setting
        assert state(frontier) == "ready" and f"capacity {setting[0]:.2f} requested" in frontier.words
        if setting != (1.0, 0.0):
            assert (f"decoded {speeds[setting]:.2f}x" if setting in speeds else "not measured") in frontier.words


def test_frontier_picture_depends_on_the_setting_alone(frontier):
    pictures = []
    for setting in ((0.4, 0.0), (1.0, 0.0), (0.4, 0.0)):
        frontier.setting.value = setting
        pictures.append(bytes(frontier.picture.value))
    assert pictures[0] == pictures[2] != pictures[1] and pictures[0].startswith(b"\x89PNG")


def test_frontier_without_results(tmp_path):
    for wrong in ({"results": tmp_path}, {"text": "poems"}):
        with pytest.raises(HatError):
            FrontierView(**wrong)


def test_generate_shows_what_generate_gives(generate, hat):
    assert state(generate) == "ready" and generate.texts.children == ()  # nothing runs before it is asked for
    with pytest.raises(HatError):
        generate.twin()
    generate.button.click()
    assert list(texts(generate)) == list(generate.table["text"]) == ["dense", "capacity 0.90", "capacity 0.45"]
    for i, (capacity, passage) in enumerate(zip((1.0, *CAPACITIES), generate._passages, strict=True)):
        text = AdaptiveInference(hat).generate("one two three", capacity=capacity, exit_rate=0.0, max_new_tokens=6)
        assert passage.tokens == pieces(hat.base.tokenizer, text.ids[0, text.prompt_length :].tolist())
        assert generate.table["realised"][i] == f"{text.capacity:.3f}"
        if capacity < 1:
            np.testing.assert_allclose(passage.values, text.token_share[0, text.prompt_length - 1 :], rtol=1e-5)
    assert ["background" in text.value for text in generate.texts.children] == [False, True, True]
    assert (hat.capacity, hat.exit_rate) == (0.6, 0.0) and png(generate.twin()).startswith(b"\x89PNG")


def test_generate_follows_its_controls(generate):
    generate.capacities.value = "1"
    assert list(texts(generate)) == ["dense", "capacity 1.00"]
    assert list(generate.table["parts from dense"]) == ["", "nowhere in 6 tokens"]
    generate.exit_rate.value = 0.5
    assert list(texts(generate)) == ["dense", "capacity 1.00, exits 0.50"]
    generate.exit_rate.value, generate.capacities.value = 0.0, "0.45"
    dense, ours = (passage.tokens for passage in generate._passages)
    at = int(re.match(r"at token (\d+): ", generate.table["parts from dense"][1])[1])
    assert ours[: at - 1] == dense[: at - 1] and ours[at - 1] != dense[at - 1]
    assert [text.value.count("outline:") for text in generate.texts.children] == [0, 1]  # the first unlike dense
    generate.mode.value, generate.capacities.value = "lossless", "0.3"
    assert list(texts(generate)) == ["dense", "lossless, drafts at 0.30"]
    assert "of the drafts stood" in generate.table["parts from dense"][1]


def test_generate_streams_and_times_in_turns(generate, monkeypatch):
    calls, written, run = [], [], generate._infer.generate

    def watched(*args, **kwargs):
        shown = [text.value for text in generate.texts.children]
        calls.append({**kwargs, "state": state(generate), "off": generate.button.disabled, "texts": shown})
        return run(*args, **kwargs)

    generate.button.click()
    before = [text.value for text in generate.texts.children]
    generate.texts.children[0].observe(lambda change: written.append(change["new"]), names="value")
    monkeypatch.setattr(generate._infer, "generate", watched)
    generate.prompt.value = "four five"
    assert calls[0]["texts"] == before and len(written) >= 5  # the old texts stay until the first token
    assert all(call["state"] == "busy" and call["off"] for call in calls) and not generate.button.disabled
    turns = [call["capacity"] for call in calls if call["max_new_tokens"] == STRETCH]
    assert turns[:3] == turns[:2:-1] and set(turns[:3]) == {1.0, *CAPACITIES}


@pytest.mark.parametrize(
    ("control", "value"),
    [("prompt", "   "), ("prompt", "x" * 3000), ("capacities", "0.5, fast"), ("capacities", "0.5, 0.05")]
    + [("capacities", " "), ("capacities", "0.9, 0.8, 0.7, 0.6, 0.5")],
)
def test_generate_shows_an_error_in_place(generate, control, value):
    generate.button.click()
    before = texts(generate)
    getattr(generate, control).value = value
    assert state(generate) == "error" and texts(generate) == before and not generate.button.disabled


@pytest.mark.parametrize("error", [RuntimeError("out of <memory>"), KeyboardInterrupt()])
def test_no_exception_leaves_a_callback(generate, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(generate._infer, "generate", fail)
    generate.exit_rate.value = 0.5
    assert state(generate) == "error" and "<memory" not in generate.status.value and not generate.button.disabled


def test_a_prompt_is_not_read_as_html(generate):
    generate.prompt.value = "<script>alert(1)</script>"
    assert "<script" not in "".join(w.value for w in (*generate.texts.children, generate.numbers, generate.status))


def test_token_map_is_json_of_every_token_and_layer(tokens, hat):
    for name, prompt in PROMPTS.items():
        tokens.text.label = name
        facts = tokens.map.facts
        assert tokens.prompt.value == prompt and state(tokens) == "ready"
        assert np.shape(facts["share"]) == (len(facts["tokens"]), LAYERS)
        assert np.shape(facts["site_share"]) == np.shape(facts["score"]) == (len(facts["tokens"]), 4, LAYERS)
        assert any(None in row for row in facts["share"]), "some tokens have left"
        json.dumps(facts, allow_nan=False)
    assert (hat.capacity, hat.exit_rate) == (0.6, 0.6)
    tokens.capacity.value, tokens.exit_rate.value = 1.0, 0.0
    assert {share for row in tokens.map.facts["share"] for share in row} == {1.0}


def test_token_map_and_its_still_twin_say_the_same(tokens):
    tokens.map.token, tokens.map.layer = 4, 1
    page, still = tokens.map.facts["tokens"][4], tokens.about()
    words = [page["headline"], *page["lines"], *page["means"], *(cell for row in page["next"] for cell in row)]
    assert all(word in still for word in words)
    assert "layer 1" in still and png(tokens.twin()).startswith(b"\x89PNG")


def test_token_map_of_a_shorter_and_of_a_bad_prompt(tokens):
    tokens.map.token = len(tokens.map.facts["tokens"]) - 1
    tokens.prompt.value = "ab"
    facts = tokens.map.facts
    assert tokens.map.token == len(facts["tokens"]) - 1 and tokens.about()
    for prompt in (" ", "ab " * 200):
        tokens.prompt.value = prompt
        assert state(tokens) == "error" and tokens.map.facts == facts


def test_show_tells_colab_to_load_the_widgets(frontier, monkeypatch):
    events, output = [], ModuleType("google.colab.output")
    monkeypatch.setattr(views, "display", events.append)
    show(frontier)
    output.enable_custom_widget_manager = lambda: events.append("enabled")
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    monkeypatch.setattr(views, "in_colab", lambda: True)
    show(frontier)
    assert events == [frontier, "enabled", frontier]
    assert "run this cell" in frontier._repr_mimebundle_()["text/plain"]
