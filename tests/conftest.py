"""Shared fixtures. Tests run offline: only pip, a separate process, may fetch the pinned wheels, on first use."""

import ipaddress
import os
import socket
from functools import partial

# Read once, when transformers and datasets are imported, so these are set before anything else.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    for item in items:
        if "bundled" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.bundled)


@pytest.fixture(scope="session", autouse=True)
def outside():
    """Sockets of this process only reach this machine. Attempts to go beyond it, ``(host, test)``, fail the run."""
    tried = []

    def check(host):
        try:
            address = ipaddress.ip_address(host)
            inside = address.is_loopback or address.is_unspecified
        except ValueError:  # a name, or nothing
            inside = host in (None, "", "localhost", socket.gethostname())
        if not inside:
            tried.append((host, os.environ.get("PYTEST_CURRENT_TEST")))
            raise ConnectionRefusedError(f"tests are offline, and {host} is not this machine")

    def guarded(call):
        def guard(self, *args):
            silent = self.type == socket.SOCK_DGRAM and call.__name__ != "sendto"  # sends no packet
            if self.family in (socket.AF_INET, socket.AF_INET6) and not silent:
                check(args[-1][0])
            return call(self, *args)

        return guard

    def resolve(host, *args, call=socket.getaddrinfo, **kwargs):
        check(host.decode() if isinstance(host, bytes) else host)
        return call(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", resolve)
        yield tried
    assert not tried


@pytest.fixture(scope="session")
def tiny_base():
    """`random:tiny` in fp32 on the CPU. Shared by all tests: do not change it."""
    from hat_lib.backbone.base import load_base

    return load_base("random:tiny", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def bundled():
    """The bundled base in fp32 on the CPU. Shared by all tests: do not change it."""
    from hat_lib.backbone.base import load_base

    return load_base("bundled", dtype=torch.float32, device="cpu")


@pytest.fixture
def no_grad():
    """For modules that test equalities: ``pytestmark = pytest.mark.usefixtures("no_grad")``."""
    with torch.no_grad():
        yield


@pytest.fixture
def run_hat(capsys):
    """Run a command in this process: ``(exit code, stdout, stderr)``."""
    from hat_lib.cli.app import app

    return partial(_run, capsys, app)


@pytest.fixture
def run_studies(capsys):
    """``python -m studies`` in this process, as `run_hat`."""
    from studies.__main__ import app

    return partial(_run, capsys, app)


def _run(capsys, app, *args):
    with pytest.raises(SystemExit) as stopped:
        app([str(a) for a in args], prog_name="hat")
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err
