"""Which tokens are sensitive to skipping: the token routers of the channel grain, measured and not trained.

Dropping the same share of channels costs some tokens several times as much as others. A backward pass measures how
much (`backward`), and the state that enters a layer predicts it, by a log-linear model of the price, ``eta = w.x + b``.
Notebook 07 shows how well it predicts on text of another kind.

If all channels of all tokens are to be dropped at the same marginal price, ``1/2 t^2 e^eta`` for one at the threshold
t, thresholds scale as ``exp(-eta / 2)``. So the sensitivity, which divides a token's thresholds by ``exp(u)``, is
``u = eta / 2``.

Prices are measured where `SHARE` of the channels is kept. At 0.62 of the layers' work they lower the KL from the base,
by an eighth; at 0.40 they would raise it (``data/results/ablations.csv``). So `sensitivity_strength` falls in between.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.hat import HierarchicalTransformer

TOKENS = 24_576  # at most so many in the backward pass: their inputs are kept, in half precision, for every layer
SHARE = 0.75  # kept share at which tokens are priced
NONE, ALL = 0.4, 0.62  # budgets at and below which token sensitivity does not act, and from which on it acts in full
NEIGHBOURS = 2  # layers either side over which prices are averaged: one token's price in one layer is mostly noise
PRICE_LIMIT = 30.0  # prices are clipped to this many times the mean
PRIOR = 0.4  # expected deviation of eta; a tighter one than turns out does better on text of another kind


def sensitivity_strength(budget: float) -> float:
    """From 0 to 1, what multiplies token sensitivity at a budget."""
    return min(max((budget - NONE) / (ALL - NONE), 0.0), 1.0)


def fit_token_sensitivity(
    hat: HierarchicalTransformer, blocks: list[Tensor], thresholds: dict, seed: int, progress: bool = True
) -> None:
    """Set the weights of ``hat``'s token routers; arguments as in `token_prices`, thresholds that keep `SHARE`."""
    prices, inputs = token_prices(hat, blocks, thresholds, seed, progress)
    prices = prices / prices.mean(1, keepdim=True).clamp(min=1e-12)
    for layer in tqdm(range(len(prices)), desc="token sensitivity", disable=not progress):
        near = prices[max(0, layer - NEIGHBOURS) : layer + NEIGHBOURS + 1].mean(0).clamp(max=PRICE_LIMIT)
        if not near.any():  # nothing that is dropped here matters
            continue
        weight, bias = log_linear(inputs[layer].float(), near)
        with torch.no_grad():
            hat.routers[f"{layer}_token"].weight.copy_(weight / 2)
            hat.routers[f"{layer}_token"].bias.copy_(bias / 2)


def token_prices(
    hat: HierarchicalTransformer, blocks: list[Tensor], thresholds: dict, seed: int = 0, progress: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """What it would cost each token to drop its channels, in one layer at a time.

    ``blocks`` are int64 ``[1, T]`` each; ``thresholds``, by (layer, site), are those at or below whose scores channels
    are dropped; ``seed`` is for the targets drawn from the base. Returns the prices in nats of KL divergence, fp32
    ``[L, n]``, and what predicts them, the inputs of q|k|v: L of ``[n, D]`` in half precision. n counts the tokens that
    are not protected.
    """
    sites, layers = hat.grain.sites, range(hat.config.n_layers)
    prices, inputs = {(i, site): [] for i in layers for site in sites}, [[] for _ in layers]

    def price(layer: int, site: str, x: Tensor, score: Tensor, effect: Tensor) -> None:
        if site == "qkv":
            inputs[layer].append(x.half())
        prices[layer, site].append((effect * (score <= thresholds[layer, site])).sum(-1).square() / 2)

    backward(hat, blocks, price, seed=seed, progress=progress, label="prices of tokens")
    of_layers = [sum(torch.cat(prices[i, site]) for site in reversed(sites)) for i in layers]
    return torch.stack(of_layers), [torch.cat(rows) for rows in inputs]


@torch.enable_grad()
def log_linear(x: Tensor, y: Tensor, steps: int = 60) -> tuple[Tensor, Tensor]:
    """``w`` and ``b`` of ``log E[y | x] = w.x + b``, for exponentially distributed y.

    The most probable ones under a normal prior that gives ``w.x`` the standard deviation `PRIOR` (McCullagh and Nelder
    1989, chapter 8), by L-BFGS. ``x`` is fp32 ``[n, D]``, ``y`` fp32 ``[n]``, at least 0, not all 0.
    """
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    columns = (x - mean) / spread
    weight = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
    bias = y.mean().log().detach().clone().requires_grad_()
    prior = x.shape[1] / (2 * len(x) * PRIOR**2)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        eta = columns @ weight + bias
        value = (eta + y * (-eta).exp()).mean() + prior * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = (weight / spread).detach()
    return weight, bias.detach() - mean @ weight


def backward(
    hat: HierarchicalTransformer, blocks: Iterable[Tensor], price: Callable, *, seed: int, progress: bool, label: str
) -> int:
    """Price activations by dense passes over ``blocks`` (``[1, T]`` each), forward, and back from targets that the base
    draws itself; returns the number of tokens.

    If y is drawn from the base, the KL divergence between the base and a base whose activation a is changed by a small
    d is, to second order, ``1/2 E[(grad_a log p(y) . d)^2]``: the Fisher quadratic form. So one gradient prices every
    change to every activation, and prices of small changes add up.

    ``price(layer, site, x, score, effect)`` is called for each block and site, with the rows that are not protected:
    the router's inputs ``[n, C]``; their scores, and ``-grad_a . d`` of dropping each unit, shaped like a decision.
    """

    @torch.no_grad()
    def see(layer: int, site: str, x: Tensor, activation: Tensor) -> None:
        # Not the activation itself: that would keep the graph of every block alive.
        x, value = x.detach().flatten(0, -2), activation.detach().flatten(0, -2)
        free, score = ~hat.trace.protected.view(-1), hat.scores(layer, site, x)

        def use(gradient: Tensor) -> None:
            effect = (value * gradient.flatten(0, -2)).float().view(*score.shape, -1).sum(-1)
            price(layer, site, x[free], score[free], effect[free])

        activation.register_hook(use)

    generator, tokens = torch.Generator(hat.base.device).manual_seed(seed), 0
    with hat.dense(), hat.watching(see):
        for block in tqdm(blocks, desc=label, disable=not progress):
            with torch.enable_grad():
                embedded = hat.lm.get_input_embeddings()(block).detach().requires_grad_()
                logits = hat.lm(inputs_embeds=embedded, use_cache=False).logits[0].float()
                target = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, target, reduction="sum").backward()
            tokens += block.shape[1]
    return tokens
