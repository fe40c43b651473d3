"""Two processes under torchrun (gloo, CPU): the same training, one writer, and one decision to stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import GRAINS, PHASES, gradients, page

from hat_lib.model.checkpoint import ADAPTER_FILE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:token grain")]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which `two_processes.py` ran, and what its two processes printed."""
    folder = tmp_path_factory.mktemp("two")
    page(folder)
    tests = Path(__file__).parents[1]
    script, here = tests / "two_processes.py", os.environ | {"PYTHONPATH": str(tests.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=here)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def one_thread():
    """One thread, as under torchrun, so that sums are split and rounded the same way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("phase", PHASES)
def test_two_processes_have_the_gradients_of_one_that_accumulates_two_batches(two, grain, phase, tmp_path):
    """At the same parameters, because Adam hides a wrong factor. One decision flipped by rounding at a threshold costs
    up to a third of one step's gradient; a wrong division costs all of it in every step."""
    folder, ended = two
    assert [e["ended"][grain] for e in ended] == [[["routers", 10, ""], ["exit", 10, ""]]] * 2
    both = torch.load(folder / f"two-{grain}-{phase}.pt")
    one = gradients(folder / grain, phase, tmp_path / "one", accumulate=2)
    errors = relative_errors(both, one)
    assert max(errors) < 0.5 and sorted(errors)[1] < 1e-3, errors
    assert min(relative_errors(gradients(folder / grain, phase, tmp_path / "alone"), one)) > 0.1  # those of one batch


def relative_errors(found, expected):
    """For each step, over all parameters: norm of the difference over the norm of what was expected."""
    flat = [[torch.cat([step[n].flatten() for n in sorted(step)]) for step in steps] for steps in (found, expected)]
    return [float((a - b).norm() / b.norm()) for a, b in zip(*flat, strict=True)]


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
