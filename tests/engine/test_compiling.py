"""Compiled code is cached for the sources it was compiled from, and the cache is never required."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
from hat_lib.engine.compiling import compiled

@compiled(keep=True)
def double(x):
    return 2 * x

assert double(21) == 42
print(sum(double.stats.cache_hits.values()))
"""


@pytest.fixture
def hits(tmp_path, monkeypatch):
    """Runs the script in a separate process; returns how much it found."""
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "cache"))

    def run():
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        run.warnings = done.stderr.count("HAT_CACHE")
        return int(done.stdout)

    return run


def test_compiled_code_is_kept_and_replaced_when_damaged(hits, tmp_path):
    assert hits() == 0 and hits() == 1
    for path in (tmp_path / "cache" / "compiled").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert hits() == 0 and hits() == 1


def test_folder_that_cannot_be_written(hits, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    assert hits() == 0 and hits.warnings == 1
