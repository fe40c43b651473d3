"""What reaches the terminal: any encoding, a closed pipe, hostile text, an installed copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hat_lib.config import REPO, HatError
from hat_lib.plotting.style import write


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_closed_pipe_leaves_no_traceback():
    command = f'"{sys.executable}" -m hat_lib --help | head -1'
    done = subprocess.run(command, shell=True, cwd=REPO, capture_output=True, text=True)
    assert done.stdout.startswith("Usage: hat ") and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    command = [sys.executable, "-m", "hat_lib", "evaluate", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: cannot write: ") and done.stderr.count("\n") == 1
    with pytest.raises(HatError, match="/dev/full"):
        write(Path("/dev/full"), b"a page")


@pytest.mark.slow
def test_an_installed_copy(tmp_path):
    """As installed by `pip install .`, without the rest of the repository."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    for name in ("hat_lib", "data"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "work"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", site, source], capture_output=True, text=True)
    if "BackendUnavailable" in done.stderr or "No module named" in done.stderr:
        pytest.skip("needs pip and setuptools")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)

    def installed(*args, **more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(site), "PYTHONIOENCODING": "ascii"}
        command = [sys.executable, "-m", "hat_lib", *args]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=240, **more)

    # A prompt from stdin, and a terminal that cannot show it.
    prompt = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{LLAMA}"
    done = installed("generate", "--base", "random:tiny", "--capacity", "1", "-", input=prompt.encode())
    assert done.returncode == 0 and done.stdout.startswith(b"caf? ?"), done
    done = installed("generate", "x", "--base", "random:tiny", "--checkpoint", "default")
    assert done.returncode == 2 and b"was made for 'bundled'" in done.stderr, "found, by name"
    done = installed("batch", "05", "--grid", "seed=0", "--out", "new")
    assert done.returncode == 2 and b"clone of the repository" in done.stderr
