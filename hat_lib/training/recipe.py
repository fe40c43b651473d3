"""Recipe: everything a training run is made of, except the model and the text's tokens. Ours, one per grain, are as
measured (docs/experiments). Each has two profiles: ``quick`` (two CPU cores, a few minutes) and ``full`` (as for the
reference checkpoints)."""

import math
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from hat_lib import config
from hat_lib.config import CAPACITY_MAX, CAPACITY_MIN, HatError

PHASES = ("routers", "exit", "full")
RECIPES = ("default", "published")
# A strong pull towards the budget, large steps, no layer dropout, gates trained on targets alone.
TOKEN = {
    "tokens": 65_536, "router_epochs": 4, "router_lr": 2e-2, "exit_lr": 2e-3, "capacity": 0.7, "spread": 0.3,
    "anneal": 0.0, "budget_weight": 10.0, "decision_weight": 0.0, "layer_dropout": 0.0,
}  # fmt: skip
# No noise, no regularisers, gates trained on targets alone; capacities low enough that corrections matter.
CHANNEL = {
    "text": "addresses+openings", "tokens": 196_608, "batch_size": 2, "router_epochs": 2.6, "router_lr": 3e-3,
    "correction_lr": 1.5e-3, "split_lr": 1e-2, "exit_epochs": 0.65, "exit_lr": 2e-3, "capacity": 0.55, "spread": 0.2,
    "anneal": 0.0, "temperature": 0.5, "noise": 0.0, "z_weight": 0.0, "entropy_weight": 0.0, "decision_weight": 0.0,
    "layer_dropout": 0.0,
}  # fmt: skip
PROFILES = {
    "quick": {
        "text": "addresses", "tokens": 10_000, "block_size": 128, "router_epochs": 1, "exit_epochs": 1,
        "exit_tokens": 32, "log_steps": 1, "save_steps": 20,
    },
    "full": {},
}  # fmt: skip

LEAST = {"tokens": 2, "block_size": 2, "validation_tokens": 2, "seed": 0}
SHARES = ("anneal", "warmup", "layer_dropout")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of both phases; the defaults are the published method's."""

    text: str = "addresses+self"  #: sources of `hat_lib.text.mixture`, joined by +, which share the tokens evenly
    tokens: int = 131_072  #: per epoch
    block_size: int = 512
    validation: str = ""  #: its validation split gives a learning curve (`hat_lib.training.log`); none by default
    validation_tokens: int = 2048
    batch_size: int = 4  #: sequences per micro-batch and process
    accumulate: int = 1  #: micro-batches per step; two processes with 1 equal one process with 2
    router_epochs: float = 3
    router_lr: float = 1e-3
    correction_lr: float = 1e-3
    split_lr: float = 0.0  #: of the budget's split (channel grain), trained with the routers; 0 leaves it as calibrated
    exit_epochs: float = 2
    exit_lr: float = 5e-4
    capacity: float = 0.55  #: where the schedule of sampled capacities ends; it starts at 1.0
    anneal: float = 0.3  #: share of the steps that the schedule takes to get there
    spread: float = 0.2  #: capacities are drawn uniformly, up to this far either side of the schedule, within 0.1-1.0
    temperature: float = 1.0  #: of a decision's soft gradient, in units of the router's score (channel: log-score)
    noise: float = 1.0  #: scale of the logistic noise on a router's score; 0 decides as in use
    budget_weight: float = 1.0
    z_weight: float = 1e-3
    entropy_weight: float = 1e-2
    gate_forward_temperature: float = 1.0
    gate_backward_temperature: float = 2.0
    decision_weight: float = 1.0  #: of wrong sampled exits, and of their distance from a sampled rate; 0: targets alone
    exit_rate: float = 0.3  #: highest exit rate that the gates are trained for; sampled per step from 0 up to it
    exit_tokens: int = 64  #: tokens per sequence, drawn at random, at which exits are compared with the base
    layer_dropout: float = 0.1  #: highest chance that a layer is dropped for a sequence: of the last layer, at the end
    max_grad_norm: float = 1.0
    warmup: float = 0.05  #: share of the steps over which the learning rate rises; it then falls along a cosine
    seed: int = 0
    log_steps: int = 5
    save_steps: int = 50

    def __post_init__(self):
        object.__setattr__(self, "capacity", config.check_capacity(self.capacity))
        object.__setattr__(self, "exit_rate", config.check_exit_rate(self.exit_rate))
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is str and not isinstance(value, str):
                raise HatError(f"{name} must be the name of a text, got {value!r}")
            if field.type is int:
                config.check_count(name, value, LEAST.get(name, 1))
            if field.type is float:
                low = 1e-9 if name.endswith(("_epochs", "temperature", "_norm")) else 0.0
                config.check_fraction(name, value, low, 1.0 if name in SHARES else math.inf)

    @classmethod
    def named(cls, name: str, granularity: str, profile: str = "full", **changes) -> Self:
        """``default`` is ours for the grain; ``published`` is for the token grain only."""
        if name not in RECIPES:
            raise HatError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
        if name == "published" and granularity != "token":
            raise HatError("the published recipe trains the token grain: add --granularity token")
        if profile not in PROFILES:
            raise HatError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(changes) - set(known)):
            raise HatError(f"a recipe has no {unknown[0]!r}; it has {', '.join(known)}")
        ours = TOKEN if granularity == "token" else CHANNEL
        return cls(**({} if name == "published" else ours) | PROFILES[profile] | changes)

    @classmethod
    def published(cls, profile: str = "full", **changes) -> Self:
        """The published method's hyperparameters, for the token grain."""
        return cls.named("published", "token", profile, **changes)

    @classmethod
    def token(cls, profile: str = "full", **changes) -> Self:
        """Our recipe for the token grain."""
        return cls.named("default", "token", profile, **changes)

    @classmethod
    def channel(cls, profile: str = "full", **changes) -> Self:
        """Our recipe for the channel grain."""
        return cls.named("default", "channel", profile, **changes)

    def sampled_capacity(self, step: int, steps: int) -> float:
        """The capacity of one step; it depends on (seed, step) alone, so all processes and a resumed run agree."""
        at = 1.0 if self.anneal == 0 else min(1.0, step / max(1, self.anneal * steps))
        middle = CAPACITY_MAX + (self.capacity - CAPACITY_MAX) * at
        drawn = np.random.default_rng([self.seed, step]).uniform(-self.spread, self.spread)
        return float(np.clip(middle + drawn, CAPACITY_MIN, CAPACITY_MAX))

    def sampled_exit_rate(self, step: int) -> float:
        return float(np.random.default_rng([self.seed, step, 1]).uniform(0, self.exit_rate))

    def layer_dropout_at(self, step: int, steps: int, n_layers: int) -> np.ndarray:
        """Probability that each layer is dropped, ``[L]``: ``p (exp(l ln2 / (L-1)) - 1) step/steps``, the progressive
        dropout of LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710, section 4.1), linear in time."""
        depth = np.arange(n_layers) / max(1, n_layers - 1)
        return self.layer_dropout * np.expm1(depth * np.log(2)) * (step / max(1, steps))
