"""Shared fixtures. Tests run offline: only pip may fetch the pinned wheels, on first use."""

import os

# Read once, when transformers and datasets are imported, so they are set before anything else.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    for item in items:
        if "bundled" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.bundled)


@pytest.fixture(scope="session")
def tiny_base():
    """`random:tiny` in fp32 on the CPU. Shared by all tests: leave it as it was."""
    from hat_lib.backbone.base import load_base

    return load_base("random:tiny", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def bundled():
    """The bundled base in fp32 on the CPU. Shared by all tests: leave it as it was."""
    from hat_lib.backbone.base import load_base

    return load_base("bundled", dtype=torch.float32, device="cpu")


@pytest.fixture
def no_grad():
    """For modules of equalities: ``pytestmark = pytest.mark.usefixtures("no_grad")``."""
    with torch.no_grad():
        yield


@pytest.fixture
def run_hat(capsys):
    """Run a command in this process: ``(exit code, stdout, stderr)``."""
    from hat_lib.cli.app import app

    def run(*args):
        with pytest.raises(SystemExit) as stopped:
            app([str(a) for a in args], prog_name="hat")
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run
