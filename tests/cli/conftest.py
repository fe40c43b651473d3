"""What the tests of commands share: running a command, a refused command, the user's own text and checkpoint."""

import os
import subprocess
import sys

import pytest

from hat_lib.backbone import base
from hat_lib.config import REPO


@pytest.fixture
def hat(run_hat, monkeypatch):
    """Run a command in this process: ``(exit code, stdout, stderr)``."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["hat", *map(str, args)])
        return run_hat(*args)

    return run


@pytest.fixture
def refuses(hat, tmp_path):
    """A command fails with one ``error:`` line that contains all the words, prints nothing else and writes nothing."""

    def run(args, *words):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = hat(*args)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and out == "" and len(errors) == 1 and "Traceback" not in err, (code, out, err)
        assert all(word in errors[0] for word in words), err
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def no_base(monkeypatch):
    """No base may be loaded; loading one would hash it."""
    monkeypatch.setattr(
        base, "fingerprint", lambda *_: pytest.fail("a base was loaded before the arguments were checked")
    )


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file, long enough to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "my text.txt"
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
    """What `hat calibrate` writes for the tiny base, and its stdout."""
    folder = tmp_path_factory.mktemp("calibrated") / "my checkpoint"
    options = ("--base", "random:tiny", "--save", folder, "--text", text, "--tokens", "600", "--probe-tokens", "64")
    done = python_m("hat_lib", "calibrate", *options)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout.decode()
