"""``hat generate``: text at a capacity, at a target speedup, or exactly the base's."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option
from hat_lib.config import HatError, work_text


def generate(
    prompt: str | None = typer.Argument(
        None, help="Text to continue, as it is unless --chat is given; - reads stdin.", show_default=False
    ),
    prompt_option: str | None = option(None, "The prompt as an option.", "--prompt", metavar="PROMPT"),
    base: str | None = options.BASE,
    checkpoint: Path | None = options.CHECKPOINT,
    capacity: str | None = options.CAPACITY,
    exit_rate: str | None = options.EXIT_RATE,
    target_speedup: str | None = option(None, "Decode this many times as fast, at the highest capacity that does."),
    refresh_speed: bool = option(False, "With a target: measure this machine's speed anew.", "--refresh-speed"),
    versus: Literal["dense", "hf"] = option("dense", "Speedups are over our own dense path or plain transformers."),
    lossless: bool = option(False, "The base's own text: the adaptive model drafts, the base decides.", "--lossless"),
    steer: bool = option(False, "Move thresholds while decoding, to realise the requested capacity.", "--steer"),
    chat: bool = option(False, "The prompt is a user's turn: put it into the model's chat template.", "--chat"),
    gate_prompt: bool = option(False, "Let the prompt spend by capacity, too; else it runs in full.", "--gate-prompt"),
    show_compute: bool = option(False, "Show the new tokens again, coloured by their compute.", "--show-compute"),
    max_new_tokens: int = option(64, "Most tokens to add; an end-of-text token stops earlier.", min=1),
    dtype: str | None = options.DTYPE,
    weights: Literal["base", "int8", "q4"] = option(
        "base",
        "What the engine reads for each token: the base's own weights, or a copy in fewer bits: faster, near to the "
        "base and not equal to it. With --lossless they draft, and the base's own decide.",
    ),
    temperature: float = option(0.0, "0 takes the likeliest token (greedy); 0.001 and above samples from all tokens."),
    seed: int = option(0, "Seed of the sampling; greedy decoding ignores it.", min=0),
    threads: int | None = options.THREADS,
) -> None:
    """Continue a prompt, and say how much was executed.

    At a capacity, at a target speedup (the first time, this machine's speed is measured, about half a minute), or
    exactly as the base would, with the adaptive model as drafter.
    """
    if target_speedup is not None and (capacity is not None or lossless):
        raise HatError("--target-speedup chooses the capacity: leave out --capacity and --lossless")
    if refresh_speed and target_speedup is None:
        raise HatError("--refresh-speed measures for a target: add --target-speedup")
    if lossless and (steer or show_compute or gate_prompt):
        what = "--steer, --show-compute and --gate-prompt"
        raise HatError(f"--lossless lets the base decide on every token: leave out {what}")
    prompt = prompt_option if prompt is None else prompt
    if prompt == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # whatever the terminal's encoding is
        prompt = sys.stdin.read()
    options.check_prompt("generate", prompt)
    options.start(threads)

    from hat_lib.decoding.inference import AdaptiveInference, check_sampling
    from hat_lib.decoding.speed import VERSUS, check_target, speedup_text

    check_sampling(max_new_tokens, temperature, seed)
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
            chat=chat,
            streamer=TextStreamer(hat.base.tokenizer, skip_prompt=chat, skip_special_tokens=True),
            **({"gate_prompt": True} if gate_prompt else {}),
        )
    if show_compute:
        _show_compute(hat, out)
    share = out.draft_share if lossless else out.model_share
    work = "drafts alone: " * lossless
    work += work_text(out.requested_capacity, out.capacity, out.requested_exit_rate, out.exit_rate, share)
    typer.echo(f"[{work}; {out.new_tokens} new tokens, {out.tokens_per_second:.1f} tokens/s; {hat.decoding}]")
    speedup = speedup_text(out.realised_speedup, VERSUS[versus])
    if out.predicted_speedup is not None:
        low, high = out.predicted_range
        predicted = f"{out.predicted_speedup:.3f} predicted ({low:.3f} to {high:.3f} when measured)"
        typer.echo(f"[speedup {out.target_speedup:g} requested, {predicted}; realised: {speedup}]")
    if lossless:
        (speculation,) = out.speculation
        read = f"{1 / speculation.ideal_speedup:.2f} times the weights it reads"
        typer.echo(
            f"[lossless: {speculation.drafted} drafted, {out.acceptance:.0%} accepted, {speculation.passes} passes of "
            f"the base; with verification {out.model_share:.2f} times the dense model's work and {read}; {speedup}]"
        )


def _show_compute(hat, out) -> None:
    from hat_lib.text.coloured import Passage, ansi
    from hat_lib.text.token_classes import pieces

    tokens = pieces(hat.base.tokenizer, out.ids[0, out.prompt_length :].tolist())
    passage = Passage("new tokens", tokens, out.token_share[0, out.prompt_length - 1 :].tolist())
    meaning = "compute spent predicting the token, as a share of the dense model's"
    typer.echo("\n" + ansi(passage, meaning=meaning) + "\n")


def _price(hat, capacity: float, weights: str) -> str:
    """What is known about the perplexity at a capacity, before any text is generated at it."""
    from hat_lib.evaluation.equal_work import price_texts

    more = "" if weights == "base" else f", and what {weights} costs, see `python -m studies decode`"
    if capacity == 1:
        return "the base's perplexity" + more
    if known := price_texts(hat.prices, capacity):
        return "perplexity about " + ", ".join(f"{increase} on {text}" for text, increase in known.items()) + more
    return f"what that costs was not measured, see `hat evaluate --capacity {capacity:.2f}`" + more
