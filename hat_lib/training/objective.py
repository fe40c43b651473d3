"""Objective: what one training step minimises, in each phase.

routers   KL(base || routed) on the same tokens, at a capacity sampled for this step; plus the budget and, for the token
          grain, the regularisers. Gates are off.
exit      routers are frozen and decide as in use. At each exit depth some tokens are translated and read by the base's
          norm and head: translators learn from the KL, gates from whether the exit's next token is the base's. The
          published method also samples whole decisions and penalises those that let a token leave where it is wrong,
          and the distance from a budget of exits.

No labels are used: a language-modelling loss would lower perplexity by learning the corpus, hiding what skipping costs.
All randomness is a function of (seed, step, sample): two processes, or a resumed run, do what one process does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hat_lib.config import CAPACITY_MIN
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.forward import MaskedInput
from hat_lib.method.trace import Trace
from hat_lib.training import losses
from hat_lib.training.recipe import Recipe

Thresholds = Callable[[float], dict[tuple[int, str], float]]
"""capacity -> score thresholds by (layer, site)"""

# Capacities at which the split of the budget has offsets of its own, and from which on it has none.
KNOTS, UNTIL = (0.4, 0.55, 0.7), 0.85


class BudgetSplit(nn.Module):
    """The split of a budget over layers and sites, learned: offsets of the log-scores, fp32 ``[K, L, S]``, 0 untrained.

    Calibration prices each site on its own, close to the dense model. Where half of the work is skipped the damage adds
    up differently, and another split of the same budget costs a third less KL (docs/experiments/learned-split.md). The
    K knots are capacities; between them offsets follow a straight line, below the first they stay, and from `UNTIL` on
    they are 0, because there the prices are right. After training they are part of the table of thresholds.
    """

    def __init__(self, n_layers: int, sites: tuple[str, ...]):
        super().__init__()
        self.sites = tuple(sites)
        self.offsets = nn.Parameter(torch.zeros(len(KNOTS), n_layers, len(sites)))

    def at(self, capacity: float) -> Tensor:
        """Offsets at a capacity, ``[L, S]``, differentiable."""
        weights = [np.interp(capacity, (*KNOTS, UNTIL), row) for row in np.eye(len(KNOTS) + 1)[:-1]]
        return (self.offsets * self.offsets.new_tensor(weights)[:, None, None]).sum(0)

    def on(self, nominal: Thresholds) -> Thresholds:
        """The thresholds ``nominal``, moved by the offsets as they are when asked."""

        @torch.no_grad()
        def moved(capacity: float) -> dict[tuple[int, str], float]:
            factors = self.at(capacity).neg().exp().tolist()
            by = {(i, s): f for i, row in enumerate(factors) for s, f in zip(self.sites, row, strict=True)}
            return {key: threshold * by.get(key, 1.0) for key, threshold in nominal(capacity).items()}

        return moved


def nominal_thresholds(hat: HierarchicalTransformer) -> Thresholds:
    """Capacity -> the thresholds that training of the routers starts from, before any calibration of what they learn.

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
    log-scores of a site. Adds up the share of the work that was kept.
    """

    def __init__(self, hat: HierarchicalTransformer, thresholds: dict, keys: list[tuple], recipe: Recipe, offsets):
        self.hat, self.thresholds, self.keys, self.offsets = hat, thresholds, keys, offsets
        self.temperature, self.noise = recipe.temperature, recipe.noise
        grain, layers = hat.grain, range(hat.config.n_layers)
        self.work = {site: work / len(layers) for site, work in zip(grain.sites, hat.site_work, strict=True)}
        always = sum(self.work[s] for i in layers for s in grain.sites if grain.always_runs(i, s))
        self.share: Tensor = torch.tensor(always, device=hat.base.device)
        """mean share of the routable work kept over real tokens, differentiable once the forward is done"""
        self.scores: list[Tensor] = []
        """token grain: the routers' scores ``[B*T]``, one tensor per layer"""

    def __call__(self, layer: int, site: str, x: Tensor, rows: Tensor | None, state: Trace):
        grain, routers, threshold = self.hat.grain, self.hat.routers, self.thresholds[layer, site]
        if site == grain.sites[0]:
            grain.prepare(routers, layer, x.detach(), state, self.thresholds.get((layer, "token"), 1.0))
        number = grain.sites.index(site)
        real, protected = (tokens.view(-1).to(x.device) for tokens in (state.real, state.protected))
        offset = 0.0 if self.offsets is None else self.offsets[layer, number].to(x.device)
        if grain.scales_thresholds and not self.noise:
            router = routers[f"{layer}_{site}"]
            log_scale = router.log_scale + offset
            thresholds = (threshold / (router.column_norm * log_scale.exp())).detach() * state.threshold_scale
            how = {"temperature": self.temperature, "protected": protected, "real": real}
            masked, keep, share = losses.masked_channels(x, log_scale, thresholds, **how)
            self._add(site, share)
            return MaskedInput(masked, keep)
        score = grain.score(routers, layer, site, x, state)
        if grain.logits:
            self.scores.append(score)
            logit = score - threshold
        else:
            logit = score.clamp(min=1e-12).log() + offset - np.log(max(threshold, 1e-12))
            protected = protected[:, None]
        # Drawn sequence by sequence, so that a sequence's batch neighbours do not change its noise.
        how, number = {"temperature": self.temperature, "noise": self.noise}, layer * len(grain.sites) + number
        drawn = [
            losses.straight_through(part, generator=losses.seeded(x.device, *key, number), **how)
            for part, key in zip(logit.chunk(len(self.keys)), self.keys, strict=True)
        ]
        keep = torch.where(protected, 1.0, torch.cat(drawn))
        self._add(site, keep[real].mean())
        return keep

    def _add(self, site: str, share: Tensor) -> None:
        self.share = self.share + share.to(self.share.device) * self.work[site]


