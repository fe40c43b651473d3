"""The interactive views without a browser: sliders are set, text and pictures respond, errors are shown in place."""

import json
import re
import sys
from html import unescape
from io import BytesIO
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from ipywidgets import Widget
from matplotlib.image import imread
from tiny_runs import adaptive

from hat_lib.config import HatError
from hat_lib.inference.generate import AdaptiveInference
from hat_lib.plotting.frontier import points, twin
from hat_lib.plotting.style import png
from hat_lib.workbook import generate_view
from hat_lib.workbook import view as views
from hat_lib.workbook.generate_view import STRETCH
from hat_lib.workbook.notebooks import WIDGET_VIEW
from hat_lib.workbook.widgets import FrontierView, GenerateView, TokenMapView, show
from studies import published_claims, quality

LAYERS = 4


def said(view):
    """State and text of a view's status line."""
    (state, body) = re.fullmatch(
        r'<div role="status" data-state="(\w+)"[^>]*>(.*)</div>', view.said.value, re.S
    ).groups()
    return state, unescape(re.sub("<br>", "\n", body))


def text_of(html):
    return unescape(re.sub("<[^>]*>", "", html.value.replace("<br>", "\n")))


# --- the frontier ---


def quality_row(capacity, exit_rate=0.0, increase=0.1, **changes):
    values = dict.fromkeys(quality.Row.__dataclass_fields__, 0.0) | {
        "granularity": "channel", "text": "docstrings", "variant": "trained", "capacity": capacity,
        "exit_rate": exit_rate, "realised": capacity + 0.003, "realised_exit": exit_rate + 0.001,
        "model_share": 0.2 + 0.8 * capacity, "base_ppl": 20.0, "ppl": 20 * (1 + increase), "increase": increase,
        "increase_low": increase - 0.02, "increase_high": increase + 0.02, "tokens": 1000, "base": "bundled",
    }  # fmt: skip
    return values | changes


def quality_table():
    rows = [quality_row(0.4, increase=0.9), quality_row(0.62), quality_row(0.8, increase=0.01)]
    rows += [quality_row(0.62, 0.1, increase=0.4), quality_row(1.0, 0.1, increase=0.3)]
    others = [{"variant": "random"}, {"text": "addresses"}, {"granularity": "token"}, {"tokens": 10}]
    return pd.DataFrame(rows + [quality_row(0.62, increase=7.0, **other) for other in others])


def layers_table(settings=((0.4, 0.0), (0.62, 0.0), (0.8, 0.0), (0.62, 0.1), (1.0, 0.1), (1.0, 0.0))):
    rows = [(c, e, i, c * (1 - e) ** i, (1 - e) ** i, 64) for c, e in settings for i in range(LAYERS)]
    return pd.DataFrame(rows, columns=["capacity", "exit_rate", "layer", "executed", "entered", "tokens"])


def promise_table():
    known = [(0.4, 0.0, 1.5), (0.8, 0.0, 1.1), (1.0, 0.1, 1.03), (0.9, 0.0, 1.05)]
    empty = dict.fromkeys(published_claims.Row.__dataclass_fields__, 0.0)
    machine = {"granularity": "channel", "device": "cpu", "dtype": "bfloat16", "threads": 2}
    times = [{"capacity": c, "exit_rate": e, "decode_dense": s, "decode_hf": 2 * s} for c, e, s in known]
    rows = [empty | machine | {"base": "bundled"} | row for row in times]
    return pd.DataFrame([*rows, rows[0] | {"base": "random:tinyllama", "decode_dense": 9.0}])


@pytest.fixture
def frontier():
    return FrontierView(points(quality_table()), layers_table(), promise_table())


def test_points_are_the_trained_rows_on_most_tokens_and_the_base():
    table = points(quality_table())
    settings = list(zip(table["exit_rate"], table["capacity"], table["increase"], strict=True))
    assert settings == [(0, 0.4, 0.9), (0, 0.62, 0.1), (0, 0.8, 0.01), (0, 1, 0), (0.1, 0.62, 0.4), (0.1, 1, 0.3)]
    base = table.iloc[3]
    assert (base["ppl"], base["model_share"], base["realised"], base["realised_exit"]) == (20, 1, 1, 0)
    with pytest.raises(HatError, match="channel and poems: run `python -m studies quality`"):
        points(quality_table(), text="poems")


def settings(view):
    return [value for _, value in view.setting.options]


