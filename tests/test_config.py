"""One dataclass says what a HAT is, and refuses what it cannot be, in one line that names it."""

import json
import math
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
    scaled_exits,
)


@pytest.mark.parametrize("value", [0.1, 1, 1.0, 0.55, "0.75", " 1e-1 "])
def test_capacities_and_their_strings(value):
    assert check_capacity(value) == float(value)


@pytest.mark.parametrize(
    "value", [0, 0.05, 0.0999, 1.0001, 1.5, -0.5, math.nan, math.inf, "abc", "", "nan", "70%", None, True, [0.5]]
)
def test_not_a_capacity(value):
    with pytest.raises(HatError, match=r"^capacity must be a number in \[0.1, 1.0\], got ") as caught:
        check_capacity(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0, 1, 0.3, "0"])
def test_exit_rates(value):
    assert check_exit_rate(value) == float(value)


@pytest.mark.parametrize("value", [-0.1, 1.1, 2, math.nan, "two", None, False])
def test_not_an_exit_rate(value):
    with pytest.raises(HatError, match=r"^exit rate must be a number in \[0.0, 1.0\], got "):
        check_exit_rate(value)


def test_published_exits_at_published_depth_and_in_proportion():
    assert scaled_exits(PUBLISHED_DEPTH) == PUBLISHED_EXITS
    assert scaled_exits(30) == (5, 11, 16, 22, 26)
    assert [scaled_exits(n) for n in (1, 2, 4)] == [(), (1,), (1, 2, 3)]


@given(st.integers(1, 200))
def test_scaled_exits_suit_their_depth(n_layers):
    exits = scaled_exits(n_layers)
    assert list(exits) == sorted(set(exits)) and all(1 <= e < n_layers for e in exits)
    assert len(exits) == 5 or n_layers < 12
    HatConfig(n_layers, exit_layers=exits)


def test_published_shape_on_tinyllama():
    config = HatConfig.published(random_config("random:tinyllama"))
    assert (config.n_layers, config.exit_layers) == (22, (4, 8, 12, 16, 19))
    assert (config.granularity, config.capacity, config.exit_rate) == ("token", 0.55, 0.0)


def test_default_takes_a_base_a_model_or_a_config(tiny_base):
    config = HatConfig.default(tiny_base)
    assert (config.granularity, config.capacity, config.exit_layers) == ("channel", 0.75, (1, 2, 3))
    assert config == HatConfig.default(tiny_base.model) == HatConfig.default(tiny_base.model.config)
    assert HatConfig.default(tiny_base, capacity=0.6, exit_layers=()) == HatConfig(4, capacity=0.6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"exit_layers": (0,)}, r"exit layers must lie in 1\.\.21 for 22 layers, got 0"),
        ({"exit_layers": (4, 22)}, r"exit layers must lie in 1\.\.21 for 22 layers, got 22"),
        ({"exit_layers": (-1,)}, r"1\.\.21 for 22 layers, got -1"),
        ({"exit_layers": (4.0,)}, r"1\.\.21 for 22 layers, got 4\.0"),
        ({"exit_layers": (True,)}, "got True"),
        ({"exit_layers": (4, 4, 8)}, r"sorted and distinct, got \[4, 4, 8\]"),
        ({"exit_layers": (8, 4)}, r"sorted and distinct, got \[8, 4\]"),
        ({"granularity": "head"}, "granularity must be one of channel, token, got 'head'"),
        ({"capacity": 0.05}, r"capacity must be a number in \[0.1, 1.0\], got 0.05"),
        ({"exit_rate": 2}, r"exit rate must be a number in \[0.0, 1.0\], got 2"),
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1, got 0"),
        ({"n_layers": 22.0}, r"n_layers must be a whole number of at least 1, got 22\.0"),
        ({"translator_rank": -1}, "translator_rank must be a whole number of at least 0, got -1"),
        ({"protected_tokens": 1.5}, "protected_tokens must be a whole number of at least 0, got 1.5"),
    ],
)
def test_one_line_for_a_wrong_field(changes, message):
    with pytest.raises(HatError, match=message) as caught:
        HatConfig(**{"n_layers": 22, **changes})
    assert "\n" not in str(caught.value)


def test_survives_json():
    config = HatConfig(22, "token", PUBLISHED_EXITS, 0.55, 0.2, 3, 1)
    assert HatConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values, message",
    [
        ({"n_layers": 22, "router_bias": True}, r"unknown fields in config: \['router_bias'\]"),
        ({"capacity": 0.5}, r"missing fields in config: \['n_layers'\]"),
        *[(value, f"config must be an object, got {type(value).__name__}") for value in (None, [], "config", 3)],
    ],
)
def test_from_dict_takes_defaults_but_no_unknown_field(values, message):
    assert HatConfig.from_dict({"n_layers": 22, "granularity": "token"}) == HatConfig(22, "token")
    with pytest.raises(HatError, match=message):
        HatConfig.from_dict(values)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("HAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "hat_lib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "hat_lib"


@pytest.mark.parametrize("value", [0, -1, 6, 2.0, True, "3", None])
def test_a_count_is_a_whole_number_within_its_limits(value):
    assert check_count("steps", 1, 1) == 1 and check_count("steps", 5, 1, 5) == 5
    with pytest.raises(HatError, match=f"steps must be a whole number of at least 1, at most 5, got {value!r}"):
        check_count("steps", value, 1, 5)
