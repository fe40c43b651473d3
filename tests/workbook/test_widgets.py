"""The interactive views without a browser: controls are set, text and pictures respond, errors are shown in place."""

import json
import re
import sys
from html import unescape
from types import ModuleType

import numpy as np
import pytest
from tiny_runs import adaptive

from hat_lib.config import HatError
from hat_lib.inference.generate import AdaptiveInference
from hat_lib.plotting.style import png
from hat_lib.rows import results_table
from hat_lib.text.token_classes import pieces
from hat_lib.workbook import generate_view
from hat_lib.workbook import view as views
from hat_lib.workbook.generate_view import STRETCH
from hat_lib.workbook.notebooks import WIDGET_VIEW
from hat_lib.workbook.widgets import FrontierView, GenerateView, TokenMapView, show

LAYERS = 4


def state(view):
    (found,) = re.findall(r'data-state="(\w+)"', view.status.value)
    assert text_of(view.status).endswith(view.words)
    return found


def text_of(html):
    return unescape(re.sub("<[^>]*>", "", html.value.replace("<br>", "\n")))


@pytest.fixture(scope="module")
def hat():
    return adaptive("channel")


@pytest.fixture(scope="module")
def frontier():
    return FrontierView.saved()


class TestFrontier:
    def test_every_setting_has_its_numbers(self, frontier):
        settings = [value for _, value in frontier.setting.options]
        assert (1.0, 0.0) in settings and (0.4, 0.0) in settings
        speeds = results_table("published_claims").query("granularity == 'channel' and base == 'bundled'")
        speeds = speeds.set_index(["capacity", "exit_rate"])["decode_dense"].to_dict()
        for setting in settings:
            frontier.setting.value = setting
            assert state(frontier) == "ready" and f"capacity {setting[0]:.2f} requested" in frontier.words
            if setting != (1.0, 0.0):
                speed = f"decoded {speeds[setting]:.2f}x as fast" if setting in speeds else "time: not measured"
                assert speed in frontier.words and "over the base's" in frontier.words

    def test_a_picture_depends_on_the_setting_alone(self, frontier):
        pictures = []
        for setting in ((0.4, 0.0), (1.0, 0.0), (0.4, 0.0)):
            frontier.setting.value = setting
            pictures.append(bytes(frontier.picture.value))
        assert pictures[0] == pictures[2] != pictures[1] and pictures[0].startswith(b"\x89PNG")

    def test_missing_results(self, tmp_path):
        with pytest.raises(HatError, match=r"quality\.csv"):
            FrontierView.saved(tmp_path)
        with pytest.raises(HatError, match="poems"):
            FrontierView.saved(text="poems")


CAPACITIES = (0.9, 0.45)


