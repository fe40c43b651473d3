"""What a notebook calls: `begin` in its first cell, and `record` for a number it found.

A notebook makes three kinds of statement. What must hold is an ``assert``. A `check` is a bound that guards a rerun: it
was set after the first measurement, so it proves nothing, and it is silent while it holds. A `verdict` answers a claim,
or a question asked beforehand, by an interval.

more = begin(profile=profile, seed=seed, dtype=dtype, max_tokens=(max_tokens, 512))
check("the realised capacity lies within 0.06 of 0.6", abs(realised - 0.6) < 0.06, f"{realised:.3f}")
verdict("perplexity rises by at most 3 %", (low, high), at_most=0.03, measured=f"{increase:+.1%}")
record(perplexity=21.3, capacity=0.55)
"""

import json
from importlib.metadata import version

from hat_lib.config import HatError, check_count
from hat_lib.evaluation.intervals import outcome

RESULT = "application/x-hat-result+json"
"""MIME type of a cell output made by `record`: a JSON object"""


def begin(*, profile: str, seed: int, full: int = 8, dtype: str | None = None, **counts: tuple[int, int]) -> int:
    """Check the parameters that notebooks share, print versions and, if there is a model, seed torch.

    ``counts`` are ``name=(value, least)`` for whole numbers; ``dtype`` is that of the base, None where there is no
    model. Returns 1 for the profile "quick", else ``full``: how many times as much it does.
    """
    if profile not in ("quick", "full"):
        raise HatError(f"profile must be quick or full, got {profile!r}")
    for name, (value, least) in {"seed": (seed, 0), **counts}.items():
        check_count(name, value, least)
    packages = ["hat-workbook", "numpy", "pandas"]
    if dtype is not None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from hat_lib.base.load import parse_dtype

        disable_progress_bar()  # half-drawn bars would stay in stored outputs
        if dtype != "auto":
            parse_dtype(dtype)
        torch.manual_seed(seed)
        packages = ["hat-workbook", "torch", "transformers"]
    print(", ".join(f"{name} {version(name)}" for name in packages))
    return full if profile == "full" else 1


def check(bound: str, holds: bool, measured: str = "") -> None:
    """Print a bound that does not hold, and what was measured; nothing if it holds."""
    if not holds:
        print(f"check failed: {bound}\n    measured: {measured}")


def verdict(
    claim: str,
    interval: tuple[float, float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    measured: str = "",
) -> None:
    """Print whether a claim is kept, missed or open by its 95 % interval, and on a second line what was measured.

    nbval compares the first line. ``notebooks/nbval_sanitize.cfg`` leaves out the second, as it leaves out any line
    that begins with "measured:", since the numbers differ from machine to machine.
    """
    print(f"{outcome(*interval, at_most=at_most, at_least=at_least)}: {claim}")
    print(f"    measured: {measured}")


def record(**values) -> None:
    """Show values and keep them for `hat_lib.workbook.notebooks.results`; a later value of a name replaces it.

    Raises `HatError` for what JSON cannot represent, nan and infinity included.
    """
    from IPython.display import display

    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise HatError(f"what is recorded must be JSON (finite numbers, text, lists, dicts, None): {error}") from None
    text = ", ".join(f"{name} = {value}" for name, value in values.items())
    display({"text/plain": text, RESULT: values}, raw=True)
