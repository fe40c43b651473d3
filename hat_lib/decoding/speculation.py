"""Self-speculative decoding, for exactly the base's text: the adaptive model drafts, its own dense base verifies::

    hat.lm.generate(ids, custom_generate=Speculation(hat))

After Zhang et al. 2023 (arXiv:2309.08168), with the acceptance rule of Leviathan et al. 2022
(arXiv:2211.17192, algorithm 1) and Chen et al. 2023 (arXiv:2302.01318).

Drafter and verifier are one set of weights, read in ``hat.weight_format`` for drafts and in the base's own format to
verify. They share one KV cache, in which the verifying pass overwrites the drafts' K and V with the base's. The output
is the base's: token for token if greedy, in distribution if sampled, up to the rounding differences between a forward
over several tokens and a forward over one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

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


class Sampler:
    """Draws tokens, int64 ``[1]``; at temperature 0, the likeliest."""

    def __init__(self, temperature: float, generator: torch.Generator):
        self.temperature, self.generator = temperature, generator

    def distribution(self, logits: Tensor) -> Tensor:
        """``logits [V]`` as probabilities, fp32 ``[V]``."""
        if self.temperature == 0:
            return torch.zeros(len(logits), device=logits.device).index_fill(0, logits.argmax(), 1.0)
        return torch.softmax(logits.float() / self.temperature, dim=-1)

    def choice(self, count: int) -> Choice:
        """The same for the engine's loop, of so many tokens."""
        if self.temperature == 0:
            return GREEDY
        uniform = torch.rand(count, 1, dtype=torch.float64, generator=self.generator).numpy()
        return GREEDY._replace(sample=True, temperature=np.float32(self.temperature), uniform=uniform)

    def draw(self, distribution: Tensor) -> Tensor:
        if self.temperature == 0:
            return distribution.argmax()[None]
        return torch.multinomial(distribution, 1, generator=self.generator)

    def verified(self, drafts: Sequence[Tensor], guesses: Sequence[Tensor], base: Sequence[Tensor]) -> list[Tensor]:
        """The drafts that the base accepts, and a token of its own. Each was drawn from its ``guess [V]``; ``base`` has
        the base's distributions at their places, and at the next."""
        for kept, (token, guess, own) in enumerate(zip(drafts, guesses, base, strict=False)):
            u = torch.rand(1, generator=self.generator, device=own.device)
            accepted = u * guess[token] < own[token]  # with probability min(1, own / guess)
            if not accepted:
                rest = (own - guess).clamp(min=0)  # nothing, if the two differ only by rounding
                return [*drafts[:kept], self.draw(rest if rest.any() else own)]
        return [*drafts, self.draw(base[-1])]


class Speculation:
    """A ``custom_generate`` for ``hat.lm.generate``: continues one prompt, without padding, as the base would, and
    counts what that took.

    Of generate's settings it follows the length, the end of a text, streamer, ``do_sample`` and ``temperature``: it
    samples from the base's whole distribution.

    Args:
        hat: drafts as it is set.
        seed: of the sampling.
        draft_length: tokens per round; None takes `best_draft_length` at the acceptance seen so far.
    """

    def __init__(self, hat, seed: int = 0, draft_length: int | None = None):
        check_count("draft length", LONGEST if draft_length is None else draft_length, 1)
        self.hat, self.seed, self.draft_length = hat, seed, draft_length
        self.new_tokens = 0
        self.passes = 0
        """dense passes, the prompt's included"""
        self.tested = self.accepted = 0
        """drafted tokens that the base looked at (none after the first that it rejects), and those that it accepted"""
        self.drafts: list[Trace] = []
        """what the drafting steps ran"""

    @property
    def drafted(self) -> int:
        return sum(trace.tokens for trace in self.drafts)

    @property
    def drafting(self) -> float:
        """Work of the drafting steps, in dense steps."""
        return self.drafted * state_cost(self.hat, Trace.cat(self.drafts)).model_share if self.drafts else 0.0

    @property
    def ideal_speedup(self) -> float:
        """New tokens per dense step's worth of weights read, if a verifying pass reads them once for all its tokens."""
        return self.new_tokens / (self.passes + self.drafting)

    @torch.inference_mode()
    def __call__(self, lm, input_ids, logits_processor, stopping_criteria, generation_config, **_) -> Tensor:
        if len(input_ids) != 1:
            raise HatError(f"lossless decoding takes one prompt, got {len(input_ids)}")
        hat, call, cache = self.hat, self.hat._decoding.call, DynamicCache(config=lm.config)
        temperature = generation_config.temperature if generation_config.do_sample else 0.0
        sampler = Sampler(temperature, torch.Generator(input_ids.device).manual_seed(self.seed))
        most, stops = stopping_criteria.max_length - input_ids.shape[1], stop_tokens(generation_config)
        new, last, drafts, guesses, cost = [], input_ids[0], [], [], None
        while True:
            with hat.dense(), hat.changed(weight_format="base"):  # the prompt, then a token and its drafts
                ids, count = torch.cat([last, *drafts])[None], len(drafts) + 1
                logits = lm(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=count).logits[0]
            verified = sampler.verified(drafts, guesses, [sampler.distribution(row) for row in logits])
            kept = len(verified) - 1
            if kept < len(drafts):
                cache.crop(kept - len(drafts))
            self.passes += 1
            self.tested += min(kept + 1, len(drafts))
            self.accepted += kept
            for token in verified:
                new.append(token)
                call.put(token[None].cpu().numpy())
                if len(new) == most or int(token) in stops:
                    call.end()
                    self.new_tokens += len(new)
                    return torch.cat([input_ids, torch.cat(new)[None]], dim=1)

            last, count = new[-1], self.draft_length or 1
            if cost is not None and self.draft_length is None:  # the first round measures the cost
                # A high prior until a few rounds are in.
                count = best_draft_length((self.accepted + 3) / (self.tested + 4), cost)
            with hat.collect() as steps:
                drafts, guesses = self._draft(last, cache, min(count, most - len(new) - 1), sampler)
            self.drafts += steps
            if steps:
                cache.crop(-len(drafts))
                cost = cost or READ.get(hat.weight_format, 1.0) * state_cost(hat, steps[0]).model_share

    def _draft(self, token: Tensor, cache: DynamicCache, count: int, sampler: Sampler) -> tuple[list, list]:
        """Tokens that follow ``token [1]``, each int64 ``[1]``, and the distributions from which they were drawn."""
        hat, drafts, guesses = self.hat, [], []
        if count and (found := hat._decoding.draft(token, cache, count, sampler.choice(count))) is not None:
            return [*torch.from_numpy(found.ids[0].copy())[:, None]], [*map(sampler.distribution, found.logits[0])]
        for _ in range(count):
            logits = hat.lm(input_ids=token[None], cache=cache, use_cache=True).logits[0, -1]
            guesses.append(sampler.distribution(logits))
            token = sampler.draw(guesses[-1])
            drafts.append(token)
        return drafts, guesses


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


def stop_tokens(config: GenerationConfig) -> list[int]:
    """Tokens that end a text: none, one or several."""
    stop = config.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