class Objective(nn.Module):
    """``forward(input_ids, attention_mask, index, step, steps) -> {"loss": ..., metrics}``.

    Args:
        hat: the model; from here on, only the phase's own parameters require a gradient. Routers of the channel grain
            train with the split of their budget, ``split``, unless the recipe's ``split_lr`` is 0.
        phase: "routers" or "exit".
        thresholds: capacity -> score thresholds: nominal ones in "routers", those in use in "exit".
    """

    def __init__(self, hat: HierarchicalTransformer, recipe: Recipe, phase: str, thresholds: Thresholds):
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
            return {"capacity": capacity} | run(batch, teacher, capacity, keys, step, steps)

    @property
    def thresholds(self) -> Thresholds:
        """Those given, moved by the learned split."""
        return self.split.on(self.nominal) if self.split else self.nominal

    def _hidden(self, batch: dict, **kwargs):
        return self.hat.lm.model(**batch, use_cache=False, **kwargs)

    def _routers(self, batch, teacher, capacity, keys, step, steps) -> dict:
        hat, recipe, head = self.hat, self.recipe, self.hat.lm.lm_head
        policy = Relaxed(hat, self.nominal(capacity), keys, recipe, self.split and self.split.at(capacity))
        strength, dropped = hat.correction_strength(capacity), self._dropped(keys, step, steps)
        with hat.changed(compact=False), hat.using(policy), hat.correcting(strength), self._without(dropped):
            student = self._hidden(batch).last_hidden_state
        # One sequence at a time: the logits of a whole batch would be the largest tensors of the step.
        kl, real = 0.0, batch["attention_mask"].bool()
        for b in range(len(real)):
            logits = head(teacher[b][real[b]]), head(student[b][real[b]])
            kl = kl + losses.mean(losses.divergence(*logits)) * real[b].sum()
        kl = kl / real.sum()
        table = hat.calibration
        share = capacity if table is None else table.layer_capacity_at(capacity, hat.site_work)
        # Of the mean share over all layers and tokens, so that each is free to find its own.
        loss = kl + recipe.budget_weight * (policy.share - share).abs()
        out = {"kl": kl.detach(), "share": policy.share.detach()}
        if policy.scores:
            scores = torch.stack(policy.scores)[:, real.view(-1)]
            z, entropy = losses.z_loss(scores), losses.entropy(scores)
            loss = loss + recipe.z_weight * z + recipe.entropy_weight * entropy
            out |= {"z_loss": z.detach(), "entropy": entropy.detach()}
        # Mean share of each layer and site over real tokens, fp32 [L, S].
        site_share = hat.trace.site_share.flatten(2).sum(-1) / hat.trace.real.sum()
        return {"loss": loss, **out, "site_share": site_share}

    def _dropped(self, keys, step: int, steps: int) -> Tensor:
        """Which layers a sequence goes without, bool ``[L, B]``."""
        chance = self.recipe.layer_dropout_at(step, steps, self.hat.config.n_layers)
        drawn = np.stack([np.random.default_rng([*key, 2]).random(len(chance)) for key in keys], 1)
        return torch.from_numpy(drawn < chance[:, None])

    @contextmanager
    def _without(self, dropped: Tensor) -> Iterator[None]:
        """Context: a layer gives back its input for each sequence that goes without it."""

        def undo(sequences: Tensor, layer: nn.Module, args: tuple, out: Tensor) -> Tensor:
            return torch.where(sequences[:, None, None].to(out.device), args[0].to(out.device), out)

        layers = zip(self.hat.lm.model.layers, dropped, strict=True)
        hooks = [layer.register_forward_hook(partial(undo, of_layer)) for layer, of_layer in layers if of_layer.any()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _exits(self, batch, teacher, capacity, keys, step, steps) -> dict:
        hat, recipe, head, norm = self.hat, self.recipe, self.hat.lm.lm_head, self.hat.lm.model.norm
        policy = hat.threshold_policy(self.nominal(capacity) if capacity < 1 else {})
        with torch.no_grad(), hat.using(policy), hat.correcting(hat.correction_strength(capacity)):
            hidden = self._hidden(batch, output_hidden_states=True)
        candidates = batch["attention_mask"].bool() & ~hat.trace.protected
        rows, columns = _sample(candidates, recipe.exit_tokens, keys)
        counts = torch.bincount(rows, minlength=len(keys)).tolist()
        base = head(teacher[rows, columns])
        wrong_stay = base.argmax(-1) != head(hidden.last_hidden_state[rows, columns]).argmax(-1)

        stay = torch.ones(len(rows), device=rows.device)
        cost, left, agreed = torch.zeros_like(stay), torch.zeros_like(stay), []
        translate = gate_loss = stay.new_zeros(())
        for number, (depth, gate) in enumerate(hat.gates.items()):
            h = hidden.hidden_states[int(depth)][rows, columns]
            logits = head(norm(gate.translate(h)))
            translate = translate + losses.mean(losses.divergence(base, logits)) / len(hat.gates)
            right = base.argmax(-1) == logits.argmax(-1)
            agreed.append(losses.mean(right.float()))
            decisions = gate.logits(h)
            gate_loss = gate_loss + losses.exit_loss(decisions, right) / len(hat.gates)
            drawn = [
                losses.decoupled_gumbel_softmax(
                    part,
                    forward_temperature=recipe.gate_forward_temperature,
                    backward_temperature=recipe.gate_backward_temperature,
                    generator=losses.seeded(rows.device, *key, 3, number),
                )
                for part, key in zip(decisions.split(counts), keys, strict=True)
            ]
            leave = torch.cat(drawn)[:, 1]
            # A token that leaves here, not having left before, pays if this exit is wrong.
            cost, left, stay = cost + stay * leave * ~right, left + stay * leave, stay * (1 - leave)
        wrong, rate = losses.mean(cost + stay * wrong_stay), losses.mean(left)
        pull = (rate - (recipe.sampled_exit_rate(step) if len(rows) else 0.0)).abs()
        loss = translate + gate_loss + recipe.decision_weight * (wrong + recipe.budget_weight * pull)
        return {
            "loss": loss, "kl": translate.detach(), "gate_loss": gate_loss.detach(), "wrong": wrong.detach(),
            "exit_rate": rate.detach(), "agreement": torch.stack(agreed).mean(),
        }  # fmt: skip


def _sample(candidates: Tensor, count: int, keys) -> tuple[Tensor, Tensor]:
    """Up to ``count`` true positions of each row of bool ``[B, T]``, drawn with the row's own key: (rows, columns)."""
    rows, columns = [], []
    for b, key in enumerate(keys):
        free = candidates[b].nonzero().view(-1)
        order = torch.randperm(len(free), generator=losses.seeded("cpu", *key, 4))[:count].to(free.device)
        columns.append(free[order])
        rows.append(torch.full_like(order, b))
    return torch.cat(rows), torch.cat(columns)