class TestGenerate:
    @pytest.fixture
    def generate(self, hat, monkeypatch):
        monkeypatch.setattr(generate_view, "REPEATS", 2)
        hat.capacity, hat.exit_rate = 0.6, 0.0
        return GenerateView(AdaptiveInference(hat), "one two three", CAPACITIES, max_new_tokens=6)

    @pytest.fixture
    def calls(self, generate, monkeypatch):
        """What each call of generate is asked for, and what the view shows then."""
        calls, run = [], generate._infer.generate

        def watched(*args, **kwargs):
            texts = [text.value for text in generate.texts.children]
            calls.append({**kwargs, "state": state(generate), "off": generate.button.disabled, "texts": texts})
            return run(*args, **kwargs)

        monkeypatch.setattr(generate._infer, "generate", watched)
        return calls

    @staticmethod
    def texts(view):
        """Title -> text."""
        return dict(text_of(text).split("\n", 1) for text in view.texts.children)

    def test_nothing_runs_before_it_is_asked_for(self, generate):
        assert state(generate) == "ready" and generate.texts.children == () and generate.table.empty
        assert not generate.prompt.continuous_update and not generate.capacities.continuous_update
        with pytest.raises(HatError):
            generate.twin()

    def test_texts_are_those_of_generate(self, generate, hat):
        generate.button.click()
        assert state(generate) == "ready" and "realised capacity is not what was asked" in generate.words
        assert list(self.texts(generate)) == list(generate.table["text"]) == ["dense", "capacity 0.90", "capacity 0.45"]
        for i, (capacity, passage) in enumerate(zip((1.0, *CAPACITIES), generate._passages, strict=True)):
            text = AdaptiveInference(hat).generate("one two three", capacity=capacity, exit_rate=0.0, max_new_tokens=6)
            assert passage.tokens == pieces(hat.base.tokenizer, text.ids[0, text.prompt_length :].tolist())
            assert generate.table["realised"][i] == f"{text.capacity:.3f}"
            if capacity < 1:
                np.testing.assert_allclose(passage.values, text.token_share[0, text.prompt_length - 1 :], rtol=1e-5)
        assert "background" not in generate.texts.children[0].value and "background" in generate.texts.children[1].value
        assert (hat.capacity, hat.exit_rate) == (0.6, 0.0)

    def test_controls(self, generate):
        generate.capacities.value = "1"
        assert list(self.texts(generate)) == ["dense", "capacity 1.00"]
        assert list(generate.table["parts from dense"]) == ["", "nowhere in 6 tokens"]
        generate.exit_rate.value = 0.5
        assert list(self.texts(generate)) == ["dense", "capacity 1.00, exits 0.50"]
        generate.exit_rate.value, generate.mode.value, generate.capacities.value = 0.0, "lossless", "0.3"
        assert list(self.texts(generate)) == ["dense", "lossless, drafts at 0.30"]
        assert re.fullmatch(r"nowhere in 6 tokens; \d+% of the drafts stood", generate.table["parts from dense"][1])
        assert generate.table["realised"][1].endswith(" of drafts")
        assert png(generate.twin()).startswith(b"\x89PNG")

    def test_the_first_token_unlike_dense_is_framed(self, generate):
        generate.capacities.value = "0.45"
        dense, ours = (passage.tokens for passage in generate._passages)
        at = int(re.match(r"at token (\d+): ", generate.table["parts from dense"][1])[1])
        assert ours[: at - 1] == dense[: at - 1] and ours[at - 1] != dense[at - 1]
        assert [text.value.count("outline:") for text in generate.texts.children] == [0, 1]

    def test_texts_come_token_by_token_and_the_old_ones_stay_until_then(self, generate, calls):
        generate.button.click()
        before, written = [text.value for text in generate.texts.children], []
        generate.texts.children[0].observe(lambda change: written.append(change["new"]), names="value")
        calls.clear()
        generate.prompt.value = "four five"
        assert calls[0]["texts"] == before and len(written) >= 5
        assert all(call["state"] == "busy" and call["off"] for call in calls) and not generate.button.disabled

    def test_speed_is_measured_in_turns(self, generate, calls):
        generate.button.click()
        turns = [call["capacity"] for call in calls if call["max_new_tokens"] == STRETCH]
        assert turns[:3] == turns[:2:-1] and set(turns[:3]) == {1.0, *CAPACITIES}
        assert all(re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", cell) for cell in generate.table["tokens/s"])

    @pytest.mark.parametrize(
        ("control", "value", "words"),
        [
            ("prompt", "   ", "prompt"),
            ("prompt", "x" * 3000, "context"),
            ("capacities", "0.5, fast", "'fast'"),
            ("capacities", "0.5, 0.05", "'0.05'"),
            ("capacities", " ", "1 to 4 capacities"),
            ("capacities", "0.9, 0.8, 0.7, 0.6, 0.5", "1 to 4 capacities"),
        ],
    )
    def test_bad_input_is_shown_in_place_and_the_last_answer_stays(self, generate, control, value, words):
        generate.button.click()
        before = self.texts(generate)
        getattr(generate, control).value = value
        assert state(generate) == "error" and words in generate.words and self.texts(generate) == before
        assert not generate.button.disabled

    @pytest.mark.parametrize("error", [RuntimeError("out of <memory>"), KeyboardInterrupt()])
    def test_no_exception_leaves_a_callback(self, generate, monkeypatch, error):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(generate._infer, "generate", fail)
        generate.exit_rate.value = 0.5
        assert state(generate) == "error" and generate.words in ("RuntimeError: out of <memory>", "interrupted")
        assert not generate.button.disabled

    def test_a_prompt_is_not_read_as_html(self, generate):
        generate.prompt.value = "<script>alert(1)</script>"
        assert "<script" not in "".join(w.value for w in (*generate.texts.children, generate.numbers, generate.status))


PROMPTS = {"first": "The quick brown fox jumps.", "second": "One, <b>two</b>, three, four!"}


class TestTokenMap:
    @pytest.fixture
    def tokens(self, hat):
        hat.capacity, hat.exit_rate = 0.6, 0.6
        return TokenMapView(hat, PROMPTS)

    def test_the_map_is_json_of_every_token_and_layer(self, tokens, hat):
        for name, prompt in PROMPTS.items():
            tokens.text.label = name
            facts = tokens.map.facts
            assert tokens.prompt.value == prompt and state(tokens) == "ready"
            assert np.shape(facts["share"]) == (len(facts["tokens"]), LAYERS)
            assert np.shape(facts["site_share"]) == np.shape(facts["score"]) == (len(facts["tokens"]), 4, LAYERS)
            assert any(None in row for row in facts["share"]), "some tokens have left"
            json.dumps(facts, allow_nan=False)
        assert (hat.capacity, hat.exit_rate) == (0.6, 0.6)

    def test_it_follows_its_sliders(self, tokens):
        assert "capacity 0.60 requested" in tokens.words and not tokens.capacity.continuous_update
        tokens.capacity.value, tokens.exit_rate.value = 1.0, 0.0
        assert {share for row in tokens.map.facts["share"] for share in row} == {1.0}

    def test_its_still_twin_says_the_same(self, tokens):
        tokens.map.token, tokens.map.layer = 4, 1
        page, still = tokens.map.facts["tokens"][4], tokens.about()
        for words in (
            page["headline"],
            *page["lines"],
            *page["means"],
            *(cell for row in page["next"] for cell in row),
        ):
            assert words in still
        assert "layer 1" in still and png(tokens.twin()).startswith(b"\x89PNG")

    def test_a_shorter_prompt_keeps_a_token_selected_and_a_bad_one_keeps_the_map(self, tokens):
        tokens.map.token = len(tokens.map.facts["tokens"]) - 1
        tokens.prompt.value = "ab"
        facts = tokens.map.facts
        assert tokens.map.token == len(facts["tokens"]) - 1 and tokens.about()
        for prompt in (" ", "ab " * 200):
            tokens.prompt.value = prompt
            assert state(tokens) == "error" and tokens.map.facts == facts


def test_show_tells_colab_to_load_the_widgets(hat, monkeypatch):
    events, view = [], GenerateView(AdaptiveInference(hat))
    monkeypatch.setattr(views, "display", lambda shown: events.append(shown))
    show(view)
    output = ModuleType("google.colab.output")
    output.enable_custom_widget_manager = lambda: events.append("enabled")
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    monkeypatch.setattr(views, "in_colab", lambda: True)
    show(view)
    assert events == [view, "enabled", view]
    bundle = view._repr_mimebundle_()
    assert bundle[WIDGET_VIEW]["model_id"] == view.model_id and "run this cell" in bundle["text/plain"]
