"""The interactive views without a browser: sliders are set, text and pictures answer, errors are told in place."""

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
from hat_lib.evaluation.routing import patterns, prompt_blocks
from hat_lib.experiments import published_claims, quality
from hat_lib.inference.generate import AdaptiveInference
from hat_lib.plotting.frontier import points, twin
from hat_lib.plotting.style import png
from hat_lib.workbook import widgets
from hat_lib.workbook.notebooks import WIDGET_VIEW
from hat_lib.workbook.widgets import ALL, FrontierView, GenerateView, RoutingView, show

LAYERS = 4


def said(view):
    """State and text of a view's status."""
    (state, body) = re.fullmatch(r'<div role="status" data-state="(\w+)">(.*)</div>', view.said.value, re.S).groups()
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
    known = [(0.4, 0.0, 1.5), (0.8, 0.0, 1.1), (1.0, 0.1, 1.03)]
    empty = dict.fromkeys(published_claims.Row.__dataclass_fields__, 0.0)
    machine = {"granularity": "channel", "device": "cpu", "dtype": "bfloat16", "threads": 2}
    rows = [
        empty | machine | {"base": "bundled", "capacity": c, "exit_rate": e, "decode_dense": s} for c, e, s in known
    ]
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
    with pytest.raises(HatError, match="channel and poems: run `hat reproduce quality`"):
        points(quality_table(), text="poems")


def test_a_point_of_the_frontier_is_told_with_its_speed(frontier):
    assert [v for _, v in frontier.capacity.options] == [0.4, 0.62, 0.8, 1.0]
    assert [v for _, v in frontier.exit_rate.options] == [0.0, 0.1]
    frontier.capacity.value = 0.4
    assert said(frontier) == (
        "ready",
        "capacity 0.40 requested, 0.403 realised; exit rate 0.00 requested, 0.001 realised; model share 0.520\n"
        "perplexity 38.00, base 20.00 (a 4-bit file, dequantised): +90.0% (+88.0% to +92.0%)\n"
        "decode: predicted speedup 1.50x over our own dense path (cpu, bfloat16, 2 threads)\n"
        "executed by layer: least 40.0% (layer 0), most 40.0% (layer 0)",
    )
    for capacity, exit_rate, words in (
        (0.62, 0.0, "speedup 1.28x"),  # 0.22 of the way from 1.5 at 0.4 to 1.1 at 0.8
        (1.0, 0.0, "+0.0% (+0.0% to +0.0%)\ndecode: predicted speedup 1.00x"),
        (1.0, 0.1, "speedup 1.03x"),
        (0.62, 0.1, "no speed was measured"),
        (0.8, 0.1, "capacity 0.80 was not measured with exit rate 0.10; there are: 0.62, 1.00"),
    ):
        frontier.capacity.value, frontier.exit_rate.value = capacity, exit_rate
        assert said(frontier)[0] == "ready" and words in said(frontier)[1]


def test_the_picture_has_one_point_and_the_layers_of_the_setting(frontier):
    def pixels(capacity, exit_rate):
        frontier.capacity.value, frontier.exit_rate.value = capacity, exit_rate
        return imread(BytesIO(frontier.picture.value))

    low, high, nothing = pixels(0.4, 0.0), pixels(0.8, 0.0), pixels(0.8, 0.1)
    half = low.shape[1] // 2
    for part in (slice(None, half), slice(half, None)):  # the point on the left, the bars on the right
        assert not np.array_equal(low[:, part], high[:, part]) and not np.array_equal(nothing[:, part], high[:, part])
    assert np.array_equal(pixels(0.4, 0.0), low)  # nothing of the others is left over


def test_twin_shows_every_setting():
    fig = twin(quality_table(), layers_table())
    cost, work = fig.axes[:2]
    assert sorted(t.get_text() for t in cost.texts) == ["0.40", "0.62", "0.62", "0.80", "1.00", "1.00"]
    names = [t.get_text() for t in work.get_yticklabels()]
    assert names == ["0.40", "0.62", "0.80", "1.00", "0.62, exits 0.1", "1.00, exits 0.1"]
    assert np.array_equal(work.collections[0].get_array()[4], 0.62 * 0.9 ** np.arange(LAYERS))
    assert png(fig).startswith(b"\x89PNG")


