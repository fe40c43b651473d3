"""What the library survives, counted: randomly drawn models, hostile files, faults, load.

`make soak` measures all of it into ``data/results/reliability.csv``; `test_soak.py` runs a small part.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hat_lib.config import HatError


@dataclass
class Found:
    """How the cases of one kind went."""

    cases: int = 0
    failures: int = 0
    named_errors: int = 0
    """cases that ended in a single one-line `HatError`"""
    note: str = ""
    """the first failure, or what was left out"""
    kib_per_case: float | None = None
    slowdown: float | None = None

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Counts what happens inside. Whatever is raised ends here, except for a Ctrl-C by a person."""
        self.cases += 1
        try:
            yield
        except HatError as error:
            self.named_errors += 1
            if "\n" in str(error) or len(str(error)) > 1000:
                self.fail(name, error)
        except Exception as error:
            self.fail(name, error)

    def fail(self, name: str, error: object) -> None:
        self.failures += 1
        self.note = self.note or f"{name}: {type(error).__name__}: {error}"[:1500]


def peak_mib() -> float:
    """The most memory this process has ever used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
