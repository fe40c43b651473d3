"""Notebooks in a real browser: JupyterLab runs 07 and every slider answers to keys; then Notebook 7 and Voila.

Needs a Chromium on the path (on Debian and Ubuntu: apt install chromium). Pictures of what was seen are kept in
``$HAT_SCREENSHOTS``, by default a temporary folder of pytest's.
"""

import os
import re
import shutil
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from front_ends import jupyter, voila

from hat_lib.config import DATA, NOTEBOOKS
from hat_lib.plotting.frontier import points
from hat_lib.workbook.notebooks import errors

sync_api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[dev]"')
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.bundled,
    pytest.mark.timeout(1200),  # a notebook takes half a minute, and ten on a machine with other work
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path: apt install chromium"),
]

PATTERNS, SHORT = "07_routing_patterns.ipynb", "07_short.ipynb"
LAST = "no protected token left, and nothing in the base trains: True"  # what 07 prints in its last cell
KEPT = ("max_tokens", "patterns(hat", "widgets", LAST.partition(":")[0])
"""in the cells of the short one, which has all the views"""
BADGE, ICONS = "https://colab.research.google.com/assets/colab-badge.svg", "https://cdn.jsdelivr.net/npm/@fortawesome"
POINTS = points(pd.read_csv(DATA / "results" / "quality.csv")).set_index(["capacity", "exit_rate"])
CAPACITIES, EXIT_RATES = (sorted(POINTS.index.unique(name)) for name in POINTS.index.names)

RUN_ALL = """name => {
  const run = async app => {
    await app.restored;
    while (app.shell.currentWidget?.context?.path !== name) await new Promise(resolve => setTimeout(resolve, 100));
    const {content, context} = app.shell.currentWidget;
    await context.ready;
    await context.sessionContext.ready;
    await app.commands.execute('notebook:run-all-cells');
    return content.model.toJSON();
  };
  run(window.jupyterapp).then(notebook => { window.ran = notebook }, error => { window.ran = String(error) });
}"""
SHUT_DOWN = "window.jupyterapp?.shell.currentWidget?.context?.sessionContext.shutdown()"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with copies of the notebooks, without outputs: what a page then shows is what ran in it."""
    folder = tmp_path_factory.mktemp("jupyter")
    (folder / "notebooks").mkdir()
    nb = nbformat.read(NOTEBOOKS / PATTERNS, as_version=4)
    for cell in code_cells(nb):
        cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "\nmax_tokens = 1024"
    nbformat.write(nb, folder / "notebooks" / PATTERNS)
    nb.cells = [cell for cell in code_cells(nb) if any(part in cell.source for part in KEPT)]
    nbformat.write(nb, folder / "notebooks" / SHORT)
    return folder


@pytest.fixture(scope="module")
def address(home):
    """Of JupyterLab and Notebook 7, to be formatted with the place of a page."""
    with jupyter(home) as address:
        yield address


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = Path(os.environ.get("HAT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def new_page(pictures):
    """Opens pages that reach this machine alone: ``page.away`` is what else they asked for."""
    sync_api.expect.set_options(timeout=120_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-dev-shm-usage"])

        @contextmanager
        def new_page(name):
            context = browser.new_context(viewport={"width": 1280, "height": 1000})
            page = context.new_page()
            page.set_default_timeout(120_000)
            page.away = set()

            def refuse(route):
                page.away.add(route.request.url)
                route.abort()

            context.route(re.compile(r"https?://(?!127\.0\.0\.1[:/])"), refuse)
            try:
                yield page
            finally:
                page.screenshot(path=pictures / f"{name}.png")
                page.evaluate(SHUT_DOWN)
                context.close()

        yield new_page
        browser.close()


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def run_all(page, address, place, name):
    """Open a notebook in the front end at a place, and run all of its cells."""
    page.goto(address.format(f"{place}/{name}"))
    page.wait_for_function("window.jupyterapp")
    page.evaluate(RUN_ALL, name)
    ran = page.wait_for_function("window.ran", timeout=600_000).json_value()
    assert isinstance(ran, dict), ran
    nb = nbformat.from_dict(ran)
    assert list(errors(nb)) == []
    assert [cell.execution_count for cell in code_cells(nb)] == list(range(1, len(code_cells(nb)) + 1))


def view(page, slider):
    """The view, that is the outermost box, which has a slider of this name."""
    return page.locator(".widget-vbox").filter(has=page.locator(".widget-slider", has_text=slider))


def press(view, slider, key):
    """Move a slider by a key; its value afterwards."""
    moved = view.locator(".widget-slider", has_text=slider)
    moved.locator("[role=slider]").press(key)
    return moved.locator(".widget-readout").text_content()


def says(view, text):
    """Wait until a view says ``text``."""
    sync_api.expect(view.locator("[role=status]")).to_contain_text(text)
    sync_api.expect(view.locator("[role=status]")).to_have_attribute("data-state", "ready")


def says_point(view, capacity, exit_rate=0.0):
    """Wait until the frontier says what the sweep's file holds for a setting, or that it holds nothing."""
    if (capacity, exit_rate) not in POINTS.index:
        return says(view, f"capacity {capacity:.2f} was not measured with exit rate {exit_rate:.2f}")
    row = POINTS.loc[capacity, exit_rate]
    says(view, f"capacity {capacity:.2f} requested, {row['realised']:.3f} realised")
    says(view, f"exit rate {exit_rate:.2f} requested, {row['realised_exit']:.3f} realised")
    says(view, f"perplexity {row['ppl']:.2f}, base {row['base_ppl']:.2f}")


