"""Self-speculative decoding, for exactly the base's text: the adaptive model drafts, its own dense base verifies.

After Zhang et al. 2023 (arXiv:2309.08168), with the acceptance rule of Leviathan et al. 2022
(arXiv:2211.17192, algorithm 1) and Chen et al. 2023 (arXiv:2302.01318).

Drafter and verifier are one set of weights, read in ``hat.weight_format`` for drafts and in the base's own format to
verify. They share one KV cache, in which the verifying pass overwrites the drafts' K and V with the base's. The output
is the base's: token for token if greedy, in distribution if sampled, up to the rounding differences between a forward
over several tokens and a forward over one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from hat_lib.config import HatError, check_count
from hat_lib.engine.arrays import GREEDY, Choice
from hat_lib.method.cost import state_cost
from hat_lib.method.trace import Trace

LONGEST = 7
"""most tokens to draft before the base verifies them: with the one before them, as many as the engine takes"""
ROW = 0.1
"""what one more token adds to a verifying pass, as a share of a dense step: weights are read once but multiplied for
each token"""
READ = {"int8": 0.7, "q4": 0.4}
"""cost of a drafting step in a format of the engine's weights, as a share of one in the base's own, in bfloat16"""


@dataclass(frozen=True)
class Speculation:
    """One sequence, and how its drafting went."""

    ids: Tensor
    """prompt and new tokens, int64 ``[1, T]``"""
    new_tokens: int
    passes: int
    """dense passes, the prompt's included"""
    accepted: int
    """drafted tokens that the base accepted"""
    drafts: Trace | None
    """what the drafting steps ran, concatenated along T; None without any"""
    draft_share: float
    """their mean work, as a share of a dense step's; nan without any"""

    @property
    def drafted(self) -> int:
        return 0 if self.drafts is None else self.drafts.tokens

    @property
    def acceptance(self) -> float:
        """Accepted / drafted tokens; nan if none were drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def drafting(self) -> float:
        """Work of all drafting steps, in dense steps."""
        return self.drafted * self.draft_share if self.drafted else 0.0

    @property
    def ran(self) -> float:
        """Work of all that ran, in dense steps: the prompt, drafts, and passes that verify them."""
        return self.ids.shape[1] - self.new_tokens + self.drafted + self.passes - 1 + self.drafting

    @property
    def ideal_speedup(self) -> float:
        """New tokens per dense step's worth of weights read, if a verifying pass reads them once for all its tokens."""
        return self.new_tokens / (self.passes + self.drafting)


def best_draft_length(acceptance: float, cost: float) -> int:
    """How many tokens to draft, 1 to `LONGEST`: the number that yields the most tokens per unit of work.

    With acceptance a and a drafting step that costs ``cost`` dense steps, k drafts and one verifying pass give
    ``(1 - a^(k+1)) / (1 - a)`` tokens for ``k (cost + ROW) + 1`` (Leviathan et al. 2022, equation 1 and theorem 3.8,
    where a pass costs the same for any number of tokens). It counts work, not seconds, so that a seed gives the same
    result on any machine.
    """
    k = np.arange(LONGEST + 1)
    tokens = np.power(acceptance, k).cumsum()
    return 1 + int(np.argmax((tokens / (k * (cost + ROW) + 1))[1:]))


def speculate(
    hat,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    draft_length: int | None = None,
    seed: int = 0,
    streamer=None,
) -> Speculation:
    """Continue one prompt as the base would, drafting with ``hat`` as it is set; stops after an end-of-text token.

    Args:
        ids: int64 ``[1, T]``, without padding; `HatError` for a batch or nothing.
        temperature: 0 is greedy; above 0 samples from the base's whole distribution at that temperature.
        draft_length: tokens per round; None takes `best_draft_length` at the acceptance seen so far.
        streamer: as for `generate`: ``put`` receives tokens as they are verified, then ``end`` is called.
    """
    if ids.dim() != 2 or len(ids) != 1 or not ids.shape[1]:
        raise HatError(f"lossless decoding takes one prompt of at least one token, got shape {tuple(ids.shape)}")
    check_count("max new tokens", max_new_tokens, 1)
    check_count("draft length", LONGEST if draft_length is None else draft_length, 1)
    sampler = Sampler(temperature, torch.Generator(ids.device).manual_seed(seed))
    found = []

    def decode(lm, input_ids, **_):  # runs inside generate, where torch's threads sleep between steps
        found.append(_speculate(hat, ids, max_new_tokens, sampler, draft_length, streamer))
        return found[0].ids

    pad = hat.base.tokenizer.pad_token_id
    hat.lm.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, max_new_tokens=max_new_tokens,
                    custom_generate=decode)  # fmt: skip
    return found[0]


