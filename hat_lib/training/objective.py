"""Objective: what one training step minimises, in each phase.

- ``routers``: KL(base || routed) on the same tokens, at a capacity sampled for this step; plus the budget and, for the
  token grain, the regularisers. Gates are off.
- ``exit``: routers are frozen and decide as in use. At each exit depth some tokens are translated and read by the
  base's norm and head: translators learn from the KL, gates from whether the exit's next token is the base's. The
  published method also penalises sampled decisions to leave where it is wrong, and too many or few of them.

No labels are used: a language-modelling loss would lower perplexity by learning the corpus, hiding what skipping costs.
All randomness is a function of (seed, step, sample): two processes, or a resumed run, do what one process does.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hat_lib.calibration.quantiles import SiteThresholds
from hat_lib.config import CAPACITY_MIN
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.forward import MaskedInput
from hat_lib.method.trace import Trace
from hat_lib.training import losses
from hat_lib.training.recipe import Recipe

ThresholdsAt = Callable[[float], SiteThresholds]  # score thresholds at a capacity

KNOTS, UNTIL = (0.4, 0.55, 0.7), 0.85  # capacities with offsets of their own, and from which on there are none


class BudgetSplit(nn.Module):
    """The split of a budget over layers and sites, learned: offsets of the log-scores, fp32 ``[K, L, S]``, 0 untrained.

    Calibration prices each site on its own, close to the dense model. Where half of the work is skipped the damage adds
    up differently, and another split of the same budget costs a third less KL (docs/experiments/learned-split.md).
    Between the K knots offsets follow a straight line, below the first they stay, and from `UNTIL` on they are 0,
    because there the prices are right. After training they are part of the table of thresholds.
    """

    def __init__(self, n_layers: int, sites: tuple[str, ...]):
        super().__init__()
        self.sites = sites
        self.offsets = nn.Parameter(torch.zeros(len(KNOTS), n_layers, len(sites)))

    def at(self, capacity: float) -> Tensor:
        """Offsets at a capacity, ``[L, S]``, differentiable."""
        weights = [np.interp(capacity, (*KNOTS, UNTIL), row) for row in np.eye(len(KNOTS) + 1)[:-1]]
        return (self.offsets * self.offsets.new_tensor(weights)[:, None, None]).sum(0)

    def on(self, nominal: ThresholdsAt) -> ThresholdsAt:
        """The thresholds ``nominal``, moved by the offsets as they are when asked."""

        @torch.no_grad()
        def moved(capacity: float) -> SiteThresholds:
            thresholds = dict(nominal(capacity))
            for layer, factors in enumerate(self.at(capacity).neg().exp().tolist()):
                for site, factor in zip(self.sites, factors, strict=True):
                    thresholds[layer, site] *= factor
            return thresholds

        return moved


def nominal_thresholds(hat: HierarchicalTransformer) -> ThresholdsAt:
    """The thresholds that training of the routers starts from, before any calibration of what they learn.

    Magnitudes: those of the untrained calibration, which the learned scales and split then shift. Logits:
    ``log((1-c)/c)`` everywhere; with logistic noise a score of 0 is kept with probability c.
    """
    if not hat.grain.logits:
        start = hat.calibration
        return lambda capacity: start.thresholds_at(max(capacity, CAPACITY_MIN))
    keys = [(i, site) for i in range(hat.config.n_layers) for site in hat.grain.sites]
    return lambda capacity: dict.fromkeys(keys, float(np.log(max(1 - capacity, 1e-4) / capacity)))


class Relaxed:
    """The training policy: hard decisions with a soft gradient, at score thresholds by (layer, site).

    ``keys`` seed the noise, one tuple of integers per sequence. ``offsets [L, S]``, channel grain, are added to the
    log-scores of a site.
    """

    def __init__(self, hat: HierarchicalTransformer, thresholds: SiteThresholds, keys, recipe: Recipe, offsets):
        self.hat, self.thresholds, self.keys, self.recipe, self.offsets = hat, thresholds, keys, recipe, offsets
        grain, layers = hat.grain, range(hat.config.n_layers)
        self.work = {site: work / len(layers) for site, work in zip(grain.sites, hat.site_work, strict=True)}
        always = sum(self.work[s] for i in layers for s in grain.sites if grain.always_runs(i, s))
        self.shares: list[Tensor | float] = [always]
        """what each site kept over real tokens, as a share of all routable work, differentiable"""
        self.scores: list[Tensor] = []
        """token grain: the routers' scores ``[B*T]``, one tensor per layer"""

    def __call__(self, layer: int, site: str, x: Tensor, rows: Tensor | None, trace: Trace):
        grain, routers, recipe, threshold = self.hat.grain, self.hat.routers, self.recipe, self.thresholds[layer, site]
        number = grain.sites.index(site)
        real, protected = (tokens.view(-1).to(x.device) for tokens in (trace.real, trace.protected))
        offset = 0.0 if self.offsets is None else self.offsets[layer, number].to(x.device)
        if grain.scales_thresholds and not recipe.noise:
            router = routers[f"{layer}_{site}"]
            log_scale = router.log_scale + offset
            thresholds = (threshold / (router.column_norm * log_scale.exp())).detach() * trace.threshold_scale
            how = {"temperature": recipe.temperature, "protected": protected, "real": real}
            masked, keep, share = losses.masked_channels(x, log_scale, thresholds, **how)
            self.shares.append(share * self.work[site])
            return MaskedInput(masked, keep)
        score = grain.score(routers, layer, site, x, trace)
        if grain.logits:
            self.scores.append(score)
            logit = score - threshold
        else:
            logit = score.clamp(min=1e-12).log() + offset - np.log(max(threshold, 1e-12))
            protected = protected[:, None]
        draw = partial(losses.straight_through, temperature=recipe.temperature, noise=recipe.noise)
        keys = [(*key, layer * len(grain.sites) + number) for key in self.keys]
        keep = torch.where(protected, 1.0, _by_sequence(draw, logit.chunk(len(keys)), keys))
        self.shares.append(keep[real].mean() * self.work[site])
        return keep