# --- JupyterLab ---


@pytest.fixture(scope="module")
def patterns(new_page, address):
    """JupyterLab's page of notebook 07, run from the first cell to the last."""
    with new_page("07_lab") as page:
        run_all(page, address, "lab/tree", PATTERNS)
        yield page
        assert page.away <= {BADGE}


def test_layers_move_by_keyboard(patterns):
    explorer = view(patterns, "Layer")
    means = {}
    for key, layer in (("Home", "all"), ("ArrowRight", "0"), ("ArrowRight", "1"), ("ArrowLeft", "0")):
        assert press(explorer, "Layer", key) == layer
        says(explorer, "all layers" if layer == "all" else f"layer {layer}:")
        spans = explorer.locator("p:has(strong) span")
        shares = [float(v) for span in spans.all() for v in span.get_attribute("title").split(", ")]
        mean = float(re.search(r"share ([\d.]+)%", explorer.locator("[role=status]").text_content())[1])
        assert mean == pytest.approx(100 * sum(shares[2:]) / len(shares[2:]), abs=0.1)  # the first two are protected
        assert means.setdefault(layer, mean) == mean
    assert len(set(means.values())) == 3


def test_the_frontier_moves_by_keyboard(patterns, pictures):
    frontier = view(patterns, "Exit rate").filter(has_not=patterns.locator("textarea"))
    says_point(frontier, CAPACITIES[-1])  # where the notebook leaves it
    seen = [frontier.locator("img").get_attribute("src")]

    def drawn_anew(name):
        sync_api.expect(frontier.locator("img")).not_to_have_attribute("src", seen[-1])
        seen.append(frontier.locator("img").get_attribute("src"))
        frontier.screenshot(path=pictures / f"{name}.png")

    assert press(frontier, "Capacity", "Home") == f"{CAPACITIES[0]:.2f}"
    says_point(frontier, CAPACITIES[0])
    drawn_anew("07_frontier_first")
    for capacity in CAPACITIES[1:-1]:
        assert press(frontier, "Capacity", "ArrowRight") == f"{capacity:.2f}"
        says_point(frontier, capacity)
    drawn_anew("07_frontier_last_but_one")
    exits = EXIT_RATES[1]
    assert press(frontier, "Exit rate", "ArrowRight") == f"{exits:.2f}"
    says_point(frontier, CAPACITIES[-2], exits)
    assert press(frontier, "Capacity", "ArrowRight") == "1.00"
    says_point(frontier, 1.0, exits)
    drawn_anew("07_frontier_exits")


def texts(live):
    """Title -> text of the two sides."""
    titles = live.locator("strong")
    return {t.text_content(): t.locator("xpath=..").text_content().removeprefix(t.text_content()) for t in titles.all()}


def grounds(live):
    """The colours behind the tokens, as they are painted."""
    spans = live.locator("p:has(strong) span")
    return spans.evaluate_all("spans => spans.map(span => getComputedStyle(span).backgroundColor)")