def test_a_point_of_the_frontier_is_told_with_its_quality_and_its_time(frontier):
    frontier.setting.value = (0.4, 0.0)
    assert said(frontier) == (
        "ready",
        "capacity 0.40 requested, 0.403 realised; exit rate 0.00 requested, 0.001 realised; model share 0.520\n"
        "quality: perplexity +90.0% (+88.0% to +92.0%) over the base's 20.00 (1,000 tokens of docstrings, a 4-bit "
        "file, dequantised)\n"
        "time: a token is decoded 1.50x as fast as dense, 3.00x as fast as transformers (cpu, bfloat16, 2 threads)\n"
        "executed by layer: least 40.0% (layer 0), most 40.0% (layer 0) (on 64 tokens)",
    )
    frontier.setting.value = (1.0, 0.0)
    assert "quality: perplexity is the base's 20.00" in said(frontier)[1]
    assert "time: our own dense path, which the others are timed against" in said(frontier)[1]
    frontier.setting.label = "1.00, exits 0.10"
    assert "1.03x as fast as dense" in said(frontier)[1] and "+30.0%" in said(frontier)[1]
    assert frontier.words == said(frontier)[1]


def test_only_settings_with_quality_layers_and_time_are_offered(frontier):
    # (0.62, 0) and (0.62, 0.1) were not timed, (0.9, 0) has no quality.
    assert settings(frontier) == [(0.4, 0.0), (0.8, 0.0), (1.0, 0.0), (1.0, 0.1)]
    for claims in (None, promise_table().assign(granularity="token")):  # no times at all: only quality
        view = FrontierView(points(quality_table()), layers_table(), claims)
        assert settings(view) == [(0.4, 0), (0.62, 0), (0.8, 0), (1.0, 0), (0.62, 0.1), (1.0, 0.1)]
        assert "time" not in said(view)[1]
    few = layers_table([(0.4, 0.0), (1.0, 0.0)])
    assert settings(FrontierView(points(quality_table()), few)) == [(0.4, 0.0), (1.0, 0.0)]


def test_an_increase_is_told_with_the_base_of_its_own_tokens():
    longer = quality_row(0.8, increase=0.02, tokens=5000, base_ppl=19.0)
    view = FrontierView(points(pd.concat([quality_table(), pd.DataFrame([longer])])), layers_table())
    for setting, base in (((0.4, 0.0), "20.00 (1,000"), ((0.8, 0.0), "19.00 (5,000"), ((1.0, 0.0), "19.00 (5,000")):
        view.setting.value = setting
        assert f"the base's {base} tokens of docstrings" in said(view)[1]


def test_the_picture_has_one_point_and_the_layers_of_the_setting(frontier):
    def pixels(capacity):
        frontier.setting.value = (capacity, 0.0)
        return imread(BytesIO(frontier.picture.value))

    low, high = pixels(0.4), pixels(0.8)
    half = low.shape[1] // 2
    for part in (slice(None, half), slice(half, None)):  # the point on the left, the bars on the right
        assert not np.array_equal(low[:, part], high[:, part])
    assert np.array_equal(pixels(0.4), low)  # nothing is left over from the others


def test_twin_shows_every_setting():
    fig = twin(quality_table(), layers_table())
    cost, work = fig.axes[:2]
    assert sorted(t.get_text() for t in cost.texts) == ["0.40", "0.62", "0.62", "0.80", "1.00", "1.00"]
    names = [t.get_text() for t in work.get_yticklabels()]
    assert names == ["0.40", "0.62", "0.80", "1.00", "0.62, exits 0.1", "1.00, exits 0.1"]
    assert np.array_equal(work.collections[0].get_array()[4], 0.62 * 0.9 ** np.arange(LAYERS))
    assert png(fig).startswith(b"\x89PNG")


def test_frontier_reads_the_saved_sweep(tmp_path):
    with pytest.raises(HatError, match=r"no .*quality.csv: make it with `python -m studies quality`"):
        FrontierView.saved(tmp_path)
    quality_table().to_csv(tmp_path / "quality.csv", index=False)
    with pytest.raises(HatError, match=r"no .*layer_shares.csv: make it with `python -m studies layer_shares`"):
        FrontierView.saved(tmp_path)
    layers_table().to_csv(tmp_path / "layer_shares.csv", index=False)
    assert "as fast as dense" not in said(FrontierView.saved(tmp_path))[1]
    promise_table().to_csv(tmp_path / "published_claims.csv", index=False)
    assert "as fast as dense" in said(FrontierView.saved(tmp_path))[1]
    with pytest.raises(HatError, match="token and addresses"):
        FrontierView.saved(tmp_path, granularity="token", text="addresses")


