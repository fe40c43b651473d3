"""What the tests of commands share."""

import os
import subprocess
import sys

import pytest

from hat_lib.config import REPO


@pytest.fixture
def hat(run_hat, monkeypatch):
    """Run a command in this process: ``(exit code, stdout, stderr)``."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["hat", *map(str, args)])
        return run_hat(*args)

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A Markdown file, long enough to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "my text.md"
    path.write_text(" ".join(f"Line {i}: the {i % 7} quick brown foxes jump over {i}." for i in range(400)))
    return path


@pytest.fixture(scope="session")
def python_m():
    """Run a module in a separate process."""

    def run(module, *args, cwd=REPO, stdout=subprocess.PIPE, input=None, **environment):
        command = [sys.executable, "-m", module, *map(str, args)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        pipes = {"stdout": stdout, "stderr": subprocess.PIPE, "input": input}
        return subprocess.run(command, cwd=cwd, env=environment, timeout=240, **pipes)

    return run


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory, text, python_m):
    """What `hat calibrate` writes for the tiny base."""
    folder = tmp_path_factory.mktemp("calibrated") / "my checkpoint"
    options = ("--base", "random:tiny", "--save", folder, "--text", text, "--tokens", "600", "--probe-tokens", "64")
    done = python_m("hat_lib", "calibrate", *options)
    assert done.returncode == 0, done.stderr
    return folder