def test_live_text_is_coloured_and_follows_prompt_and_sliders(patterns, pictures):
    live = view(patterns, "Exit rate").filter(has=patterns.locator("textarea"))
    before = texts(live)["dense"]
    prompt = live.locator("textarea")
    prompt.press("Control+a")
    prompt.press_sequentially("Once upon a time, there was a king who")
    prompt.press("Tab")
    sync_api.expect(live).not_to_contain_text(before)
    says(live, "capacity 0.62 requested")
    assert list(texts(live)) == ["adaptive, capacity 0.62, exit rate 0.00", "dense"]
    assert len(grounds(live)) > 8 and len(set(grounds(live))) > 4 and "rgba(0, 0, 0, 0)" not in grounds(live)
    live.screenshot(path=pictures / "07_live_0.62.png")

    assert press(live, "Capacity", "End") == "1.00"
    says(live, "capacity 1.00 requested, 1.000 realised")
    says(live, "the first 12 of 12 tokens are the dense model's")
    found = texts(live)
    assert found["adaptive, capacity 1.00, exit rate 0.00"] == found["dense"] != before
    assert len(set(grounds(live))) == 1  # every token took the same work
    live.screenshot(path=pictures / "07_live_1.00.png")

    assert press(live, "Exit rate", "PageUp") == "0.05"
    says(live, "exit rate 0.05 requested")
    assert press(live, "Exit rate", "Home") == "0.00"
    says(live, "exit rate 0.00 requested")


ANSWERS = """view => {
  window.answers = [];
  new MutationObserver(() => {
    const status = view.querySelector("[role=status][data-state=ready]")?.textContent;
    if (status && status !== answers.at(-1)) answers.push(status);
  }).observe(view, {subtree: true, childList: true});
}"""


def test_a_key_held_down_while_it_generates_stays_with_the_slider_and_gives_few_answers(patterns):
    live = view(patterns, "Exit rate").filter(has=patterns.locator("textarea"))
    press(live, "Capacity", "End")
    says(live, "capacity 1.00 requested")
    live.evaluate(ANSWERS)
    press(live, "Capacity", "ArrowLeft")
    for _ in range(19):
        patterns.keyboard.press("ArrowLeft", delay=30)  # milliseconds, as a keyboard repeats
    says(live, "capacity 0.80 requested")
    slider = live.locator(".widget-slider", has_text="Capacity")
    sync_api.expect(slider.locator("[role=slider]")).to_be_focused()
    sync_api.expect(slider.locator(".widget-readout")).to_have_text("0.80")
    assert len(patterns.evaluate("answers")) <= 10


# --- other front ends ---


@pytest.mark.skipif(not find_spec("notebook"), reason='no Notebook 7: pip install -e ".[dev]"')
def test_notebook_7_runs_07_and_its_slider_moves_by_keyboard(new_page, address):
    with new_page("07_notebook7") as page:
        run_all(page, address, "notebooks", SHORT)
        assert page.evaluate("jupyterapp.name") == "Jupyter Notebook"
        frontier = view(page, "Exit rate").filter(has_not=page.locator("textarea"))
        # Arrows belong to the notebook there: it takes them before a widget sees them.
        for key, capacity in (("Home", CAPACITIES[0]), ("PageUp", CAPACITIES[5]), ("End", CAPACITIES[-1])):
            assert press(frontier, "Capacity", key) == f"{capacity:.2f}"
            says_point(frontier, capacity)
        assert page.away <= {BADGE}


@pytest.mark.skipif(not find_spec("voila"), reason='no Voila: pip install -e ".[dev]"')
def test_voila_serves_07_without_code_and_its_slider_moves(new_page, home):
    with new_page("07_voila") as page, voila(home, SHORT) as address:
        page.goto(address, wait_until="commit")
        page.get_by_text(LAST).wait_for(state="attached", timeout=600_000)
        frontier = view(page, "Exit rate").filter(has_not=page.locator("textarea"))
        says_point(frontier, CAPACITIES[-1])
        assert page.locator("[role=slider]").count() == 5
        text = page.locator("body").text_content()
        assert "Traceback" not in text and "import torch" not in text
        assert press(frontier, "Capacity", "ArrowLeft") == f"{CAPACITIES[-2]:.2f}"
        says_point(frontier, CAPACITIES[-2])
        assert all(asked == BADGE or asked.startswith(ICONS) for asked in page.away)
