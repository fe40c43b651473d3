"""A small part of what `make soak` measures, the same cases on every run."""

import json
import os
import pickle
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from notebook_files import notebook
from tiny_runs import new_hat, page, run_phase, skipping, tiny_run

from hat_lib.config import HatError
from hat_lib.rows import read_rows
from hat_lib.training.run import Run, train
from hat_lib.workbook.batch import parse_grid
from soak import __main__ as command
from soak import equalities, faults, hostile, load, planted, shown, versions


def sound(found, cases):
    assert found.failures == 0, found.note
    assert found.cases >= cases


@pytest.mark.slow
def test_equalities():
    sound(equalities.run(12), 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint JSON", "checkpoint tensors", "GGUF", "base folders"])
def test_hostile_models(kind, tmp_path):
    found = hostile.fuzz(kind, 60, tmp_path)
    sound(found, 60)
    assert 0 < found.named_errors < 60, "some are refused, and some are none the worse"


@pytest.mark.parametrize("kind", ["corpora", "notebooks for batch", "result CSVs"])
def test_hostile_texts(kind, tmp_path):
    sound(hostile.fuzz(kind, 100, tmp_path), 100)


@pytest.mark.slow
def test_undamaged_files_are_read(tmp_path):
    for kind, make in hostile.KINDS.items():
        (tmp_path / kind).mkdir()
        target = make(tmp_path / kind)
        if kind == "result CSVs":
            target.path.write_bytes(target.good)
        for path in getattr(target, "texts", [target.path]):
            target.path = path
            target.load()


@pytest.mark.slow
def test_planted_pickles_and_code_never_run(tmp_path):
    sound(planted.planted(tmp_path), 50)


def test_a_bomb_is_one(tmp_path):
    pickle.loads(pickle.dumps(planted.Bomb(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()
    with pytest.raises(AssertionError, match="pickle.find_class"), hostile.nothing_runs():
        pickle.loads(pickle.dumps(planted.Bomb(tmp_path / "again")))


@pytest.mark.slow
def test_marks_are_shown_and_do_not_act():
    sound(shown.shown(20), 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["closed_folder", "damaged_cache", "full_disk"])
def test_mishaps(name, tmp_path):
    found = faults.mishap(name, tmp_path)
    if found.note and not found.failures:
        pytest.skip(found.note)
    sound(found, 1)


@pytest.mark.timeout(method="thread")  # it uses the alarm itself
def test_ctrl_c_inside_a_compiled_step(tmp_path):
    faults.ctrl_c(tmp_path, 5)


@pytest.mark.slow
def test_load():
    for found, cases in (
        (load.generations(20), 20),
        (load.context_limit(96), 3),
        (load.ragged(9), 9),
        (load.threads(2), 16),
    ):
        sound(found, cases)


class Here:
    """A stand-in for a process."""

    @staticmethod
    def submit(function, *args):
        return SimpleNamespace(result=lambda: function(*args))


def test_a_row_for_each_part_once(tmp_path, monkeypatch, capsys):
    """What is already in the file is not measured again."""
    monkeypatch.setattr(
        "sys.argv", ["soak", "--only", "result CSVs", "--share", "0.001", "--out", str(tmp_path / "a.csv")]
    )
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda *_, **__: nullcontext(Here))
    assert command.main() == 0 and "10 cases, 0 failures" in capsys.readouterr().out
    (row,) = read_rows(tmp_path / "a.csv", command.Row)
    assert (row.area, row.cases) == ("hostile files", 10)
    assert command.main() == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--only", "nothing"], "no row has 'nothing' in it; there are: equalities: drawn models, "),
        (["--share", "0"], "--share must be above 0, at most 1, got 0.0"),
        (["--share", "0.5"], "a share of the cases is no result to keep: pass --out FILE"),
    ],
)
def test_what_would_measure_nothing_or_spoil_the_results_is_refused(options, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["soak", *options])
    before = command.RESULTS.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert told in capsys.readouterr().err and command.RESULTS.read_bytes() == before


def test_versions_that_cannot_be_had_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions.versions("newest", "3.14", tmp_path).note == "left out: no uv on the path (pip install uv)"
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\nexit 2\n")
    uv.chmod(0o755)
    found = versions.versions("newest", "3.14", tmp_path)
    assert (found.cases, found.note) == (0, "left out: there is no Python 3.14 here")


# Defects found this way, by name


def test_decisions_are_forced_on_a_model_without_exits():
    hat = skipping("channel", exit_layers=())
    ids = torch.arange(5, 11)[None]
    with torch.no_grad():
        with hat.record(), hat.reference():
            expected = hat.lm(ids).logits
        with hat.force(hat.trace.masks):
            found = equalities.stepwise(hat.lm, ids)
    assert hat.trace.executed is not None and torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "harm",
    [
        lambda nb: nb.pop("nbformat_minor"),
        lambda nb: nb["metadata"]["kernelspec"].update(language=0.5),
        lambda nb: nb["metadata"]["kernelspec"].update(name=[]),
        lambda nb: nb.update(metadata=[]),
        lambda nb: nb["cells"][0].pop("metadata"),
    ],
)
def test_a_damaged_notebook_is_one_error(harm, tmp_path):
    path = notebook(tmp_path / "a.ipynb")
    nb = json.loads(path.read_text())
    harm(nb)
    path.write_text(json.dumps(nb))
    with pytest.raises(HatError, match="a.ipynb"):
        parse_grid(path, ["capacity=0.4"])


def test_an_endless_cell_is_a_short_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"capacity,perplexity\n{'9' * 5000},{'x' * 5000}\n")
    with pytest.raises(HatError) as refused:
        read_rows(path, faults.Point)
    assert len(str(refused.value)) < len(str(path)) + 120


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    faults.drawing(tmp_path, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, data: (path.touch(), os.write(-1, data)))
        with pytest.raises(HatError, match="cannot write .*0.png: Bad file descriptor"):
            faults.drawing(tmp_path, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_is_full_ends_a_training_with_one_error(tmp_path, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("basic_ios::clear: iostream error")  # torch's wording

    with monkeypatch.context() as patch, pytest.raises(HatError, match="cannot write a checkpoint to .*iostream error"):
        patch.setattr(torch, "save", full)
        run_phase(new_hat("token"), tmp_path)

    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "write", no_room)
    with pytest.raises(HatError, match="cannot write .*run: No space left on device"):
        train(tiny_run("token", page(tmp_path)), tmp_path / "run", progress=False)


# The guard of tests/conftest.py


def test_sockets_reach_this_machine_alone(outside):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    with pytest.raises(OSError, match="tests are offline"), socket.socket() as out:
        out.connect(("192.0.2.1", 9))
    with pytest.raises(OSError, match="tests are offline"):
        socket.getaddrinfo("example.com", 80)
    assert [place for place, _ in outside] == ["192.0.2.1", "example.com"]
    outside.clear()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
