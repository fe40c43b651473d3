"""The report on the machine."""

import sys

import torch

from hat_lib.workbook import environment as report


def test_slow_machines_are_noted(monkeypatch):
    monkeypatch.setattr(report, "default_dtype", lambda device: torch.bfloat16)
    assert not any(line.startswith("note: ") for line in report.environment())
    monkeypatch.setattr(report, "default_dtype", lambda device: torch.float32)
    monkeypatch.setattr(report.fast_path, "UNAVAILABLE", "no numba")
    notes = [line for line in report.environment() if line.startswith("note: ")]
    assert len(notes) == 2 and "fp32" in notes[0] and "no engine" in notes[1]


def test_colab_is_found_without_importing_it(monkeypatch, tmp_path):
    assert not report.in_colab()
    package = tmp_path / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs a notebook')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "google", raising=False)
    assert report.in_colab()
