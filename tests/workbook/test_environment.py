"""What the report on the machine says: what will be slow, in plain sentences."""

import sys

import pytest
import torch

from hat_lib.workbook import environment as report

FACTS = report.environment()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dtype": torch.float32, "device": "cpu"}, "fp32 only"),
        ({"threads": 1}, "one torch thread"),
        ({"no_engine": "numba cannot be used here"}, "skipped channels save no time"),
        ({"threads": 8, "cores": 2}, "8 torch threads on 2 cores"),
        ({"device": "cuda: Some GPU"}, "quality is real, speed is not"),
        ({"memory": 2.0}, "2.0 GB of memory"),
        ({"ready": {"base bundled": False}, "has_pip": False}, "no pip"),
        ({"ready": {"base bundled": False}, "disk_free": 0.1}, "0.1 GB of disk"),
        ({"offline": True}, "HF_HUB_OFFLINE"),
        ({"colab": True}, "Drive"),
    ],
)
def test_setup_tells_what_would_be_slow(changes, words):
    fine = FACTS | dict(
        dtype=torch.bfloat16,
        device="cpu",
        no_engine=None,
        threads=4,
        cores=4,
        memory=16.0,
        disk_free=50.0,
        has_pip=True,
        offline=False,
        colab=False,
    )
    assert report.slow_here(fine) == []
    (note,) = report.slow_here(fine | changes)
    assert words in note and f"note: {note}" in report.lines(fine | changes)


def test_colab_is_found_without_importing_it(monkeypatch, tmp_path):
    assert not report.in_colab()
    package = tmp_path / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('wants a notebook')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "google", raising=False)
    assert report.in_colab()
