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

# At most this many tokens in the backward pass: their inputs are kept, in half precision, for every layer.
TOKENS = 24_576
# Kept share at which tokens are priced.
SHARE = 0.75
# Budgets at and below which token sensitivity does not act, and from which on it acts in full.
NONE, ALL = 0.4, 0.62
# Prices are averaged over neighbouring layers: one token's price in one layer is mostly noise.
NEIGHBOURS = 2
# Prices are clipped to this many times the mean.
PRICE_LIMIT = 30.0
# Expected standard deviation of eta: tighter than it turns out to be, which does better on text of another kind.
PRIOR = 0.4

Price = Callable[[int, str, Tensor, Tensor], Callable[[Tensor], None] | None]
"""(layer, site, router's input x, activation) -> what to do with the activation's gradient, if anything. Both are
detached: holding on to the activation itself would keep the graph of every block alive."""


def sensitivity_strength(budget: float) -> float:
    """From 0 to 1, what multiplies token sensitivity at a budget."""
    return min(max((budget - NONE) / (ALL - NONE), 0.0), 1.0)


def fit_token_sensitivity(
    hat: HierarchicalTransformer, blocks: list[Tensor], thresholds: dict, seed: int, progress: bool = True
) -> None:
    """Set the weights of ``hat``'s token routers from ``blocks``, int64 ``[1, T]`` each; ``thresholds`` are the score
    thresholds by (layer, site) at which `SHARE` is kept, ``seed`` is for the targets drawn from the base."""
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
    """What it would cost each token to drop its channels at or below ``thresholds``, in one layer at a time.

    Arguments as in `fit_token_sensitivity`. Returns the prices in nats of KL divergence, fp32 ``[L, n]``, and what
    predicts them, the inputs of q|k|v: L of ``[n, D]`` in half precision. n counts the tokens that are not protected.
    """
    price, inputs = ([[] for _ in range(hat.config.n_layers)] for _ in range(2))

    def see(layer: int, site: str, x: Tensor, value: Tensor):
        free = ~hat.trace.protected.view(-1)
        dropped = hat.routers[f"{layer}_{site}"].score(x) <= thresholds[layer, site]
        if site == "qkv":
            inputs[layer].append(x[free].half())
            price[layer].append(torch.zeros(int(free.sum()), device=x.device))
        of_block = price[layer][-1]

        def use(gradient: Tensor) -> None:
            of_block.add_(((value * gradient).float() * dropped).sum(-1)[free].square() / 2)

        return use

    backward(hat, blocks, see, seed=seed, progress=progress, label="prices of tokens")
    return torch.stack([torch.cat(rows) for rows in price]), [torch.cat(rows) for rows in inputs]


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
    hat: HierarchicalTransformer, blocks: Iterable[Tensor], price: Price, *, seed: int, progress: bool, label: str
) -> int:
    """Price activations by dense passes over ``blocks`` (``[1, T]`` each), forward, and back from targets that the base
    draws itself; returns the number of tokens.

    If y is drawn from the base, the KL divergence between the base and a base whose activation a is changed by a small
    d is, to second order, ``1/2 E[(grad_a log p(y) . d)^2]``: the Fisher quadratic form. So one gradient prices every
    change to every activation, and prices of small changes add up.
    """

    def see(layer: int, site: str, x: Tensor, activation: Tensor) -> None:
        with torch.no_grad():
            use = price(layer, site, x.detach().flatten(0, -2), activation.detach().flatten(0, -2))
        if use is not None:
            activation.register_hook(lambda gradient: use(gradient.flatten(0, -2)))

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
