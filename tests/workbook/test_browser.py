"""Views in a real browser: JupyterLab runs those of 07, and each responds to pointer and keys.

Needs a Chromium on the path (on Debian and Ubuntu: apt install chromium). Screenshots are kept in
``$HAT_SCREENSHOTS``, by default one of pytest's temporary folders.
"""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from front_ends import jupyter

from hat_lib.config import NOTEBOOKS
from hat_lib.workbook.notebooks import errors
from hat_lib.workbook.widgets import FrontierView

sync_api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[dev]"')
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.bundled,
    pytest.mark.timeout(1200),  # a notebook takes half a minute, or ten on a busy machine
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path: apt install chromium"),
]

PATTERNS, VIEWS = "07_routing_patterns.ipynb", "07_views.ipynb"
KEPT = ("profile: str", "begin(", "from_pretrained", "prompts = ", "infer, prompt", "widgets")
"""in the cells of a notebook that has the views and little else; whole notebooks are run elsewhere"""

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
    """A folder with a notebook of the views, without outputs, so that a page only shows what ran in it."""
    folder = tmp_path_factory.mktemp("jupyter")
    (folder / "notebooks").mkdir()
    nb = nbformat.read(NOTEBOOKS / PATTERNS, as_version=4)
    nb.cells = [cell for cell in code_cells(nb) if any(part in cell.source for part in KEPT)]
    for cell in nb.cells:
        cell.outputs, cell.execution_count = [], None
    nb.cells[0].source += "\nnew_tokens = 12"
    nbformat.write(nb, folder / "notebooks" / VIEWS)
    return folder


