"""``hat generate``: text at a capacity, at a target speedup, or exactly the base's."""

from __future__ import annotations

from typing import Annotated

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.console import realised
from hat_lib.cli.options import option
from hat_lib.config import HatError


def generate(
    prompt: Annotated[str, option("Text to continue, as it is, without a chat template; - reads stdin.")],
    base: take.Base = None,
    checkpoint: take.Checkpoint = None,
    capacity: take.Capacity = None,
    exit_rate: take.ExitRate = None,
    target_speedup: Annotated[
        str | None,
        option(
            "In place of a capacity: decode this many times as fast, at the largest capacity that does.",
            metavar="TIMES",
        ),
    ] = None,
    refresh_speed: Annotated[
        bool, option("With a target: measure this machine's speed anew, whatever is remembered.", "--refresh-speed")
    ] = False,
    versus: Annotated[
        str, option("What speedups are held against: dense (our own dense path) or hf (plain transformers).")
    ] = "dense",
    lossless: Annotated[
        bool, option("The base's own text: the adaptive model drafts, the base decides.", "--lossless")
    ] = False,
    show_compute: Annotated[
        bool, option("Show the new tokens once more, coloured by the work that chose each.", "--show-compute")
    ] = False,
    max_new_tokens: Annotated[int, option("Most tokens to add, at least 1; an end-of-text token stops earlier.")] = 64,
    dtype: take.Dtype = None,
    temperature: Annotated[
        float, option("0 takes the likeliest token (greedy); from 0.001 on samples from the whole distribution.")
    ] = 0.0,
    seed: Annotated[int, option("Seed of the sampling, from 0 to 2^64 - 1; greedy has no use for it.")] = 0,
) -> None:
    """Continue a prompt, and say how much was executed.

    At a capacity, at a target speedup (the first one measures this machine's speed, about half a minute), or exactly as
    the base would, with the adaptive model as drafter. The text appears as it comes; the lines after it have what was
    requested and what was realised.
    """
    chosen = [name for name, on in (("--capacity", capacity), ("--lossless", lossless)) if on]
    if target_speedup is not None and chosen:
        raise HatError(f"--target-speedup chooses the capacity: leave out {chosen[0]}")
    if refresh_speed and target_speedup is None:
        raise HatError("--refresh-speed measures for a target: add --target-speedup")
    if lossless and show_compute:
        raise HatError(
            "--show-compute colours what each token skipped; with --lossless the base decides on every token"
        )
    prompt = given.read_prompt(prompt)

    from hat_lib.inference.generate import AdaptiveInference, check_sampling
    from hat_lib.inference.speed import VERSUS, check_target, check_versus

    check_sampling(max_new_tokens, temperature, seed)
    check_versus(versus)
    target = None if target_speedup is None else check_target(target_speedup)
    hat = given.load(base, checkpoint, capacity, exit_rate, dtype)

    from transformers import TextStreamer

    infer = AdaptiveInference(hat, versus)
    if refresh_speed:
        infer.curve(refresh=True)
    out = infer.generate(
        prompt,
        target_speedup=target,
        mode="lossless" if lossless else "adaptive",
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        streamer=TextStreamer(hat.base.tokenizer, skip_special_tokens=True),
    )
    if show_compute:
        from hat_lib.plotting.token_heatmap import Passage, ansi
        from hat_lib.text.token_classes import pieces

        ids = out.ids[0, out.prompt_length :].tolist()
        shares = out.token_share[0, out.prompt_length - 1 :].tolist()
        passage = Passage("new tokens", pieces(hat.base.tokenizer, ids), shares)
        typer.echo("\n" + ansi(passage, meaning="work that chose the token, as a share of the dense model's") + "\n")
    typer.echo(
        f"[capacity {realised(out.requested_capacity, out.capacity)}; exit rate {out.requested_exit_rate:.2f} "
        f"requested, {out.exit_rate:.3f} realised; model share {out.model_share:.3f}; {out.new_tokens} new tokens, "
        f"{out.tokens_per_second:.1f} tokens/s]"
    )
    speedup = "too short a text to measure" if out.realised_speedup is None else f"{out.realised_speedup:.3f}x"
    if out.predicted_speedup is not None:
        low, high = out.predicted_range
        typer.echo(
            f"[speedup {out.target_speedup:g} requested, {out.predicted_speedup:.3f} predicted "
            f"({low:.3f} to {high:.3f} when measured), {speedup} realised over {VERSUS[versus]}]"
        )
    if lossless:
        typer.echo(
            f"[lossless: {sum(s.drafted for s in out.speculation)} drafted, {out.acceptance:.0%} accepted, "
            f"{out.speculation[0].passes} passes of the base; {speedup} over {VERSUS[versus]}]"
        )