def test_the_committed_results_are_under_the_slider():
    view = FrontierView.saved()
    for setting in settings(view):
        view.setting.value = setting
        assert said(view)[0] == "ready" and f"capacity {setting[0]:.2f} requested" in said(view)[1]


@pytest.fixture(scope="module")
def hat():
    return adaptive("channel")


# --- generation ---


CAPACITIES = (0.9, 0.45)


@pytest.fixture
def generate(hat, monkeypatch):
    monkeypatch.setattr(generate_view, "REPEATS", 2)
    hat.capacity, hat.exit_rate = 0.6, 0.0
    return GenerateView(AdaptiveInference(hat), "one two three", CAPACITIES, max_new_tokens=6)


@pytest.fixture
def seen(generate, monkeypatch):
    """What the view showed at each call of generate, with the call's settings."""
    seen, run = [], generate._infer.generate

    def watched(*args, **kwargs):
        seen.append((kwargs["capacity"], kwargs["max_new_tokens"], [side.value for side in generate.texts.children]))
        return run(*args, **kwargs)

    monkeypatch.setattr(generate._infer, "generate", watched)
    return seen


def sides(view):
    """Title and text of each side."""
    return dict(text_of(side).split("\n", 1) for side in view.texts.children)


def test_nothing_runs_before_it_is_asked_for(generate):
    assert said(generate) == ("ready", "press Generate, or change a control")
    assert generate.texts.children == () and generate.numbers.value == ""
    controls = (generate.capacities, generate.exit_rate, generate.prompt)
    assert not any(c.continuous_update for c in controls) and all(c.description for c in (*controls, generate.mode))