@pytest.fixture(scope="module")
def address(home):
    """The address of JupyterLab, to be formatted with a page's path."""
    with jupyter(home) as address:
        yield address


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = Path(os.environ.get("HAT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def new_page(pictures):
    """Opens pages that can only reach this machine; ``page.away`` lists what else they requested."""
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
    """Open a notebook in the front end at ``place``, and run all of its cells."""
    page.goto(address.format(f"{place}/{name}"))
    page.wait_for_function("window.jupyterapp")
    page.evaluate(RUN_ALL, name)
    ran = page.wait_for_function("window.ran", timeout=600_000).json_value()
    assert isinstance(ran, dict), ran
    nb = nbformat.from_dict(ran)
    assert list(errors(nb)) == []
    assert [cell.execution_count for cell in code_cells(nb)] == list(range(1, len(code_cells(nb)) + 1))


def view(page, part):
    """The view (the outermost box) that contains a part: the map of tokens, the frontier or live text."""
    parts = {"map": page.locator(".hat-map"), "frontier": page.locator("img"), "live": page.locator("button")}
    return page.locator(".widget-vbox").filter(has=parts[part])


def press(view, slider, key):
    """Move a slider with a key; returns its value afterwards."""
    moved = view.locator(".widget-slider", has_text=slider)
    moved.locator("[role=slider]").press(key)
    return moved.locator(".widget-readout").text_content()


def says(view, text):
    """Wait until a view says ``text``."""
    sync_api.expect(view.locator("[role=status]")).to_contain_text(text)
    sync_api.expect(view.locator("[role=status]")).to_have_attribute("data-state", "ready")


def picked(tokens, token, layer):
    """Wait until everything about a token and a layer is shown beside the map."""
    panel = tokens.locator(".hat-map-panel")
    sync_api.expect(panel.locator("h4")).to_contain_text(f"token {token}: ")
    sync_api.expect(panel.locator("th").nth(3)).to_have_text(f"layer {layer}")
    sync_api.expect(tokens.locator("[aria-selected=true]")).to_have_attribute(
        "aria-label", re.compile(f"^token {token}:")
    )


def walk_on_the_map(page, picture):
    """Point, click and press keys, including those that a front end might take for itself."""
    tokens = view(page, "map")
    says(tokens, "capacity 0.62 requested")
    picked(tokens, 8, 5)  # as the notebook leaves it
    tip, rows = tokens.locator(".hat-map-tip"), tokens.locator("[role=option]")
    assert not tip.is_visible()
    rows.nth(3).locator("i").nth(12).hover()
    sync_api.expect(tip).to_contain_text(re.compile(r"^token 3: .*\nlayer 12: [\d.]+% executed$"))
    tokens.screenshot(path=picture)
    shown = tip.text_content()
    rows.nth(3).locator("i").nth(12).click()
    picked(tokens, 3, 12)
    panel = tokens.locator(".hat-map-panel")
    assert shown.splitlines()[0] == panel.locator("h4").text_content()
    assert panel.locator("tbody tr").count() == 4 + 5  # matrices; next tokens of base and adaptive model
    sync_api.expect(panel).to_contain_text(re.compile(r"entropy of what comes next: [\d.]+ nats"))
    for key, token, layer in (
        ("ArrowDown", 4, 12), ("ArrowRight", 4, 13), ("ArrowUp", 3, 13), ("PageUp", 3, 12), ("Home", 0, 12),
    ):  # fmt: skip
        tokens.locator("[role=listbox]").press(key)
        picked(tokens, token, layer)
    sync_api.expect(panel).to_contain_text("protected: it runs in full")


# --- JupyterLab ---


@pytest.fixture(scope="module")
def lab(new_page, address):
    """JupyterLab's page with the views, run from the first cell to the last."""
    with new_page("07_lab") as page:
        run_all(page, address, "lab/tree", VIEWS)
        yield page
        assert page.away == set()


THEME = "name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: `JupyterLab ${name}`})"


def test_the_map_of_tokens_answers_to_pointer_and_keys_in_light_and_dark(lab, pictures):
    walk_on_the_map(lab, pictures / "07_map.png")
    lab.evaluate(THEME, "Dark")
    lab.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    view(lab, "map").screenshot(path=pictures / "07_map_dark.png")
    view(lab, "live").screenshot(path=pictures / "07_live_dark.png")
    lab.evaluate(THEME, "Light")


def test_the_map_follows_its_controls(lab, pictures):
    tokens = view(lab, "map")
    tokens.locator("select").select_option("program")
    sync_api.expect(tokens.locator("[role=option]").first).to_have_attribute(
        "aria-label", re.compile("^token 0: “def”")
    )
    assert press(tokens, "Exit rate", "End") == "1.00"
    says(tokens, "exit rate 1.00 requested")
    left = tokens.locator(".hat-map-tokens .hat-map-left")
    assert left.count() > 20
    left.last.hover()
    sync_api.expect(tokens.locator(".hat-map-tip")).to_contain_text("had left")
    tokens.screenshot(path=pictures / "07_map_exits.png")


def test_the_frontier_moves_by_keyboard_over_what_was_measured(lab, pictures):
    frontier, twin = view(lab, "frontier"), FrontierView.saved()
    says(frontier, twin.words.splitlines()[0])
    sources = [frontier.locator("img").get_attribute("src")]
    for label, setting in twin.setting.options[1:]:
        twin.setting.value = setting
        assert press(frontier, "Capacity", "ArrowRight") == label
        for line in twin.words.splitlines():  # the page says what the same view says here
            says(frontier, line)
        sync_api.expect(frontier.locator("img")).not_to_have_attribute("src", sources[-1])
        sources.append(frontier.locator("img").get_attribute("src"))
    frontier.screenshot(path=pictures / "07_frontier.png")


def texts(live):
    """Title -> text, for each side."""
    titles = live.locator("p > strong")
    return {t.text_content(): t.locator("xpath=..").text_content().removeprefix(t.text_content()) for t in titles.all()}


def grounds(live):
    """The background colours of the tokens, as painted."""
    spans = live.locator("p:has(strong) span")
    return spans.evaluate_all("spans => spans.map(span => getComputedStyle(span).backgroundColor)")


STEPS = """view => {
  window.steps = [];
  new MutationObserver(() => {
    const now = [...view.querySelectorAll("p:has(strong)")].map(side => side.textContent).join("|");
    if (now !== steps.at(-1)) steps.push(now);
  }).observe(view, {subtree: true, childList: true, characterData: true});
}"""


def test_live_text_streams_beside_the_dense_one_and_follows_prompt_and_capacities(lab, pictures):
    live = view(lab, "live")
    says(live, "tokens/s: median")
    names = ["dense", "capacity 0.90", "capacity 0.70", "capacity 0.55"]
    before = texts(live)
    assert list(before) == names and len(set(grounds(live))) > 4
    live.screenshot(path=pictures / "07_live.png")
    live.evaluate(STEPS)
    capacities, prompt = live.locator("input[type=text]"), live.locator("textarea")
    prompt.press("Control+a")
    prompt.press_sequentially("Once upon a time, there was a king who")
    prompt.press("Tab")
    sync_api.expect(live).not_to_contain_text(before["dense"])
    says(live, "tokens/s: median")
    steps = lab.evaluate("steps")
    assert len(steps) > 20 and all("dense" in step and "capacity 0.55" in step for step in steps)  # never empty
    capacities.fill("1")
    capacities.press("Enter")
    sync_api.expect(live.locator("p > strong").last).to_have_text("capacity 1.00")
    says(live, "tokens/s: median")
    sync_api.expect(live).to_contain_text("nowhere in 12 tokens")
    found = texts(live)
    assert list(found) == ["dense", "capacity 1.00"] and found["dense"] == found["capacity 1.00"]
    assert len(set(grounds(live))) == 1  # every token took the same work


ANSWERS = """view => {
  window.answers = [];
  new MutationObserver(() => {
    const title = [...view.querySelectorAll("p > strong")].at(-1)?.textContent;
    if (title !== answers.at(-1)) answers.push(title);
  }).observe(view, {subtree: true, childList: true});
}"""


def test_a_key_held_down_while_it_generates_stays_with_the_slider_and_gives_few_answers(lab):
    live = view(lab, "live")
    live.evaluate(ANSWERS)
    press(live, "Exit rate", "ArrowRight")
    for _ in range(19):
        lab.keyboard.press("ArrowRight", delay=30)  # milliseconds, as a keyboard repeats
    sync_api.expect(live.locator("p > strong").last).to_have_text("capacity 1.00, exits 0.20")
    says(live, "tokens/s: median")
    slider = live.locator(".widget-slider", has_text="Exit rate")
    sync_api.expect(slider.locator("[role=slider]")).to_be_focused()
    sync_api.expect(slider.locator(".widget-readout")).to_have_text("0.20")
    assert len(lab.evaluate("answers")) <= 10


# --- other front ends ---
