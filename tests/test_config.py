"""One dataclass defines what a HAT is, and refuses what it cannot be, in one line that names it."""

import errno
import fcntl
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_lib.backbone.shapes import random_config
from hat_lib.config import (
    PUBLISHED_DEPTH,
    PUBLISHED_EXITS,
    HatConfig,
    HatError,
    cache_dir,
    check_capacity,
    check_count,
    check_exit_rate,
    lock,
    scaled_exits,
)


def test_fractions_and_their_strings():
    for value in (0.1, 1, 0.55, "0.75", " 1e-1 "):
        assert check_capacity(value) == check_exit_rate(value) == float(value)
    assert check_exit_rate("0") == 0.0


@pytest.mark.parametrize("value", [-0.5, 0.0999, 1.0001, math.nan, math.inf, "abc", "", "70%", None, True, [0.5]])
def test_not_a_fraction(value):
    with pytest.raises(HatError, match=r"^capacity must be a number in \[0.1, 1.0\], got ") as caught:
        check_capacity(value)
    assert repr(value) in str(caught.value)
    if value != 0.0999:
        with pytest.raises(HatError, match=r"^exit rate must be a number in \[0.0, 1.0\], got "):
            check_exit_rate(value)


@given(st.integers(1, 200))
def test_exits_in_proportion_suit_their_depth(n_layers):
    exits = scaled_exits(n_layers)
    assert list(exits) == sorted(set(exits)) and all(1 <= e < n_layers for e in exits)
    assert len(exits) == 5 or n_layers < 12
    HatConfig(n_layers, exit_layers=exits)
    assert scaled_exits(PUBLISHED_DEPTH) == PUBLISHED_EXITS and scaled_exits(30) == (5, 11, 16, 22, 26)


def test_the_two_shapes_of_a_base_a_model_or_a_config(tiny_base):
    config = HatConfig.published(random_config("random:tinyllama"))
    assert config == HatConfig(22, "token", (4, 8, 12, 16, 19), 0.55, 0.0)
    config = HatConfig.default(tiny_base)
    assert config == HatConfig(4, "channel", (1, 2, 3), 0.75, 0.0)
    assert config == HatConfig.default(tiny_base.model) == HatConfig.default(tiny_base.model.config)
    assert HatConfig.default(tiny_base, capacity=0.6, exit_layers=()) == HatConfig(4, capacity=0.6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"exit_layers": (0,)}, r"exit layers must lie in 1\.\.21 for 22 layers, got 0"),
        ({"exit_layers": (4, 22)}, r"exit layers must lie in 1\.\.21 for 22 layers, got 22"),
        ({"exit_layers": (4.0,)}, r"1\.\.21 for 22 layers, got 4\.0"),
        ({"exit_layers": (4, 4, 8)}, r"sorted and distinct, got \[4, 4, 8\]"),
        ({"exit_layers": (8, 4)}, r"sorted and distinct, got \[8, 4\]"),
        ({"granularity": "head"}, "granularity must be one of channel, token, got 'head'"),
        ({"capacity": 0.05}, r"capacity must be a number in \[0.1, 1.0\], got 0.05"),
        ({"exit_rate": 2}, r"exit rate must be a number in \[0.0, 1.0\], got 2"),
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1, got 0"),
        ({"translator_rank": -1}, "translator_rank must be a whole number of at least 0, got -1"),
        ({"protected_tokens": 1.5}, "protected_tokens must be a whole number of at least 0, got 1.5"),
        ({"correction_rank": -1}, "correction_rank must be a whole number of at least 0, got -1"),
        ({"correction_rank": 1.5}, "correction_rank must be a whole number of at least 0, got 1.5"),
    ],
)
def test_one_line_for_a_wrong_field(changes, message):
    with pytest.raises(HatError, match=message) as caught:
        HatConfig(**{"n_layers": 22, **changes})
    assert "\n" not in str(caught.value)


def test_survives_json_and_takes_defaults():
    config = HatConfig(22, "token", PUBLISHED_EXITS, 0.55, 0.2, 3, 1)
    assert HatConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert HatConfig.from_dict({"n_layers": 22, "granularity": "token"}) == HatConfig(22, "token")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("HAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "hat_lib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "hat_lib"
    monkeypatch.setenv("HAT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path.home() / ".cache" / "hat_lib", "empty is unset, and not the working directory"
    monkeypatch.setenv("HAT_CACHE", "cache")
    with pytest.raises(HatError, match="HAT_CACHE must be an absolute path, got 'cache'"):
        cache_dir()


def test_a_lock_is_held_once_and_a_file_system_without_locks_is_named(monkeypatch, tmp_path):
    path = tmp_path / "rows.lock"
    with path.open("a") as first, path.open("a") as second:
        lock(first, "taken")
        with pytest.raises(HatError, match="^taken$"):
            lock(second, "taken")

        def refuse(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(HatError, match=f"cannot lock {path}: {os.strerror(errno.ENOLCK)}"):
            lock(second, "taken")


@pytest.mark.parametrize("value", [0, 6, 2.0, True, "3", None])
def test_a_count_is_a_whole_number_within_its_limits(value):
    assert check_count("steps", 1, 1) == 1 and check_count("steps", 5, 1, 5) == 5
    with pytest.raises(HatError, match=f"steps must be a whole number of at least 1, at most 5, got {value!r}"):
        check_count("steps", value, 1, 5)
