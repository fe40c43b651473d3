"""``hat generate``, ``hat explain`` and ``hat play``, which show what the model does with a prompt."""

import sys
import threading
import warnings
import webbrowser
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option, with_model
from hat_lib.config import HatError, check_writable


@with_model
def generate(
    prompt: str | None = typer.Argument(None, help="Text to continue; - reads stdin.", show_default=False),
    prompt_option: str | None = option(None, "The prompt as an option.", "--prompt", metavar="PROMPT"),
    target_speedup: str | None = option(None, "Decode this many times as fast, at the highest capacity that does."),
    refresh_speed: bool = option(False, "With a target: measure this machine's speed anew.", "--refresh-speed"),
    versus: Literal["dense", "hf"] = option("dense", "Speedups are over our own dense path or plain transformers."),
    lossless: bool = option(False, "The base's own text: the adaptive model drafts, the base decides.", "--lossless"),
    steer: bool = option(False, "Move thresholds while decoding, to realise the requested capacity.", "--steer"),
    chat: bool = option(False, "The prompt is a user's turn: put it into the model's chat template.", "--chat"),
    gate_prompt: bool = option(False, "Let the prompt spend by capacity, too; else it runs in full.", "--gate-prompt"),
    show_compute: bool = option(False, "Show the new tokens again, coloured by their compute.", "--show-compute"),
    max_new_tokens: int = option(64, "Most tokens to add; an end-of-text token stops earlier.", min=1),
    weights: Literal["base", "int8", "q4"] = option(
        "base",
        "What the engine reads for each token: the base's own weights, or a copy in fewer bits: faster, near to the "
        "base and not equal to it. With --lossless they draft, and the base's own decide.",
    ),
    temperature: float = option(0.0, "0 takes the likeliest token (greedy); 0.001 and above samples from all tokens."),
    seed: int = option(0, "Seed of the sampling; greedy decoding ignores it.", min=0),
    threads: int | None = options.THREADS,
    **model,
) -> None:
    """Continue a prompt, and say how much was executed.

    At a capacity, at a target speedup (the first time, this machine's speed is measured, about half a minute), or
    exactly as the base would, with the adaptive model as drafter.
    """
    if target_speedup is not None and (model["capacity"] is not None or lossless):
        raise HatError("--target-speedup chooses the capacity: leave out --capacity and --lossless")
    if refresh_speed and target_speedup is None:
        raise HatError("--refresh-speed measures for a target: add --target-speedup")
    if lossless and (steer or show_compute or gate_prompt):
        raise HatError("--lossless lets the base decide: leave out --steer, --show-compute and --gate-prompt")
    prompt = prompt_option if prompt is None else prompt
    if prompt == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # whatever the terminal's encoding is
        prompt = sys.stdin.read()
    options.check_prompt("generate", prompt)
    options.start(threads)
    from transformers import TextStreamer

    from hat_lib.decoding.inference import AdaptiveInference, check_sampling
    from hat_lib.decoding.speed import check_target
    from hat_lib.evaluation import report

    check_sampling(max_new_tokens, temperature, seed)
    target = None if target_speedup is None else check_target(target_speedup)
    hat = options.load(**model)
    hat.weight_format = weights
    if weights != "base" and not hat.decoding.startswith("engine"):
        warnings.warn(f"--weights {weights} changes nothing here: {hat.decoding}", stacklevel=1)
    infer = AdaptiveInference(hat, versus)
    if refresh_speed:
        infer.curve(refresh=True)
    if target is not None:
        chosen = infer.curve().capacity_for(target)
        typer.echo(f"[{target:g}x here means capacity {chosen:.2f}: {report.price(hat, chosen, weights)}]", err=True)
    streamer = TextStreamer(hat.base.tokenizer, skip_prompt=chat, skip_special_tokens=True)
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "chat": chat}
    how |= {"mode": "lossless" if lossless else "adaptive", "target_speedup": target}
    how |= {"gate_prompt": True} if gate_prompt else {}
    with hat.steered() if steer else nullcontext():
        out = infer.generate(prompt, streamer=streamer, **how)
    if show_compute:
        typer.echo("\n" + report.new_tokens(hat, out) + "\n")
    typer.echo("\n".join(report.on_generation(out, hat.decoding)))


@with_model
def explain(
    prompt: str = typer.Argument(..., help="Text to read."),
    html: Path | None = option(None, "Also write a page to explore it at nine capacities, which needs no network."),
    threads: int | None = options.THREADS,
    **model,
) -> None:
    """Which tokens of a prompt got the work."""
    options.check_prompt("explain", prompt)
    if html is not None:
        html = html.expanduser()
        check_writable(html.parent, "a page")
    options.start(threads)
    from hat_lib.evaluation import tokens
    from hat_lib.plotting.style import write
    from hat_lib.workbook import play_page
    from hat_lib.workbook.screen import Screen

    hat = options.load(**model)
    page = "" if html is None else play_page.html({"Prompt": (prompt, "")}, Screen(hat))
    typer.echo(str(tokens.explain(hat, prompt)))
    if html is not None:
        write(html, page.encode())
        typer.echo(f"wrote {html}", err=True)


def play(
    base: str | None = options.BASE,
    checkpoint: Path | None = options.CHECKPOINT,
    exit_rate: str | None = options.EXIT_RATE,
    dtype: str = options.dtype("fp32", f"{options.DTYPES}."),
    port: int = option(8765, "Port of the page, on this machine alone.", min=0, max=65535),
    show: bool = option(True, "Open the page in a browser.", "--open/--no-open"),
    threads: int | None = options.THREADS,
) -> None:
    """Type a sentence, move the capacity, watch: in the browser.

    The map of the work, the next tokens, how the text goes on, its price and its speed move together. Ctrl-C ends it.
    """
    options.start(threads)
    from hat_lib.workbook.play_page import Server
    from hat_lib.workbook.screen import Screen

    server = Server(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    typer.echo(f"http://{server.host}/ (Ctrl-C ends it)", err=True)
    if show:
        webbrowser.open(f"http://{server.host}/")
    server.screen.set_result(Screen(options.load(base, checkpoint, None, exit_rate, dtype)))
    threading.Event().wait()