def test_texts_stand_side_by_side_and_follow_the_controls(generate, hat):
    generate.button.click()
    state, text = said(generate)
    assert state == "ready" and "realised capacity is not what was asked: thresholds were set on other" in text
    assert list(sides(generate)) == generate.table["text"].tolist() == ["dense", "capacity 0.90", "capacity 0.45"]
    for capacity, shown in zip((1.0, *CAPACITIES), sides(generate).values(), strict=True):
        found = AdaptiveInference(hat).generate("one two three", capacity=capacity, exit_rate=0.0, max_new_tokens=6)
        assert len(shown) >= len(found.texts[0])
        row = generate.table.iloc[(1.0, *CAPACITIES).index(capacity)]
        assert row["realised"] == f"{found.capacity:.3f}" and row["model share"] == f"{found.model_share:.1%}"
    assert all(re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", told) for told in generate.table["tokens/s"])
    assert "background" not in generate.texts.children[0].value and "background" in generate.texts.children[1].value
    generate.capacities.value = "1"
    assert list(sides(generate)) == ["dense", "capacity 1.00"]
    assert generate.table["parts from dense"].tolist() == ["", "nowhere in 6 tokens"]
    assert "realised capacity" not in said(generate)[1]
    generate.exit_rate.value = 0.5
    assert list(sides(generate)) == ["dense", "capacity 1.00, exits 0.50"]
    assert (hat.capacity, hat.exit_rate) == (0.6, 0.0)  # the model is left alone
    generate.exit_rate.value = 0.0
    generate.mode.value, generate.capacities.value = "lossless", "0.3"
    assert list(sides(generate)) == ["dense", "lossless, drafts at 0.30"]
    assert re.fullmatch(r"nowhere in 6 tokens; \d+% of the drafts stood", generate.table["parts from dense"][1])
    row, found = generate.table.iloc[1], generate._found[1]
    assert row["realised"] == f"{found.capacity:.3f} of drafts"
    assert row["model share"] == f"{found.model_share:.1%} with verification" and found.model_share > 1


def test_a_text_that_comes_slower_than_the_dense_one_is_called_so(generate, monkeypatch):
    speeds = np.array([[8.0, 10.0], [4.0, 5.0], [16.0, 20.0]])
    monkeypatch.setattr(generate, "_speeds", lambda *_: speeds)
    generate.button.click()
    assert ["slower" in told for told in generate.table["speed"]] == [False, True, False]
    assert [told[:5] for told in generate.table["speed"]] == ["", "0.50x", "2.00x"]


def test_a_text_is_written_token_by_token_and_the_old_one_stays_until_then(generate, seen):
    generate.button.click()
    before = [side.value for side in generate.texts.children]
    written = []
    generate.texts.children[0].observe(lambda change: written.append(change["new"]), names="value")
    seen.clear()
    generate.prompt.value = "four five"
    assert seen[0][2] == before  # nothing was cleared
    assert len(written) >= 5 and all(len(a) < len(b) for a, b in zip(written[:5], written[1:5], strict=False))


def test_the_first_token_that_is_not_the_dense_ones_is_framed(generate):
    generate.capacities.value = "0.45"
    (row,) = generate.table.iloc[1:].itertuples()
    at = int(re.match(r"at token (\d+): “.*” for “.*”", row[-1])[1])
    dense, ours = (g.ids[0, g.prompt_length :].tolist() for g in generate._found)
    assert ours[: at - 1] == dense[: at - 1] and ours[at - 1] != dense[at - 1]
    assert generate.texts.children[1].value.count("outline:") == 1
    assert "outline:" not in generate.texts.children[0].value
    assert sum(not patch.get_fill() for patch in generate.twin().axes[0].patches) == 1


def test_speed_is_that_of_the_same_prompt_again_in_turns(generate, seen):
    generate.button.click()
    ways = [1.0, *CAPACITIES]
    assert [(c, n) for c, n, _ in seen[:3]] == [(c, 6) for c in ways]
    turns = [(c, n) for c, n, _ in seen[3:]]
    assert turns[:6] == [(c, STRETCH) for c in (*reversed(ways), *ways)] and len(turns) == 6
    seen.clear()
    generate.button.click()
    assert [c for c, n, _ in seen if n == 6] == list(CAPACITIES)  # the dense text of the same prompt is kept


def test_while_it_runs_the_view_is_busy_and_only_its_button_is_off(generate, monkeypatch):
    states, run = [], generate._infer.generate

    def watched(*args, **kwargs):
        keep_their_keys = (generate.prompt, generate.capacities, generate.exit_rate, generate.mode)
        off = generate.button.disabled and not any(control.disabled for control in keep_their_keys)
        states.append((*said(generate), off))
        return run(*args, **kwargs)

    monkeypatch.setattr(generate._infer, "generate", watched)
    generate.button.click()
    assert states[:4] == [("busy", f"⏳ {what}", True) for what in (
        "generating: dense", "generating: capacity 0.90", "generating: capacity 0.45",
        "timing the same prompt again, in turns",
    )]  # fmt: skip
    assert not generate.button.disabled


@pytest.mark.parametrize(
    ("control", "value", "words"),
    [
        ("prompt", "   ", "a prompt must be text to continue"),
        ("prompt", "x" * 3000, "exceed the context"),
        ("capacities", "0.5, fast", "capacity must be a number in [0.1, 1.0], got 'fast'"),
        ("capacities", "0.5, 0.05", "got '0.05'"),
        ("capacities", " ", "expected 1 to 4 capacities"),
        ("capacities", "0.9, 0.8, 0.7, 0.6, 0.5", "expected 1 to 4 capacities"),
    ],
)
def test_bad_input_is_told_in_place_and_the_last_answer_stays(generate, control, value, words):
    generate.button.click()
    before, good = sides(generate), getattr(generate, control).value
    getattr(generate, control).value = value
    state, text = said(generate)
    assert state == "error" and words in text and sides(generate) == before
    assert not generate.button.disabled
    getattr(generate, control).value = good
    assert said(generate)[0] == "ready"


@pytest.mark.parametrize("error", [RuntimeError("out of <memory>"), KeyboardInterrupt()])
def test_no_exception_leaves_a_callback(generate, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(generate._infer, "generate", fail)
    generate.exit_rate.value = 0.5
    state, text = said(generate)
    assert state == "error" and text in ("⚠ RuntimeError: out of <memory>", "⚠ interrupted")
    assert not generate.button.disabled


def test_a_prompt_cannot_act_in_the_page(generate):
    generate.prompt.value = "<script>alert(1)</script>"
    assert "<script" not in "".join(w.value for w in (*generate.texts.children, generate.numbers, generate.said))


def test_the_twin_is_the_last_answer(generate):
    with pytest.raises(HatError, match="no answer to draw"):
        generate.twin()
    generate.button.click()
    for mode, grounds in (("adaptive", True), ("lossless", False)):
        generate.mode.value = mode
        ax = generate.twin().axes[0]
        assert any(patch.get_y() > 3 and patch.get_fill() for patch in ax.patches) == grounds
        assert [t.get_text() for t in ax.texts if t.get_weight() == "bold"] == generate.table["text"].tolist()


# --- the map of tokens ---


PROMPTS = {"first": "The quick brown fox jumps.", "second": "One, <b>two</b>, three, four!"}


@pytest.fixture
def tokens(hat):
    hat.capacity, hat.exit_rate = 0.6, 0.6
    return TokenMapView(hat, PROMPTS)


def test_a_prompt_is_mapped_token_by_layer_as_json(tokens, hat):
    for name, prompt in PROMPTS.items():
        tokens.text.label = name
        facts, known = tokens.map.facts, tokens.found.tokens
        assert tokens.prompt.value == prompt == "".join(known["text"]) and said(tokens)[0] == "ready"
        assert np.shape(facts["share"]) == (len(known), LAYERS) and np.shape(facts["site_share"])[1] == 4
        gone = [sum(share is None for share in row) for row in facts["share"]]
        assert gone == (LAYERS - known["exit_layer"]).tolist() and any(gone)
        assert [t["protected"] for t in facts["tokens"]] == known["protected"].tolist()
        json.dumps(facts, allow_nan=False)
    assert (hat.capacity, hat.exit_rate) == (0.6, 0.6)


def test_the_map_follows_its_sliders(tokens):
    assert "capacity 0.60 requested" in said(tokens)[1] and not tokens.capacity.continuous_update
    tokens.capacity.value = 1.0
    tokens.exit_rate.value = 0.0
    assert "capacity 1.00 requested, 1.000 realised" in said(tokens)[1]
    assert {share for row in tokens.map.facts["share"] for share in row} == {1.0}


def test_the_words_of_the_page_are_those_of_the_still_twin(tokens):
    tokens.map.token, tokens.map.layer = 4, 1
    shown, told = tokens.map.facts["tokens"][4], tokens.about()
    for words in (shown["headline"], *shown["lines"], *shown["means"], *(c for row in shown["next"] for c in row)):
        assert words in told
    assert "layer 1" in told and f"{tokens.map.facts['score'][4][0][1]:.2f}" in told
    heat = tokens.twin().axes[0].collections[0].get_array()
    assert heat.shape == (LAYERS, len(tokens.map.facts["tokens"]))
    names = [text.get_text() for text in tokens.twin().legends[0].get_texts()]
    assert names == ["had left", "at the start: protected, runs in full", "left before this layer"]


def test_a_shorter_prompt_keeps_a_token_picked_and_a_bad_one_keeps_the_map(tokens):
    tokens.map.token = len(tokens.map.facts["tokens"]) - 1
    tokens.prompt.value = "ab"
    assert tokens.map.token == len(tokens.map.facts["tokens"]) - 1 and tokens.about()
    facts = tokens.map.facts
    for prompt, words in ((" ", "a prompt must be text"), ("ab " * 200, "a map shows up to 128 tokens")):
        tokens.prompt.value = prompt
        assert said(tokens)[0] == "error" and words in said(tokens)[1] and tokens.map.facts == facts


def test_the_page_takes_what_it_shows_as_text_and_asks_for_nothing_elsewhere(tokens):
    script, look = str(tokens.map._esm), str(tokens.map._css)
    assert "export default" in script and ".hat-map" in look
    for forbidden in ("innerHTML", "insertAdjacentHTML", "import ", "http", "fetch(", "url("):
        assert forbidden not in script + look


# --- notebooks ---


def test_colab_is_told_to_load_the_widgets_and_other_places_are_not(generate, monkeypatch):
    view = generate
    shown, enabled = [], []
    monkeypatch.setattr(views, "display", lambda bundle, raw: shown.append(bundle))
    show(view)
    assert enabled == []
    output = ModuleType("google.colab.output")
    output.enable_custom_widget_manager = lambda: enabled.append(len(shown))
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    monkeypatch.setattr(views, "in_colab", lambda: True)
    show(view)
    assert enabled == [1] and len(shown) == 2  # before the second view was displayed
    assert [bundle[WIDGET_VIEW]["model_id"] for bundle in shown] == [view.model_id] * 2
    assert shown[0]["text/plain"] == "GenerateView: run this cell to use it"


def test_views_are_made_of_stock_widgets_and_one_of_our_own(tokens, frontier, generate):
    def pieces(widget: Widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from pieces(child)

    modules = {w._view_module for view in (tokens, frontier, generate) for w in pieces(view)}
    assert modules == {"@jupyter-widgets/controls", "anywidget"}
