"""What an activation is worth: one backward pass for the KL divergence that any small change to it would cause.

If y is sampled from the base itself, the KL divergence between the base and a base whose activation a is changed by a
small d is, to second order, ``1/2 E[(grad_a log p(y) . d)^2]``: the Fisher quadratic form. So one gradient prices every
change to every activation, and prices of small changes add up (docs/experiments/corrections.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.model.transformer import HierarchicalTransformer

Price = Callable[[int, str, Tensor, Tensor], Callable[[Tensor], None] | None]
"""(layer, site, router's input x, activation) -> what to do with the activation's gradient, if anything. Both are
detached: holding on to the activation itself would keep the graph of every block alive."""


def backward(
    hat: HierarchicalTransformer, blocks: Iterable[Tensor], price: Price, *, seed: int, progress: bool, label: str
) -> int:
    """Dense passes over ``blocks`` (``[1, T]`` each), forward, and back from targets that the base draws itself;
    returns the number of tokens."""

    def see(layer: int, site: str, x: Tensor, activation: Tensor) -> None:
        with torch.no_grad():
            use = price(layer, site, x.detach().flatten(0, -2), activation.detach().flatten(0, -2))
        if use is not None:
            activation.register_hook(lambda gradient: use(gradient.flatten(0, -2)))

    generator = torch.Generator(hat.base.device).manual_seed(seed)
    tokens = 0
    with hat.dense(), hat.watching(see):
        for block in tqdm(blocks, desc=label, disable=not progress):
            with torch.enable_grad():
                embedded = hat.lm.get_input_embeddings()(block).detach().requires_grad_()
                logits = hat.lm(inputs_embeds=embedded, use_cache=False).logits[0].float()
                target = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, target, reduction="sum").backward()
            tokens += block.shape[1]
    return tokens
