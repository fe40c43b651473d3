"""One dataclass defines what a HAT is, and refuses what it cannot be."""

import json
import math
from dataclasses import asdict
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hat_lib.base.shapes import random_config
from hat_lib.config import (
    PUBLISHED_DEPTH,
    PUBLISHED_EXITS,
    HatConfig,
    HatError,
    cache_dir,
    check_capacity,
    check_count,
    check_exit_rate,
    check_fraction,
    data_folder,
    scaled_exits,
)

NO_NUMBERS = [math.nan, math.inf, True, None, 1j, [0.5], np.array([0.5]), np.True_, 10**400, 10**5000, Decimal("1e999")]


def test_fractions():
    for value in (0.1, 1, 0.55, "0.75", " 1e-1 ", np.float32(0.5), np.int64(1), Decimal("0.5"), torch.tensor(0.5)):
        assert check_capacity(value) == check_exit_rate(value) == float(value)
    assert check_exit_rate("0") == 0.0
    for wrong in (-0.5, 1.0001, "abc", "", "70%", "1" * 5000, *NO_NUMBERS):
        for check in (check_capacity, check_exit_rate, partial(check_fraction, "lr", low=2, high=math.inf)):
            with pytest.raises(HatError, match="^.{,150}$"):
                check(wrong)


def test_count():
    assert check_count("steps", 1, 1) == 1 and type(check_count("steps", np.int64(5), 1, 5)) is int
    for wrong in (0, 6, 2.0, "3", *NO_NUMBERS):
        with pytest.raises(HatError, match="^steps.{,150}$"):
            check_count("steps", wrong, 1, 5)
    with pytest.raises(HatError, match="steps"):
        check_count("steps", 2**63, 1)


@given(st.integers(1, 200))
def test_scaled_exits_suit_their_depth(n_layers):
    exits = scaled_exits(n_layers)
    assert list(exits) == sorted(set(exits)) and all(1 <= e < n_layers for e in exits)
    assert len(exits) == 5 or n_layers < 12
    HatConfig(n_layers, exit_layers=exits)
    assert scaled_exits(PUBLISHED_DEPTH) == PUBLISHED_EXITS and scaled_exits(30) == (5, 11, 16, 22, 26)


def test_default_and_published_shapes(tiny_base):
    config = HatConfig.published(random_config("random:tinyllama"))
    assert config == HatConfig(22, "token", (4, 8, 12, 16, 19), 0.55, 0.0)
    config = HatConfig.default(tiny_base)
    assert config == HatConfig(4, "channel", (1, 2, 3), 0.75, 0.0) == HatConfig.default(tiny_base.model.config)
    assert HatConfig.default(tiny_base, capacity=0.6, exit_layers=()) == HatConfig(4, capacity=0.6)
    assert HatConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [("exit_layers", e) for e in ((0,), (4, 22), (4, 4, 8), (8, 4), (4.0,), (True,), "4", 4, None)]
    + [("capacity", 0.05), ("exit_rate", 2), ("n_layers", 0), ("translator_rank", -1), ("translator_rank", None)]
    + [("protected_tokens", 1.5), ("protected_tokens", 10**30), ("correction_rank", -1), ("correction_rank", False)],
)
def test_wrong_field(name, value):
    with pytest.raises(HatError, match=name.replace("_", ".")):
        HatConfig(**{"n_layers": 22, name: value})


def test_folders_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HAT_DATA", str(tmp_path))
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "mine"))
    assert data_folder() == tmp_path and cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("HAT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "hat_lib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "hat_lib"
    monkeypatch.setenv("HAT_CACHE", "cache")
    with pytest.raises(HatError, match="absolute path"):
        cache_dir()
