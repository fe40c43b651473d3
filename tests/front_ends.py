"""JupyterLab: on loopback, with a token, and without reading or writing the user's files."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START = 180  # seconds
USER = ("JUPYTER", "JPY_", "IPYTHON")  # variables leading to the user's settings, kernels and running servers


@contextmanager
def jupyter(home: Path) -> Iterator[str]:
    """Serve ``home/notebooks`` in JupyterLab; yields an address to be formatted with a page's path.

    ``home`` also holds settings, kernel files, figures and the server log.
    """
    port, token = _free_port(), secrets.token_hex(16)
    commands = {"expose_app_in_browser": True}  # as `window.jupyterapp`
    # Which addresses it listens on is left as it comes.
    server = {"port": port, "port_retries": 0, "open_browser": False, "allow_root": True}
    options = {
        "ServerApp": server | {"root_dir": str(home / "notebooks")},
        "IdentityProvider": {"token": token},
        "LabApp": commands,
    }
    _write(home / "config" / "jupyter_server_config.json", options)
    news = "@jupyterlab/apputils-extension:announcements"  # a dialog, and a request to another host
    _write(home / "config" / "labconfig" / "page_config.json", {"disabledExtensions": {news: True}})
    with _running(home, port, "jupyterlab"):
        yield f"http://127.0.0.1:{port}/{{}}?token={token}&reset"  # so that no tab of an earlier page comes back


@contextmanager
def _running(home: Path, port: int, module: str, *options: str) -> Iterator[None]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(USER)}
    env |= {f"JUPYTER_{name.upper()}_DIR": str(home / name) for name in ("config", "data", "runtime")}
    env |= {"IPYTHONDIR": str(home / "ipython"), "HAT_FIGURES": str(home / "figures")}
    command = [sys.executable, "-m", module, *options]
    with open(home / "log", "ab") as log:
        process = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(port, process, home / "log")
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(port: int, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, f"no server:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _write(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
