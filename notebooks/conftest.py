"""How nbval sees the notebooks: offline, and nothing on stderr is a result.

`make test` compares every notebook's stored outputs with a fresh run of its default parameters, started as Jupyter
starts it. Progress bars and warnings go to stderr, where they change with the machine and the version; errors still
fail, since nbval takes them from the kernel and not from that stream. What is committed must be as it was afterwards.
"""

import hashlib
import os
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SUFFIXES = {".csv", ".json", ".jsonl", ".png", ".ipynb", ".safetensors"}


def committed():
    """Path -> hash of all that a notebook could draw or write over."""
    files = (path for folder in ("data", "figures", "notebooks") for path in (REPO / folder).rglob("*"))
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files if path.suffix in SUFFIXES}


BEFORE = committed()


def pytest_configure(config):
    os.environ.pop("HAT_FIGURES", None)
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items):
    for notebook in {item.parent for item in items if hasattr(item.parent, "skip_compare")}:
        notebook.skip_compare += ("stderr",)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):  # one process of several: the first one compares
        return
    after = committed()
    if changed := sorted(path for path in BEFORE | after if BEFORE.get(path) != after.get(path)):
        session.exitstatus = 1
        print("\nrunning the notebooks changed what is committed:", *changed, sep="\n  ")
