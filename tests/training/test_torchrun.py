"""Two processes under torchrun (gloo, CPU): the same training, one writer, and one decision to stop."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import GRAINS, page, tiny_run

from hat_lib.model.checkpoint import ADAPTER_FILE, read_checkpoint
from hat_lib.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:token grain")]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which `two_processes.py` ran, and what its two processes said."""
    folder = tmp_path_factory.mktemp("two")
    page(folder)
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("grain", GRAINS)
def test_two_processes_train_as_one_that_accumulates_two_batches(two, grain, tmp_path):
    folder, (first, second) = two
    assert first["ended"][grain] == second["ended"][grain] == [["routers", 10, ""], ["exit", 10, ""]]
    train(tiny_run(grain, folder / "page.txt", accumulate=2), tmp_path / "one", progress=False)
    one, both = (read_checkpoint(at).tensors for at in (tmp_path / "one", folder / grain))
    assert one.keys() == both.keys()
    for name, expected in one.items():
        torch.testing.assert_close(both[name], expected, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_only_the_first_process_writes(two):
    _, (first, second) = two
    assert any("hat_config.json" in path for path in first["written"])
    assert second["written"] == []


def test_what_makes_one_process_stop_stops_both(two):
    _, (first, second) = two
    for name, step in ("time", 1), ("interrupt", 3):
        assert first["ended"][name] == second["ended"][name] == [["routers", step, name]]


def test_the_command_resumes_with_two_processes(two):
    folder, _ = two
    assert (folder / "interrupt" / ADAPTER_FILE).read_bytes() == (folder / "token" / ADAPTER_FILE).read_bytes()