@torch.inference_mode()
def _speculate(hat, ids, max_new_tokens, sampler: Sampler, draft_length, streamer) -> Speculation:
    lm, stop, cache = hat.lm, stop_tokens(hat), DynamicCache(config=hat.lm.config)
    cost, accepted, tested, passes, states = None, 0, 0, 1, []

    with hat.dense(), hat.changed(weights="base"):
        logits = lm(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[0]
    new = [sampler.draw(sampler.distribution(logits[-1]))]
    if streamer is not None:
        streamer.put(ids.cpu())
        streamer.put(new[0].cpu())
    while len(new) < max_new_tokens and int(new[-1]) not in stop:
        n = draft_length or 1
        if cost is not None and draft_length is None:  # the first round measures the cost
            n = best_draft_length((accepted + 3) / (tested + 4), cost)  # a high prior until a few rounds are in
        n = min(n, max_new_tokens - len(new) - 1)
        with hat.collect() as steps:
            drafts, guesses = _draft(hat, new[-1], cache, n, sampler)
        states += steps
        if n:
            if cost is None:
                cost = READ.get(hat.weight_format, 1.0) * state_cost(hat, steps[0]).model_share
            cache.crop(-n)
        with hat.dense(), hat.changed(weights="base"):
            logits = lm(input_ids=torch.cat([new[-1], *drafts])[None], cache=cache, use_cache=True).logits[0]
        passes += 1
        base = [sampler.distribution(row) for row in logits]
        kept = 0
        while kept < n and sampler.accepts(drafts[kept], base[kept], guesses[kept]):
            kept += 1
        last = base[n]
        if kept < n:
            cache.crop(kept - n)
            last = sampler.residual(base[kept], guesses[kept])
        accepted += kept
        tested += min(kept + 1, n)  # drafts after the first rejected one were never tested
        for token in [*drafts[:kept], sampler.draw(last)]:
            new.append(token)
            if streamer is not None:
                streamer.put(token.cpu())
            if int(token) in stop:
                break
    if streamer is not None:
        streamer.end()
    drafted = Trace.cat(states) if states else None
    share = state_cost(hat, drafted).model_share if states else float("nan")
    return Speculation(torch.cat([ids, torch.cat(new)[None]], dim=1), len(new), passes, accepted, drafted, share)


def _draft(hat, token: Tensor, cache: DynamicCache, n: int, sampler: Sampler) -> tuple[list[Tensor], list[Tensor]]:
    """n tokens that follow ``token [1]``, each int64 ``[1]``, and the distributions from which they were drawn."""
    drafts, guesses = [], []
    if n and (found := hat._decoding.draft(token[None].numpy(), cache, n, sampler.choice(n))) is not None:
        return list(torch.from_numpy(found.ids[0].copy())[:, None]), [sampler.distribution(x) for x in found.logits[0]]
    for _ in range(n):
        logits = hat.lm(input_ids=token[None], cache=cache, use_cache=True).logits[0, -1]
        guesses.append(sampler.distribution(logits))
        token = sampler.draw(guesses[-1])
        drafts.append(token)
    return drafts, guesses


class Sampler:
    """Draws tokens. Greedy (temperature 0), a "distribution" is the likeliest token itself: int64 ``[1]``."""

    def __init__(self, temperature: float, generator: torch.Generator):
        self.temperature, self.generator = temperature, generator

    def distribution(self, logits: Tensor) -> Tensor:
        """``logits [V]`` as probabilities, fp32 ``[V]``."""
        if self.temperature == 0:
            return logits.argmax()[None]
        return torch.softmax(logits.float() / self.temperature, dim=-1)

    def choice(self, n: int) -> Choice:
        """The same for the engine's loop, of n tokens."""
        if self.temperature == 0:
            return GREEDY
        uniform = torch.rand(n, 1, dtype=torch.float64, generator=self.generator).numpy()
        return GREEDY._replace(sample=True, temperature=np.float32(self.temperature), uniform=uniform)

    def draw(self, distribution: Tensor) -> Tensor:
        """A token, int64 ``[1]``."""
        if self.temperature == 0:
            return distribution
        return torch.multinomial(distribution, 1, generator=self.generator)

    def accepts(self, token: Tensor, base: Tensor, draft: Tensor) -> bool:
        """True with probability ``min(1, base / draft)`` at the token."""
        if self.temperature == 0:
            return bool(token == base)
        u = torch.rand(1, generator=self.generator, device=base.device)
        return bool(u * draft[token] < base[token])

    def residual(self, base: Tensor, draft: Tensor) -> Tensor:
        """The distribution from which to draw a replacement for a rejected token."""
        if self.temperature == 0:
            return base
        rest = (base - draft).clamp(min=0)
        return rest if rest.any() else base  # nothing is left if the two differ only by rounding


def stop_tokens(hat) -> list[int]:
    """Tokens that end a text: none, one or several, as in the base's generation config."""
    stop = hat.lm.generation_config.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
