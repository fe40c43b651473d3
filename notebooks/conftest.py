"""How nbval sees the notebooks: offline, figures in a scratch folder, and nothing on stderr is a result.

`make test` compares every notebook's stored outputs with a fresh run of its default parameters. Progress
bars and warnings go to stderr, where they change with the machine and the version; errors still fail, since
nbval takes them from the kernel and not from that stream.
"""

import os
import tempfile

_scratch = tempfile.TemporaryDirectory(prefix="hat-figures-")


def pytest_configure(config):
    os.environ.update(HAT_RUN="1", HAT_FIGURES=_scratch.name)
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items):
    for notebook in {item.parent for item in items if hasattr(item.parent, "skip_compare")}:
        notebook.skip_compare += ("stderr",)
