"""What a notebook calls: `begin` in its first cell, `judge` where a prediction meets its measurement, `record` for a
number it found.

more = begin(profile=profile, seed=seed, dtype=dtype, max_tokens=(max_tokens, 512))
judge("the realised capacity lies within 0.06 of 0.6", abs(realised - 0.6) < 0.06, f"{realised:.3f}")
record(perplexity=21.3, capacity=0.55)
"""

from __future__ import annotations

import json
from importlib.metadata import version

from hat_lib.config import HatError

RESULT = "application/x-hat-result+json"
"""MIME type of a cell output made by `record`: a JSON object"""


def begin(*, profile: str, seed: int, full: int = 8, dtype: str | None = None, **counts: tuple[int, int]) -> int:
    """Check the parameters that notebooks share, print versions and, if there is a model, seed torch.

    Args:
        full: how many times as much the profile "full" does as "quick".
        dtype: of the base, as for `load_base`; None in a notebook without a model, where torch is not imported.
        counts: ``name=(value, least)`` for whole numbers.

    Returns 1 for the profile "quick", else ``full``; raises `HatError` for an invalid value.
    """
    if profile not in ("quick", "full"):
        raise HatError(f"profile must be quick or full, got {profile!r}")
    for name, (value, least) in {**counts, "seed": (seed, 0)}.items():
        if value < least:
            raise HatError(f"{name} must be a whole number of at least {least}, got {value}")
    packages = ["numpy", "pandas"]
    if dtype is not None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from hat_lib.backbone.base import parse_dtype

        disable_progress_bar()  # half-drawn bars would stay in stored outputs
        if dtype != "auto":
            parse_dtype(dtype)
        torch.manual_seed(seed)
        packages = ["torch", "transformers"]
    print(*(f"{name} {version(name)}" for name in ("hat-workbook", *packages)), sep=", ")
    return {"quick": 1, "full": full}[profile]


def judge(prediction: str, held: bool, measured: str = "") -> None:
    """Print whether a prediction held or failed and, on a second line, what was measured.

    nbval compares the first line. The second has numbers that differ from machine to machine, so
    ``notebooks/nbval_sanitize.cfg`` leaves it out of the comparison.
    """
    print(f"{'held' if held else 'FAILED'}: {prediction}" + f"\n    measured: {measured}" * bool(measured))


def record(**values) -> None:
    """Show values and keep them for `hat_lib.workbook.notebooks.results`; a later value of a name replaces it.

    Raises `HatError` for what JSON cannot represent, nan and infinity included.
    """
    from IPython.display import display

    json_text("what is recorded", values)
    text = ", ".join(f"{name} = {value}" for name, value in values.items())
    display({"text/plain": text, RESULT: values}, raw=True)


def json_text(what: str, value: object) -> str:
    """``value`` as JSON; raises a `HatError` that names ``what``."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        expected = "JSON (finite numbers, text, lists, dicts, None)"
        raise HatError(f"{what} must be {expected}, got {value!r}") from None