def test_frontier_reads_the_saved_sweep(tmp_path):
    with pytest.raises(HatError, match=r"no .*quality.csv: make it with `hat reproduce quality`"):
        FrontierView.saved(tmp_path)
    quality_table().to_csv(tmp_path / "quality.csv", index=False)
    with pytest.raises(HatError, match=r"no .*layer_shares.csv: make it with `hat reproduce layer_shares`"):
        FrontierView.saved(tmp_path)
    layers_table().to_csv(tmp_path / "layer_shares.csv", index=False)
    assert "no speed was measured" in said(FrontierView.saved(tmp_path))[1]
    promise_table().to_csv(tmp_path / "published_claims.csv", index=False)
    assert "predicted speedup" in said(FrontierView.saved(tmp_path))[1]
    with pytest.raises(HatError, match="token and addresses"):
        FrontierView.saved(tmp_path, granularity="token", text="addresses")


def test_the_committed_results_are_under_the_sliders():
    view = FrontierView.saved()
    for capacity in (v for _, v in view.capacity.options):
        for rate in (v for _, v in view.exit_rate.options):
            view.capacity.value, view.exit_rate.value = capacity, rate
            assert said(view)[0] == "ready"


@pytest.fixture(scope="module")
def hat():
    return adaptive("channel")


# --- generation ---


@pytest.fixture
def generate(hat):
    hat.capacity, hat.exit_rate = 0.6, 0.0
    return GenerateView(AdaptiveInference(hat), "one two three", max_new_tokens=6)


def test_nothing_runs_before_it_is_asked_for(generate):
    assert said(generate) == ("ready", "press Generate, or move a slider")
    assert generate.adaptive.value == generate.dense.value == ""
    sliders = (generate.capacity, generate.exit_rate, generate.prompt)
    assert not any(s.continuous_update for s in sliders) and all(s.description for s in (*sliders, generate.mode))


def test_text_stands_beside_the_dense_text_and_follows_the_controls(generate, hat):
    generate.button.click()
    state, text = said(generate)
    assert state == "ready" and re.search(r"adaptive: \d+\.\d tokens/s; dense: \d+\.\d tokens/s", text)
    assert "capacity 0.60 requested" in text and "exit rate 0.00 requested, 0.000 realised" in text
    assert "share of the dense model's" in text_of(generate.adaptive)
    expected = AdaptiveInference(hat).generate("one two three", capacity=1.0, exit_rate=0.0, max_new_tokens=6)
    assert text_of(generate.dense).startswith("dense\n") and len(text_of(generate.dense)) >= len(expected.texts[0])
    generate.capacity.value = 1.0
    assert "the first 6 of 6 tokens are the dense model's" in said(generate)[1]
    generate.capacity.value, generate.exit_rate.value = 0.45, 0.5
    assert "capacity 0.45 requested" in said(generate)[1] and "exit rate 0.50 requested" in said(generate)[1]
    assert (hat.capacity, hat.exit_rate) == (0.6, 0.0)  # the model is left alone
    generate.mode.value, generate.capacity.value, generate.exit_rate.value = "lossless", 0.3, 0.0
    state, text = said(generate)
    assert state == "ready" and "lossless: " in text and "of the drafts accepted" in text
    assert "the first 6 of 6 tokens are the dense model's" in text


def test_while_it_runs_the_view_is_busy_and_only_its_button_is_off(generate, monkeypatch):
    seen, run = [], generate._infer.generate

    def watched(*args, **kwargs):
        keep_their_keys = (generate.prompt, generate.capacity, generate.exit_rate, generate.mode)
        off = generate.button.disabled and not any(control.disabled for control in keep_their_keys)
        seen.append((said(generate), off, generate.adaptive.value))
        return run(*args, **kwargs)

    monkeypatch.setattr(generate._infer, "generate", watched)
    generate.button.click()
    assert seen == 4 * [(("busy", "⏳ generating …"), True, "")]  # both sides, and a few tokens to warm up
    assert not generate.button.disabled
    generate.button.click()
    assert len(seen) == 5  # the dense text of the same prompt is kept
    generate.prompt.value = "four five"
    assert len(seen) == 7


@pytest.mark.parametrize(
    ("prompt", "words"), [("   ", "a prompt must be text to continue"), ("x" * 3000, "exceed the context")]
)
def test_bad_input_is_told_in_place(generate, prompt, words):
    generate.button.click()
    generate.prompt.value = prompt
    state, text = said(generate)
    assert state == "error" and words in text and generate.adaptive.value == generate.dense.value == ""
    assert not generate.button.disabled
    generate.prompt.value = "one two"
    assert said(generate)[0] == "ready"


