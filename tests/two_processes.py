"""What `test_torchrun.py` starts twice: trains in FOLDER, and prints which files each process wrote.

torchrun --nproc_per_node=2 tests/two_processes.py FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_runs import GRAINS, PHASES, gradients, tiny_run

from hat_lib.cli.app import app
from hat_lib.training import trainer
from hat_lib.training.run import train

RANK = int(os.environ["RANK"])


class CtrlC(trainer.Objective):
    """Ctrl-C in step 3, in the second process only."""

    def forward(self, *args, step, **kwargs):
        if RANK == 1 and step == 2:
            signal.raise_signal(signal.SIGINT)
        return super().forward(*args, step=step, **kwargs)


def main(folder: Path) -> None:
    written = []
    sys.addaudithook(lambda name, args: written.append(str(args[0])) if _writes(name, args, folder) else None)
    text = folder / "page.txt"
    ended = {}
    for grain in GRAINS:
        ended[grain] = train(tiny_run(grain, text), folder / grain, progress=False)
    late = 1e-6 if RANK == 0 else None
    ended["time"] = train(tiny_run("token", text), folder / "time", max_minutes=late, progress=False)
    objective, trainer.Objective = trainer.Objective, CtrlC
    ended["interrupt"] = train(tiny_run("token", text), folder / "interrupt", progress=False)
    trainer.Objective = objective
    app(["train", "--resume", str(folder / "interrupt")], standalone_mode=False)
    for grain in GRAINS:
        for phase in PHASES:
            found = gradients(folder / grain, phase, folder / f"two-{grain}-{phase}")
            if RANK == 0:
                torch.save(found, folder / f"two-{grain}-{phase}.pt")
    summary = {name: [(o.phase, o.step, o.stopped) for o in outcomes] for name, outcomes in ended.items()}
    (folder / f"rank{RANK}.json").write_text(json.dumps({"ended": summary, "written": written}))


def _writes(name, args, folder) -> bool:
    changes = name in ("os.rename", "os.remove", "os.rmdir") or (name == "open" and set(args[1] or "r") & set("wax+"))
    return changes and str(args[0]).startswith(str(folder)) and not os.path.isdir(args[0])  # a nameless probe


if __name__ == "__main__":
    main(Path(sys.argv[1]))
