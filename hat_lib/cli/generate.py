"""``hat generate``: text at a capacity, at a target speedup, or exactly the base's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option
from hat_lib.config import HatError, work_text


def generate(
    prompt: str = option(..., "Text to continue, as it is, without a chat template; - reads stdin."),
    base: str | None = options.BASE,
    checkpoint: Path | None = options.CHECKPOINT,
    capacity: str | None = options.CAPACITY,
    exit_rate: str | None = options.EXIT_RATE,
    target_speedup: str | None = option(
        None, "Decode this many times as fast, at the highest capacity that reaches it."
    ),
    refresh_speed: bool = option(False, "With a target: measure this machine's speed anew.", "--refresh-speed"),
    versus: str = option("dense", "Speedups are over dense (our own dense path) or hf (plain transformers)."),
    lossless: bool = option(False, "The base's own text: the adaptive model drafts, the base decides.", "--lossless"),
    steer: bool = option(
        False, "Move thresholds while decoding, so that realised capacity matches the request.", "--steer"
    ),
    show_compute: bool = option(
        False, "Show each new token again, coloured by the compute spent predicting it.", "--show-compute"
    ),
    max_new_tokens: int = option(64, "Most tokens to add, at least 1; an end-of-text token stops earlier."),
    dtype: str | None = options.DTYPE,
    weights: str = option(
        "base",
        "What the engine reads for each token: base, the base's own weights, or a copy in fewer bits (int8, q4): "
        "faster, near to the base and not equal to it. With --lossless they draft, and the base's own decide.",
    ),
    temperature: float = option(0.0, "0 takes the likeliest token (greedy); 0.001 and above samples from all tokens."),
    seed: int = option(0, "Seed of the sampling, from 0 to 2^64 - 1; greedy decoding ignores it."),
) -> None:
    """Continue a prompt, and say how much was executed.

    At a capacity, at a target speedup (the first time, this machine's speed is measured, which takes about half a
    minute), or exactly as the base would, with the adaptive model as drafter. The text is printed as it is generated;
    the lines after it say what was requested and what was realised.
    """
    for chosen, on in (("--capacity", capacity), ("--lossless", lossless)):
        if target_speedup is not None and on:
            raise HatError(f"--target-speedup chooses the capacity: leave out {chosen}")
    if steer and lossless:
        raise HatError("--steer holds a text to a capacity; with --lossless drafts are held to nothing: leave it out")
    if refresh_speed and target_speedup is None:
        raise HatError("--refresh-speed measures for a target: add --target-speedup")
    if lossless and show_compute:
        raise HatError("--show-compute colours what a token skipped; with --lossless the base decides on every token")
    prompt = options.read_prompt(prompt)

    from hat_lib.inference.generate import AdaptiveInference, check_sampling
    from hat_lib.inference.speed import VERSUS, check_target, check_versus, speedup_text
    from hat_lib.model.fast_path import WEIGHT_FORMATS

    if weights not in WEIGHT_FORMATS:
        raise HatError(f"--weights must be one of {', '.join(WEIGHT_FORMATS)}, got {weights!r}")
    check_sampling(max_new_tokens, temperature, seed)
    check_versus(versus)
    target = None if target_speedup is None else check_target(target_speedup)
    hat = options.load(base, checkpoint, capacity, exit_rate, dtype)
    hat.weight_format = weights
    if weights != "base" and not hat.decoding.startswith("engine"):
        options.say("warning", f"--weights {weights} changes nothing here: {hat.decoding}")

    from transformers import TextStreamer

    infer = AdaptiveInference(hat, versus)
    if refresh_speed:
        infer.curve(refresh=True)
    if target is not None:
        chosen = infer.curve().capacity_for(target)
        typer.echo(f"[{target:g}x here means capacity {chosen:.2f}: {_price(hat, chosen, weights)}]", err=True)
    with hat.steered() if steer else nullcontext():
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
        from hat_lib.evaluation.coloured_text import Passage, ansi
        from hat_lib.text.token_classes import pieces

        ids = out.ids[0, out.prompt_length :].tolist()
        shares = out.token_share[0, out.prompt_length - 1 :].tolist()
        passage = Passage("new tokens", pieces(hat.base.tokenizer, ids), shares)
        meaning = "compute spent predicting the token, as a share of the dense model's"
        typer.echo("\n" + ansi(passage, meaning=meaning) + "\n")
    share = out.draft_share if lossless else out.model_share
    work = work_text(out.requested_capacity, out.capacity, out.requested_exit_rate, out.exit_rate, share)
    work = f"drafts alone: {work}" if lossless else work
    typer.echo(f"[{work}; {out.new_tokens} new tokens, {out.tokens_per_second:.1f} tokens/s; {hat.decoding}]")
    speedup = speedup_text(out.realised_speedup, VERSUS[versus])
    if out.predicted_speedup is not None:
        predicted = "{:.3f} predicted ({:.3f} to {:.3f} when measured)".format(
            out.predicted_speedup, *out.predicted_range
        )
        typer.echo(f"[speedup {out.target_speedup:g} requested, {predicted}; realised: {speedup}]")
    if lossless:
        (spoken,) = out.speculation
        typer.echo(
            f"[lossless: {spoken.drafted} drafted, {out.acceptance:.0%} accepted, {spoken.passes} passes of the base; "
            f"all that ran, verification included: {out.model_share:.2f} times the dense model's work and "
            f"{1 / spoken.ideal_speedup:.2f} times the weights it reads; {speedup}]"
        )


def _price(hat, capacity: float, weights: str) -> str:
    """What is known about the perplexity at a capacity, before any text is generated at it."""
    from hat_lib.evaluation.equal_work import price_texts

    more = "" if weights == "base" else f", and what {weights} costs, see `python -m studies decode`"
    if capacity == 1:
        return "the base's perplexity" + more
    if known := price_texts(hat.prices, capacity):
        return "perplexity about " + ", ".join(f"{increase} on {text}" for text, increase in known.items()) + more
    return f"what that costs was not measured, see `hat evaluate --capacity {capacity:.2f}`" + more
