"""What the tests of commands share."""

import pytest

from hat_lib.cli.app import app


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A Markdown file, long enough to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "my text.md"
    path.write_text(" ".join(f"Line {i}: the {i % 7} quick brown foxes jump over {i}." for i in range(400)))
    return path


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory, text):
    """What `hat calibrate` writes for the tiny base."""
    folder = tmp_path_factory.mktemp("calibrated") / "my checkpoint"
    options = ("--base", "random:tiny", "--save", folder, "--text", text, "--tokens", 600, "--probe-tokens", 64)
    app(["calibrate", *map(str, options)], standalone_mode=False)
    return folder
