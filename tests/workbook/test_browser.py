"""The views of notebook 07 in a real browser: JupyterLab runs their cells, sliders move, and nothing fails.

Needs a Chromium on the path (on Debian and Ubuntu: apt install chromium).
"""

import json
import os
import re
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

from hat_lib.config import NOTEBOOKS

sync_api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[dev]"')
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CELLS = ("profile: str", "begin(", "from_pretrained", "prompts = ", "TokenMapView", "FrontierView")
"""in the cells that are run; whole notebooks are run elsewhere"""
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
    """Address of a JupyterLab, apart from the user's settings and kernels, that serves the cells of the views."""
    nb = nbformat.read(NOTEBOOKS / "07_routing_patterns.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if c.cell_type == "code" and any(part in c.source for part in CELLS)]
    for cell in nb.cells:
        cell.outputs, cell.execution_count = [], None
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nb, tmp_path / "notebooks" / "views.ipynb")
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


def press(view, slider, key):
    """Move a slider with a key; returns its value afterwards."""
    moved = view.locator(".widget-slider", has_text=slider)
    moved.locator("[role=slider]").press(key)
    return moved.locator(".widget-readout").text_content()


@pytest.mark.slow
@pytest.mark.bundled
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path: apt install chromium")
def test_views_answer_to_their_sliders(lab, page):
    away = []
    page.on("request", lambda request: None if "127.0.0.1" in request.url else away.append(request.url))
    page.goto(lab.format("lab/tree/views.ipynb"))
    page.wait_for_function("window.jupyterapp")
    ran = page.evaluate(RUN_ALL, "views.ipynb")
    outputs = [output for cell in ran["cells"] for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]

    frontier = page.locator(".widget-vbox").filter(has=page.locator("img"))
    picture = frontier.locator("img").get_attribute("src")
    press(frontier, "Capacity", "ArrowRight")
    sync_api.expect(frontier.locator("img")).not_to_have_attribute("src", picture)

    tokens = page.locator(".widget-vbox").filter(has=page.locator(".hat-map"))
    status = tokens.locator("[role=status]")
    sync_api.expect(status).to_contain_text("capacity 0.62 requested")
    tokens.locator("[role=option]").nth(3).locator("i").nth(12).click()
    sync_api.expect(tokens.locator(".hat-map-panel h4")).to_contain_text("token 3: ")
    tokens.locator("[role=listbox]").press("ArrowDown")
    sync_api.expect(tokens.locator("[aria-selected=true]")).to_have_attribute("aria-label", re.compile("^token 4:"))
    assert press(tokens, "Exit rate", "End") == "1.00"
    sync_api.expect(status).to_contain_text("exit rate 1.00 requested")
    sync_api.expect(status).to_have_attribute("data-state", "ready")
    assert away == []