class Objective(nn.Module):
    """``forward(input_ids, attention_mask, index, step, steps) -> {"loss": ..., metrics}``.

    Args:
        hat: the model; from here on, only the phase's own parameters require a gradient. Routers of the channel grain
            train with the split of their budget, ``split``, unless the recipe's ``split_lr`` is 0.
        phase: "routers" or "exit".
        thresholds: nominal ones in "routers", those in use in "exit".
    """

    def __init__(self, hat: HierarchicalTransformer, recipe: Recipe, phase: str, thresholds: ThresholdsAt):
        super().__init__()
        self.hat, self.recipe, self.phase, self.nominal = hat, recipe, phase, thresholds
        learned = phase == "routers" and not hat.grain.logits and recipe.split_lr > 0
        self.split = BudgetSplit(hat.config.n_layers, hat.grain.sites).to(hat.base.device) if learned else None
        for name, router in hat.routers.items():
            router.requires_grad_(phase == "routers" and not name.endswith("_token"))
        hat.corrections.requires_grad_(phase == "routers")
        hat.gates.requires_grad_(phase == "exit")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, index: Tensor, step: int, steps: int) -> dict:
        """Losses and metrics of one micro-batch, as made by `collate`, in one of ``steps`` optimizer steps."""
        capacity = self.recipe.sampled_capacity(step, steps)
        keys = [(self.recipe.seed, step, int(i)) for i in index]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        with self.hat.dense():
            with torch.no_grad():
                teacher = self._hidden(batch).last_hidden_state
            run = self._routers if self.phase == "routers" else self._exits
            loss, metrics = run(batch, teacher, capacity, keys, step, steps)
        return {"loss": loss, "capacity": capacity} | {name: value.detach() for name, value in metrics.items()}

    @property
    def thresholds(self) -> ThresholdsAt:
        """Those given, moved by the learned split."""
        return self.split.on(self.nominal) if self.split else self.nominal

    def _hidden(self, batch: dict, **kwargs):
        return self.hat.lm.model(**batch, use_cache=False, **kwargs)

    def _routers(self, batch, teacher, capacity, keys, step, steps) -> tuple[Tensor, dict]:
        hat, recipe, head, thresholds = self.hat, self.recipe, self.hat.lm.lm_head, self.nominal(capacity)
        policy = Relaxed(hat, thresholds, keys, recipe, self.split and self.split.at(capacity))
        how = {"compact": False, "sensitivity": thresholds.get((0, "token"), 1.0)}
        how |= {"correction": hat.correction_strength(capacity), "decide": policy}
        with hat.changed(**how), self._without(self._dropped(keys, step, steps)):
            student = self._hidden(batch).last_hidden_state
        # One sequence at a time: the logits of a whole batch would be the largest tensors of the step.
        kl, real = 0.0, batch["attention_mask"].bool()
        for b in range(len(real)):
            logits = head(teacher[b][real[b]]), head(student[b][real[b]])
            kl = kl + losses.mean(losses.divergence(*logits)) * real[b].sum()
        kl, kept = kl / real.sum(), sum(torch.as_tensor(share, device=teacher.device) for share in policy.shares)
        table = hat.calibration
        share = capacity if table is None else table.layer_capacity_at(capacity, hat.site_work)
        # Of the mean share over all layers and tokens, so that each is free to find its own.
        loss = kl + recipe.budget_weight * (kept - share).abs()
        out = {"kl": kl, "share": kept}
        if policy.scores:
            scores = torch.stack(policy.scores)[:, real.view(-1)]
            out |= {"z_loss": losses.z_loss(scores), "entropy": losses.entropy(scores)}
            loss = loss + recipe.z_weight * out["z_loss"] + recipe.entropy_weight * out["entropy"]
        # Mean share of each layer and site over real tokens, fp32 [L, S].
        site_share = hat.trace.site_share.flatten(2).sum(-1) / hat.trace.real.sum()
        return loss, out | {"site_share": site_share}

    def _dropped(self, keys, step: int, steps: int) -> Tensor:
        """Which layers a sequence goes without, bool ``[L, B]``."""
        chance = self.recipe.layer_dropout_at(step, steps, self.hat.config.n_layers)
        drawn = np.stack([np.random.default_rng([*key, 2]).random(len(chance)) for key in keys], 1)
        return torch.from_numpy(drawn < chance[:, None])

    def _without(self, dropped: Tensor) -> ExitStack:
        """Context: a layer gives back its input for each sequence that goes without it."""

        def undo(sequences: Tensor, layer: nn.Module, args: tuple, out: Tensor) -> Tensor:
            return torch.where(sequences[:, None, None].to(out.device), args[0].to(out.device), out)

        hooks = ExitStack()
        for layer, sequences in zip(self.hat.lm.model.layers, dropped, strict=True):
            if sequences.any():
                hooks.enter_context(layer.register_forward_hook(partial(undo, sequences)))
        return hooks

    def _exits(self, batch, teacher, capacity, keys, step, steps) -> tuple[Tensor, dict]:
        hat, recipe, head, norm = self.hat, self.recipe, self.hat.lm.lm_head, self.hat.lm.model.norm
        policy = hat.threshold_policy(self.nominal(capacity) if capacity < 1 else {})
        with torch.no_grad(), hat.using(policy), hat.correcting(hat.correction_strength(capacity)):
            hidden = self._hidden(batch, output_hidden_states=True)
        rows, columns = _sample(batch["attention_mask"].bool() & ~hat.trace.protected, recipe.exit_tokens, keys)
        counts = torch.bincount(rows, minlength=len(keys)).tolist()
        base = head(teacher[rows, columns])
        wrong_stay = base.argmax(-1) != head(hidden.last_hidden_state[rows, columns]).argmax(-1)
        temperatures = {f"{p}_temperature": getattr(recipe, f"gate_{p}_temperature") for p in ("forward", "backward")}
        draw = partial(losses.decoupled_gumbel_softmax, **temperatures)

        stay = torch.ones(len(rows), device=rows.device)
        cost, left, agreed = torch.zeros_like(stay), torch.zeros_like(stay), []
        translate = gate_loss = stay.new_zeros(())
        for number, (depth, gate) in enumerate(hat.gates.items()):
            h = hidden.hidden_states[int(depth)][rows, columns]
            logits, decisions = head(norm(gate.translate(h))), gate.logits(h)
            translate = translate + losses.mean(losses.divergence(base, logits)) / len(hat.gates)
            right = base.argmax(-1) == logits.argmax(-1)
            agreed.append(losses.mean(right.float()))
            gate_loss = gate_loss + losses.exit_loss(decisions, right) / len(hat.gates)
            leave = _by_sequence(draw, decisions.split(counts), [(*key, 3, number) for key in keys])[:, 1]
            # A token that leaves here, not having left before, pays if this exit is wrong.
            cost, left, stay = cost + stay * leave * ~right, left + stay * leave, stay * (1 - leave)
        wrong, rate = losses.mean(cost + stay * wrong_stay), losses.mean(left)
        pull = (rate - (recipe.sampled_exit_rate(step) if len(rows) else 0.0)).abs()
        loss = translate + gate_loss + recipe.decision_weight * (wrong + recipe.budget_weight * pull)
        parts = {"kl": translate, "gate_loss": gate_loss, "wrong": wrong, "exit_rate": rate}
        return loss, parts | {"agreement": torch.stack(agreed).mean()}


def _by_sequence(draw: Callable, parts: Sequence[Tensor], keys: list[tuple]) -> Tensor:
    """Draws for the rows of each sequence, by its own key: a batch's other sequences do not change its noise."""
    drawn = [draw(part, generator=losses.seeded(part.device, *key)) for part, key in zip(parts, keys, strict=True)]
    return torch.cat(drawn)


def _sample(candidates: Tensor, count: int, keys) -> tuple[Tensor, Tensor]:
    """Up to ``count`` true positions of each row of bool ``[B, T]``, drawn with the row's own key: (rows, columns)."""
    rows, columns = [], []
    for b, key in enumerate(keys):
        free = candidates[b].nonzero().view(-1)
        order = torch.randperm(len(free), generator=losses.seeded("cpu", *key, 4))[:count].to(free.device)
        columns.append(free[order])
        rows.append(torch.full_like(order, b))
    return torch.cat(rows), torch.cat(columns)
