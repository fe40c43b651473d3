"""The page of three prompts, ``docs/explore.html``, and a moving picture of it: ``python -m studies.make_page``.

Needs playwright and a Chromium on the path, as the browser tests do.
"""

import io
import shutil

from PIL import Image

from hat_lib.config import REPO
from hat_lib.hat import HierarchicalTransformer
from hat_lib.workbook.play_page import html
from hat_lib.workbook.screen import CAPACITIES, PRESETS, Screen

PAGE, PICTURE = REPO / "docs" / "explore.html", REPO / "figures" / "play.gif"
SIZE, HOLD, STEP = {"width": 1000, "height": 860}, 1800, 700  # pixels; milliseconds at either end, and at each step


def moving_picture() -> None:
    """The dial moved down, from 1.0 to the lowest capacity."""
    from playwright.sync_api import sync_playwright

    frames = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport=SIZE)
        page.goto(PAGE.as_uri())
        page.locator(".hat-map [role=option]").nth(7).click()
        for step in range(len(CAPACITIES)):
            page.get_by_role("slider").fill(str(len(CAPACITIES) - 1 - step))
            frames.append(Image.open(io.BytesIO(page.screenshot())).convert("P", palette=Image.ADAPTIVE, colors=64))
        browser.close()
    times = [HOLD, *[STEP] * (len(frames) - 2), HOLD]
    frames[0].save(PICTURE, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)


if __name__ == "__main__":
    screen = Screen(HierarchicalTransformer.from_pretrained("default", dtype="fp32"))  # as `hat play`
    PAGE.write_text(html(PRESETS, screen), encoding="utf-8")
    moving_picture()
    print(*(f"{path.relative_to(REPO)}: {path.stat().st_size / 1e6:.2f} MB" for path in (PAGE, PICTURE)), sep="\n")
