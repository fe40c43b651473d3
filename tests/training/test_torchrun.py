"""Two processes as torchrun starts them (gloo, CPU): the same training, one writer, and one decision to stop."""

import json
import os
import socket
import sys

import pytest
import tiny_runs
import torch
from tiny_runs import GRAINS, PHASES, gradients, interrupt_at, logged_steps, page, table, tiny_run

from hat_lib.cli.app import app
from hat_lib.config import HatError
from hat_lib.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:token grain")]
STEPS = 4


def work(folder, rank, port):
    """Train in ``folder`` as one of two processes; writes how each run ended, and which files were written."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    written, ended, text = [], {}, folder / "page.txt"
    sys.addaudithook(lambda name, args: written.append(str(args[0])) if _writes(name, args, folder) else None)

    def run(name, grain="token", phase="routers", **options):
        outcomes = train(tiny_run(grain, text, phase, STEPS), folder / name, progress=False, **options)
        ended[name] = [(outcome.phase, outcome.step, outcome.stopped) for outcome in outcomes]

    run("token", phase="full")
    run("channel", "channel")
    run("time", max_minutes=1e-6 if rank == 0 else None)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            interrupt_at(patch, ("routers", 3))
        run("interrupt")
    app(["train", "--resume", str(folder / "interrupt")], standalone_mode=False)
    for grain in GRAINS:
        for phase in PHASES:
            found = gradients(folder / grain, phase, folder / f"two-{grain}-{phase}")
            if rank == 0:
                torch.save(found, folder / f"two-{grain}-{phase}.pt")
    (folder / f"rank{rank}.json").write_text(json.dumps({"ended": ended, "written": written}))


def _writes(name, args, folder) -> bool:
    changes = name in ("os.rename", "os.remove", "os.rmdir") or (name == "open" and set(args[1] or "r") & set("wax+"))
    return changes and str(args[0]).startswith(str(folder)) and not os.path.isdir(args[0])  # a nameless probe


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes ran `work`, and what each of them wrote about it."""
    folder = tmp_path_factory.mktemp("two")
    page(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [tiny_runs.start(work, folder, rank, port) for rank in range(2)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def one_thread():
    """One thread, as in the two processes, so that sums are split and rounded the same way."""
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
    folder, _ = two
    both = torch.load(folder / f"two-{grain}-{phase}.pt")
    one = gradients(folder / grain, phase, tmp_path / "one", accumulate=2)
    errors = relative_errors(both, one)
    assert max(errors) < 0.5 and sorted(errors)[1] < 1e-3, errors
    assert min(relative_errors(gradients(folder / grain, phase, tmp_path / "alone"), one)) > 0.1  # those of one batch


def relative_errors(found, expected):
    """For each step, over all parameters: norm of the difference over the norm of what was expected."""
    flat = [[torch.cat([step[n].flatten() for n in sorted(step)]) for step in steps] for steps in (found, expected)]
    return [float((a - b).norm() / b.norm()) for a, b in zip(*flat, strict=True)]


def test_both_processes_end_after_the_same_step_for_the_same_reason(two):
    _, (first, second) = two
    assert first["written"] and not second["written"]
    assert first["ended"] == second["ended"] == {
        "token": [["routers", STEPS, ""], ["exit", STEPS, ""]],
        "channel": [["routers", STEPS, ""]],
        "time": [["routers", 1, "time"]],
        "interrupt": [["routers", 3, "interrupt"]],
    }  # fmt: skip


def test_one_process_does_not_go_on_with_a_run_of_two(two):
    """Its steps would be half as large."""
    folder, _ = two
    with pytest.raises(HatError, match="processes was 2, now 1"):
        train(tiny_run("token", folder / "page.txt", "routers", STEPS), folder / "time", resume=True, progress=False)


def test_the_command_resumes_with_two_processes(two):
    folder, _ = two
    measured = ("step", "loss", "kl", "capacity", "share", "grad_norm", "learning_rate")
    resumed, whole = (
        [[row[name] for name in measured] for row in table(folder / run / "log.csv") if row["phase"] == "routers"]
        for run in ("interrupt", "token")
    )
    assert resumed == whole and logged_steps(folder / "interrupt")[-1] == ("routers", STEPS)