@pytest.mark.parametrize("error", [RuntimeError("out of <memory>"), KeyboardInterrupt()])
def test_no_exception_leaves_a_callback(generate, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(generate._infer, "generate", fail)
    generate.capacity.value = 0.5
    state, text = said(generate)
    assert state == "error" and text in ("⚠ RuntimeError: out of <memory>", "⚠ interrupted")
    assert not generate.button.disabled


def test_a_prompt_cannot_act_in_the_page(generate):
    generate.prompt.value = "<script>alert(1)</script>"
    assert "<script" not in generate.adaptive.value + generate.dense.value + generate.said.value


def test_the_twin_is_the_last_answer_beside_the_dense_text(generate):
    with pytest.raises(HatError, match="no answer to draw"):
        generate.twin()
    generate.button.click()
    for settings, grounds in (({}, True), ({"capacity": 1.0}, True), ({"mode": "lossless"}, False)):
        for name, value in settings.items():
            getattr(generate, name).value = value
        ax = generate.twin().axes[0]
        assert bool(ax.patches) == grounds
        assert [t.get_text() for t in ax.texts if t.get_weight() == "bold"] == [
            f"{generate.mode.value}, capacity {generate.capacity.value:.2f}, exit rate 0.00",
            "dense",
        ]
    generate.prompt.value = " "
    with pytest.raises(HatError, match="no answer to draw"):
        generate.twin()


# --- routing ---


@pytest.fixture(scope="module")
def routing(hat):
    prompts = {"first": "The quick brown fox jumps.", "second <b>": "One, two, three, four, five!"}
    with hat.at(0.6, 0.6):
        found = patterns(hat, prompt_blocks(hat.base.tokenizer, prompts), progress=False)
    return RoutingView(found), found


def titles(view):
    """Numbers that a reader sees when the pointer rests on a token."""
    return [float(v) for v in re.findall(r'title="([\d.]+)', view.shown.value)]


def test_a_text_and_a_layer_are_shown_with_their_shares(routing):
    view, found = routing
    docs = found.tokens["doc"]
    for doc in ("first", "second <b>"):
        for layer in (ALL, 1):
            view.text.value, view.layer.value = doc, layer
            rows = np.flatnonzero(docs == doc)
            values = found.tokens["share"].to_numpy()[rows] if layer == ALL else found.share[layer, rows]
            assert titles(view) == pytest.approx(values[~np.isnan(values)].tolist(), abs=6e-4)
            assert said(view)[0] == "ready" and said(view)[1].startswith("all layers" if layer == ALL else "layer 1")
    assert "<b>" not in view.shown.value


def test_tokens_that_had_left_are_counted_and_have_no_colour(routing):
    view, found = routing
    view.text.value, view.layer.value = "first", len(found.share) - 1
    rows = found.tokens[found.tokens["doc"] == "first"]
    gone = int((rows["exit_layer"] < len(found.share)).sum())
    assert gone and f"{gone} of {len(rows)} tokens had left before it" in said(view)[1]
    assert len(titles(view)) == len(rows) - gone


@pytest.mark.parametrize(
    ("prompt", "capacity", "words"),
    [("One, two, three.", 1.0, "mean executed share 100.0%"), ("ab", 0.6, "no token to route")],
)
def test_a_text_in_which_nothing_differs_is_shown_too(hat, prompt, capacity, words):
    with hat.at(capacity, 0.0):
        view = RoutingView(patterns(hat, prompt_blocks(hat.base.tokenizer, {"it": prompt}), progress=False))
    assert said(view)[0] == "ready" and words in said(view)[1] and set(titles(view)) == {1.0}


# --- notebooks ---


def test_colab_is_told_to_load_the_widgets_and_other_places_are_not(routing, monkeypatch):
    view, _ = routing
    shown, enabled = [], []
    monkeypatch.setattr(widgets, "display", lambda bundle, raw: shown.append(bundle))
    show(view)
    assert enabled == []
    output = ModuleType("google.colab.output")
    output.enable_custom_widget_manager = lambda: enabled.append(len(shown))
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    monkeypatch.setattr(widgets, "in_colab", lambda: True)
    show(view)
    assert enabled == [1] and len(shown) == 2  # before the second view was displayed
    assert [bundle[WIDGET_VIEW]["model_id"] for bundle in shown] == [view.model_id] * 2
    assert shown[0]["text/plain"] == "RoutingView: run this cell to use it"


def test_views_are_made_of_stock_widgets(routing, frontier, generate):
    def pieces(widget: Widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from pieces(child)

    modules = {w._view_module for view in (routing[0], frontier, generate) for w in pieces(view)}
    assert modules == {"@jupyter-widgets/controls"}  # nothing that a page would have to fetch from elsewhere
