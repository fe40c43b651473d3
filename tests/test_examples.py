"""The examples in docstrings, in the order of the API reference, as one session: what one names, the next ones use."""

import doctest

import torch

import hat_lib
from hat_lib.calibration.capacity import calibrate

MODEL = hat_lib.HierarchicalTransformer
EXAMPLES = [hat_lib.HatConfig, hat_lib.load_base, hat_lib.load_text, MODEL, calibrate, MODEL.at, MODEL.from_pretrained,
            hat_lib.AdaptiveInference, hat_lib.sweep, hat_lib.explain]  # fmt: skip


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = {name: getattr(hat_lib, name) for name in hat_lib.__all__} | {"calibrate": calibrate, "torch": torch}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for thing in EXAMPLES:
        (example,) = doctest.DocTestFinder(recurse=False).find(thing, thing.__qualname__, globs={})
        example.globs = session
        found = runner.run(example, clear_globs=False)
        assert found.attempted and not found.failed, thing
