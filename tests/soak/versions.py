"""The fast tests under other versions of Python and of the packages, each in an environment of its own, made by uv.

"lowest" takes the lowest release that pyproject.toml allows of every package it names, "newest" the newest. Tested is
the last commit. Packages come from the package registry, so this is the one part that is not offline.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from hat_lib.config import REPO
from soak import Found

RUNS = (("lowest", "3.11"), ("newest", "3.12"), ("newest", "3.13"), ("newest", "3.14"))
NAMED = ("torch", "transformers", "numba", "numpy", "pandas")
OUTSIDE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def versions(which: str, python: str, folder: Path) -> Found:
    """Cases are tests that ran; failures those that failed, errors included."""
    found, uv = Found(), shutil.which("uv")
    if uv is None:
        found.note = "left out: no uv on the path (pip install uv)"
        return found
    at = subprocess.run([uv, "python", "find", "--no-python-downloads", python], capture_output=True, text=True)
    if at.returncode:
        found.note = f"left out: there is no Python {python} here"
        return found
    clone, env = folder / "clone", folder / "env"
    do("git", "clone", "-q", REPO, clone)
    do(uv, "venv", "-q", "--python", at.stdout.strip(), env)
    lowest = ["--resolution", "lowest-direct"] if which == "lowest" else []
    do(uv, "pip", "install", "-q", "--python", env / "bin" / "python", *lowest, "-e", f"{clone}[dev]")
    # As `make check`, but for the linters.
    tests = [env / "bin" / "python", "-m", "pytest", "-q", "-m", "not slow", "-n", "2", "--dist", "loadfile"]
    offline = dict.fromkeys(OUTSIDE, "1") | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    around = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the clone, and nothing else
    around |= offline | {"PATH": f"{env / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    with (folder / "out.txt").open("w") as out:
        command = [*tests, f"--junitxml={folder / 'tests.xml'}"]
        subprocess.run(command, cwd=clone, env=around, stdout=out, stderr=out)
    if not (folder / "tests.xml").exists():
        raise RuntimeError((folder / "out.txt").read_text()[-1000:])
    suite = ElementTree.parse(folder / "tests.xml").getroot()[0]
    found.cases = int(suite.get("tests")) - int(suite.get("skipped"))
    for case in suite.iter("testcase"):
        for bad in (*case.iter("failure"), *case.iter("error")):
            found.fail(f"{case.get('classname')}.{case.get('name')}", RuntimeError(bad.get("message")))
    listed = do(uv, "pip", "freeze", "--python", env / "bin" / "python").splitlines()
    found.note = found.note or ", ".join(line for line in listed if line.partition("==")[0] in NAMED)
    return found


def do(*command) -> str:
    """What a command prints; if it fails, the end of what it complained of."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:3]))}: {done.stderr.strip()[-800:]}")
    return done.stdout
