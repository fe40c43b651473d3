"""The site: `make book` runs Sphinx on the repository itself, so that links between its files are those of GitHub.

Notebooks are shown as they were executed. What is no page of the site, such as source and data, is linked on GitHub.
"""

import html
import json
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
GITHUB = "https://github.com/hat-workbook/hat-workbook"
sys.path.insert(0, str(ROOT))
logger = logging.getLogger(__name__)

project, author = "HAT workbook", "The HAT workbook authors"
extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "data/README.md", "docs/**.md",
                    "notebooks/*.ipynb"]  # fmt: skip

html_theme, html_title = "sphinx_book_theme", project
html_theme_options = {
    "repository_url": GITHUB,
    "use_repository_button": True,
    "use_download_button": False,
    "navbar_persistent": [],  # the search field is in the sidebar
}
html_static_path, html_css_files = ["static"], ["book.css"]
html_extra_path = ["explore.html"]

nb_execution_mode = "off"
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]  # a verdict of a notebook, for programs; it stands there as text, too
myst_heading_anchors = 4

default_role = "py:obj"
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100
autodoc_member_order, autodoc_preserve_defaults = "bysource", True
autodoc_default_options = {"members": True, "special-members": "__call__", "show-inheritance": True}

PACKAGES = re.findall(r"\]\((\w+)\.md\)", (ROOT / "docs/api/index.md").read_text(encoding="utf-8"))
# What the sidebar lists, written below the page that it hangs from.
CONTENTS = {
    "README": """
```{toctree}
:hidden:
:caption: Notebooks
:glob:

notebooks/*
```
```{toctree}
:hidden:
:caption: Documentation

docs/using
docs/measurements
docs/architecture
docs/training
docs/scale-out
data/README
docs/experiments/README
```
```{toctree}
:hidden:
:caption: Reference

docs/api/index
CONTRIBUTING
SECURITY
CHANGELOG
```
""",
    "docs/api/index": "\n".join(["", "```{toctree}", ":hidden:", "", *PACKAGES, "```", ""]),
    "docs/experiments/README": """
```{toctree}
:hidden:
:glob:

*
```
""",
}
SCREEN = """<iframe src="{}explore.html" title="One screen: a sentence and a dial" loading="lazy"
  style="width: 100%; height: 56rem; border: 0"></iframe>"""
WIDGET = "application/vnd.jupyter.widget-view+json"
BADGE = re.compile(r"!\[([^\]]*)\]\(https:[^)]*\)")  # its words instead: the site shows nothing from elsewhere
TO_SCREEN = re.compile(r"\[([^\]]*)\]\([^()\s]*explore\.html\)")
LINK = re.compile(r"(\]\()([^()\s#]*)(#[^()\s]*)?(?=\))")
MODULE = re.compile(r"^- `(hat_lib\.\S+)`$", re.MULTILINE)


def mend(app, name: str, source: list[str]) -> None:
    """Before a page is read: its links and, where they belong, the screen, what the sidebar lists and docstrings."""

    def link(found: re.Match) -> str:
        path, anchor = (ROOT / name).parent.joinpath(found[2]).resolve(), found[3] or ""
        if path.suffix == ".ipynb" or (not found[2] and in_notebook):
            anchor = anchor.lower()  # Jupyter's anchors have capitals, the site's have none
        if not found[2] or ":" in found[2] or path.suffix in (".md", ".ipynb", ".png") or not path.exists():
            return found[1] + found[2] + anchor  # a page, an address or, with a warning, nothing
        return f"{found[1]}{GITHUB}/{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(ROOT).as_posix()}"

    def mended(text: str) -> str:
        text = BADGE.sub(r"\1", text)
        return LINK.sub(link, TO_SCREEN.sub(rf'<a href="{up}explore.html">\1</a>', text))

    up, in_notebook = "../" * name.count("/"), name.startswith("notebooks/")
    if in_notebook:
        notebook = json.loads(source[0])
        notebook["metadata"].pop("widgets", None)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = mended("".join(cell["source"]))
            for output in cell.get("outputs", ()):
                if WIDGET in output.get("data", ()):
                    output["data"] = {"text/html": SCREEN.format(up)}
        source[0] = json.dumps(notebook)
        return
    text = re.sub(r"!\[[^\]]*\]\(figures/play.gif\)", SCREEN.format(up), source[0])
    text = MODULE.sub(r"## \1\n\n```{eval-rst}\n.. automodule:: \1\n```\n", text)
    source[0] = mended(text) + CONTENTS.get(name, "")


def tidy(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """A docstring's arguments as a list; nothing for the fields of a named tuple, which have none of their own."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    if "Args:" in lines:
        start = lines.index("Args:") + 1
        end = lines.index("", start)
        found = [re.sub(r"^    (\S[^:]*):", r"- ``\1``:", line) for line in lines[start:end]]
        lines[start:end] = ["", *(line if line.startswith("-") else "  " + line.lstrip() for line in found)]


def short(app, what: str, name: str, obj, options, signature: str | None, returned: str | None) -> tuple:
    """Types by their last names, which Sphinx leaves out where a default is no expression."""
    return signature and re.sub(r"~[\w.]+\.", "", signature.replace("<factory>", "...")), returned


def named(app, env, node, content):
    """What a docstring names without its module, if nothing else ends in that name."""
    domain, name = env.get_domain("py"), node.get("reftarget", "")
    found = [known for known in domain.objects if known.endswith(f".{name}")] if node.get("refdomain") == "py" else []
    if len(found) == 1:
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


def finish(app, error) -> None:
    """The site begins at index.html, and every link in it leads somewhere."""
    if error or app.builder.name != "html":
        return
    out = Path(app.outdir)
    shutil.copy(out / f"{root_doc}.html", out / "index.html")
    pages = {path: path.read_text(encoding="utf-8") for path in out.rglob("*.html") if "_static" not in path.parts}
    ids = {path: set(re.findall(r'\sid="([^"]+)"', text)) for path, text in pages.items()}
    for page, text in pages.items():
        for address in set(re.findall(r'\s(?:href|src)="([^"]+)"', text)):
            scheme, _, path, _, anchor = urlsplit(unquote(html.unescape(address)))
            target = page.parent.joinpath(path).resolve() if path else page
            known = target.exists() and (not anchor or target not in ids or anchor in ids[target])
            if not scheme and not known:
                logger.warning("%s: broken link to %s", page.relative_to(out), address)


def setup(app) -> None:
    app.connect("source-read", mend)
    app.connect("autodoc-process-docstring", tidy)
    app.connect("autodoc-process-signature", short)
    app.connect("missing-reference", named)
    app.connect("build-finished", finish)
