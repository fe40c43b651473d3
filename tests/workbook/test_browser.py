"""The screen in a real browser: on the committed page, and in JupyterLab, which runs the cells of notebook 07.

Needs a Chromium on the path (on Debian and Ubuntu: apt install chromium).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from nbformat.sign import NotebookNotary

from hat_lib.config import NOTEBOOKS, REPO

sync_api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[dev]"')
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CELLS = ("profile: str", "begin(", "from_pretrained", "PlayView")
"""in the cells that are run; whole notebooks are run elsewhere"""
ROWS = ".hat-map [role=option]"
RUN_ALL = """async name => {
  const app = window.jupyterapp;
  await app.restored;
  while (app.shell.currentWidget?.context?.path !== name) await new Promise(resolve => setTimeout(resolve, 100));
  const {content, context} = app.shell.currentWidget;
  await context.ready;
  await context.sessionContext.ready;
  await app.commands.execute('notebook:run-all-cells');
  return content.model.toJSON();
}"""


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab, apart from the user's settings and kernels, that serves the screen's cells, trusted."""
    nb = nbformat.read(NOTEBOOKS / "07_routing_patterns.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if c.cell_type == "code" and any(part in c.source for part in CELLS)]
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("# A section that the arrow keys of a notebook would collapse"))
    for folder in ("notebooks", "data"):
        (tmp_path / folder).mkdir()
    nbformat.write(nb, tmp_path / "notebooks" / "screen.ipynb")
    NotebookNotary(data_dir=str(tmp_path / "data")).sign(nb)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "JPY_", "IPYTHON"))}
    env |= {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env |= {"IPYTHONDIR": str(tmp_path / "ipython"), "HAT_FIGURES": str(tmp_path / "figures")}
    news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}  # a request to another host
    (tmp_path / "config" / "labconfig").mkdir(parents=True)
    (tmp_path / "config" / "labconfig" / "page_config.json").write_text(json.dumps(news))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--port-retries=0"]
    command += ["--IdentityProvider.token=secret", "--expose-app-in-browser"]
    command += [f"--ServerApp.root_dir={tmp_path}/notebooks"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/{{}}?token=secret"
    try:
        deadline, answers = time.monotonic() + 60, False
        while not answers:
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
            with suppress(URLError):
                urlopen(address.format("api/status")).close()
                answers = True
        yield address
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture
def page():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)
        sync_api.expect.set_options(timeout=60_000)
        yield page
        browser.close()


def pixels(page):
    """What the map's canvas shows."""
    return page.locator(".hat-map canvas").evaluate("canvas => canvas.toDataURL()")


@pytest.fixture
def requests(page):
    """Addresses that the page asks for, outside this machine."""
    away = []
    here = ("file:", "data:", "http://127.0.0.1", "blob:http://127.0.0.1")
    page.on("request", lambda r: None if r.url.startswith(here) else away.append(r.url))
    return away


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path: apt install chromium")
def test_every_control_of_the_page(page, requests):
    failed = []
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto((REPO / "docs" / "explore.html").as_uri())
    slider, rows, show = page.get_by_role("slider"), page.locator(ROWS), sync_api.expect
    show(rows).to_have_count(17)
    seen = {pixels(page)}
    for key, capacity in (("Home", "0.40"), ("ArrowRight", "0.45"), ("End", "1.00")):
        slider.press(key)
        show(page.locator(".hat-number")).to_have_text(capacity)
        seen.add(pixels(page))
        show(page.locator(".hat-differs")).to_have_count(0 if capacity == "1.00" else 1)
    assert len(seen) == 4
    moves = "s => { const began = performance.now(); for (let i = 0; i < 9; i++) {s.value = i; "
    moves += "s.dispatchEvent(new Event('input'))} return (performance.now() - began) / 9 }"
    assert slider.evaluate(moves) < 50
    slider.press("Home")
    page.get_by_role("checkbox").check()
    assert pixels(page) not in seen

    rows.nth(3).click()
    show(page.locator(".hat-panel h4")).to_contain_text(["keeper"])
    rows.nth(9).hover()
    show(page.locator(".hat-panel")).to_have_count(2)  # one beside the other
    page.get_by_role("listbox").press("ArrowDown")
    show(page.locator(".hat-panel h4")).to_contain_text(["walked"])
    show(rows.nth(4)).to_have_attribute("aria-selected", "true")

    page.locator(".hat-frontier").scroll_into_view_if_needed()
    box = page.locator(".hat-frontier").bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.7 * box["height"], steps=5)
    page.mouse.up()
    assert len(page.locator(".hat-guess").get_attribute("points").split()) > 1
    page.get_by_text("Show what was measured").click()
    show(page.locator(".hat-price")).to_contain_text("You were off by")
    for preset in (1, 2, 0):
        page.get_by_role("combobox").select_option(str(preset))
        show(page.locator(".hat-token").first).to_be_visible()
    for width in (600, 900, 1600):
        page.set_viewport_size({"width": width, "height": 1000})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), width
    assert failed == requests == []


@pytest.mark.slow
@pytest.mark.bundled
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path: apt install chromium")
def test_a_notebook_keeps_the_screen_and_a_kernel_answers_it(lab, page, requests):
    page.goto(lab.format("lab/tree/screen.ipynb"))
    page.wait_for_function("window.jupyterapp")
    view, show = page.locator(".hat-play"), sync_api.expect
    show(view.locator(ROWS)).to_have_count(17)  # nothing has run
    stored = pixels(page)
    for key, capacity in (("ArrowLeft", "0.55"), ("ArrowDown", "0.50"), ("ArrowRight", "0.55"), ("Home", "0.40")):
        view.get_by_role("slider").press(key)
        show(view.locator(".hat-number")).to_have_text(capacity)
    assert pixels(page) != stored
    show(view.locator(".hat-differs")).to_have_count(1)
    view.locator(".hat-word").first.click()
    show(view.locator(".hat-status")).to_contain_text("kernel")

    ran = page.evaluate(RUN_ALL, "screen.ipynb")
    outputs = [output for cell in ran["cells"][1:] for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    show(view.locator(".hat-number")).to_have_text("0.62")  # drawn anew
    view.get_by_role("slider").press("Home")
    show(view.locator(".hat-number")).to_have_text("0.40")
    prompt = view.get_by_role("textbox")
    prompt.fill("The sea is blue, and")
    prompt.press("Enter")
    show(view.locator(ROWS)).to_have_count(6)
    show(view.locator(".hat-token").first).to_be_visible()
    view.locator(".hat-word").first.click()
    show(view.locator(ROWS)).to_have_count(7)  # all up to the pinned token, the last, and the word that was chosen
    prompt.fill(" ")
    prompt.press("Enter")
    show(view.locator(".hat-status")).to_have_attribute("data-state", "error")
    assert requests == []
