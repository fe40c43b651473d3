"""What `test_fast_path.py` starts: a process in which numba cannot be imported, and which says what works there."""

import json
import pkgutil
import sys
from importlib import import_module

ENGINE = "hat_lib.engine"
"""what `hat_lib.decoding.generate` imports if it can"""


def main() -> None:
    from tiny_runs import GRAINS, greedy, skipping
    from typer.testing import CliRunner

    import hat_lib
    from hat_lib.cli.app import app
    from hat_lib.decoding.generate import warm

    for module in pkgutil.walk_packages(hat_lib.__path__, "hat_lib."):
        if not module.name.startswith(ENGINE) and not module.name.endswith("__main__"):
            import_module(module.name)
    warm()
    hats = [skipping(grain) for grain in GRAINS]
    report = CliRunner().invoke(app, ["setup", "--no-fetch"]).output
    texts, decoding = [greedy(hat) for hat in hats], [hat.decoding for hat in hats]
    print(json.dumps({"decoding": decoding, "texts": texts, "report": report.splitlines()}))


if __name__ == "__main__":
    sys.modules["numba"] = None  # `import numba` raises ModuleNotFoundError
    main()
