"""The command line: ``hat setup | calibrate | generate | evaluate ...``, also ``python -m hat_lib``.

Each command checks what it was given before it loads a model; bad input becomes one line on stderr and exit
code 2. torch is imported inside the commands, so that ``hat --help`` answers at once.
"""

from __future__ import annotations

import math
import os
from typing import Annotated

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.console import app
from hat_lib.config import GRANULARITIES, HatConfig, HatError, check_capacity


@app.command()
def setup(
    fetch: Annotated[bool, take.option("Fetch the bundled base (93 MB) and texts (7 MB) if missing.")] = True,
    quiet: Annotated[bool, take.option("No report: say only what is fetched, or fails.", "--quiet")] = False,
) -> None:
    """Fetch the base and the texts, report the environment."""
    from hat_lib.workbook.environment import environment, fetch_bundled, lines

    try:
        if fetch:
            fetch_bundled()
    finally:  # above all when fetching failed
        if not quiet:
            typer.echo("\n".join(lines(environment())))


@app.command()
def calibrate(
    save: take.Save,
    base: take.BundledBase = "bundled",
    text: take.HeldOutText = "bundled",
    granularity: take.Granularity = HatConfig.granularity,
    tokens: take.Tokens = 12_000,
    probe_tokens: take.ProbeTokens = 4096,
    dtype: take.PassDtype = "fp32",
    capacity: take.DefaultCapacity = None,
) -> None:
    """Measure thresholds on held-out text, write a checkpoint.

    One checkpoint serves every capacity. Nothing is trained. With the bundled base it takes minutes on a CPU.
    """
    changes = {} if capacity is None else {"capacity": check_capacity(capacity)}
    if granularity not in GRANULARITIES:
        raise HatError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    given.check_count("tokens", tokens, 256)
    given.check_count("probe tokens", probe_tokens, 16)
    given.check_writable(save)

    from hat_lib.backbone.base import load_base, parse_dtype
    from hat_lib.calibration.capacity import calibrate as measure
    from hat_lib.model.transformer import HierarchicalTransformer
    from hat_lib.text.blocks import held_out, text_hash

    parse_dtype(dtype)
    given.check_text(text, "validation")
    loaded = load_base(base, dtype=dtype)
    blocks = held_out(text, loaded.tokenizer, tokens)
    shape = HatConfig.published if granularity == "token" else HatConfig.default
    hat = HierarchicalTransformer(loaded, shape(loaded, **changes))
    found = sum(map(len, blocks["input_ids"]))
    source = f"{text}, train and validation splits, {found} tokens, SHA-256 {text_hash(blocks)[:16]}"
    calibration = measure(hat, blocks["input_ids"], probe_tokens=probe_tokens, text=source)
    hat.save_pretrained(save)

    typer.echo(f"calibrated on {source}")
    low = calibration.capacities[0]
    typer.echo(f"{len(calibration.capacities)} capacities from {low:.3f} to 1, thresholds interpolated between them")
    typer.echo(f"wrote {save}, default capacity {hat.config.capacity}")


@app.command()
def generate(
    prompt: take.Prompt,
    base: take.Base = None,
    checkpoint: take.Checkpoint = None,
    capacity: take.Capacity = None,
    exit_rate: take.ExitRate = None,
    target_speedup: take.TargetSpeedup = None,
    versus: take.Versus = "dense",
    lossless: take.Lossless = False,
    show_compute: take.ShowCompute = False,
    max_new_tokens: take.MaxNewTokens = 64,
    dtype: take.Dtype = None,
    temperature: take.Temperature = 0.0,
    seed: take.Seed = 0,
) -> None:
    """Continue a prompt, and say how much was executed.

    At a capacity, at a target speedup (the first one measures this machine's speed, about half a minute), or exactly as
    the base would, with the adaptive model as drafter. The text appears as it comes; the lines after it have what was
    requested and what was realised.
    """
    given.check_count("max new tokens", max_new_tokens, 1)
    given.check_count("seed", seed, 0)
    if not 0 <= temperature < math.inf:
        raise HatError(f"temperature must be a finite number of at least 0, got {temperature}")
    chosen = [name for name, on in (("--capacity", capacity), ("--lossless", lossless)) if on]
    if target_speedup is not None and chosen:
        raise HatError(f"--target-speedup chooses the capacity: leave out {chosen[0]}")
    if lossless and show_compute:
        raise HatError(
            "--show-compute colours what each token skipped; with --lossless the base decides on every token"
        )
    prompt = given.read_prompt(prompt)

    from hat_lib.inference.generate import AdaptiveInference
    from hat_lib.inference.speed import VERSUS, check_target, check_versus

    check_versus(versus)
    target = None if target_speedup is None else check_target(target_speedup)
    hat = given.load(base, checkpoint, capacity, exit_rate, dtype)
    infer = AdaptiveInference(hat, versus)

    from transformers import TextStreamer

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
    typer.echo(GENERATED.format(**vars(out), speed=out.tokens_per_second))
    if out.predicted_speedup is not None:
        typer.echo(TARGETED.format(**vars(out), measured=_times(out.realised_speedup), against=VERSUS[versus]))
    if lossless:
        drafted = sum(s.drafted for s in out.speculation)
        typer.echo(
            f"[lossless: {drafted} drafted, {out.acceptance:.0%} accepted, {out.speculation[0].passes} passes of the "
            f"base; {_times(out.realised_speedup)} over {VERSUS[versus]}]"
        )


GENERATED = """\
[capacity {requested_capacity:.2f} requested, {capacity:.3f} realised; \
exit rate {requested_exit_rate:.2f} requested, {exit_rate:.3f} realised; \
model share {model_share:.3f}; {new_tokens} new tokens, {speed:.1f} tokens/s]"""
TARGETED = """\
[speedup {target_speedup:g} requested, {predicted_speedup:.3f} predicted, {measured} realised over {against}]"""


def _times(speedup: float | None) -> str:
    return "too short a text to measure" if speedup is None else f"{speedup:.3f}x"


# They register their commands, after those above in the help.
from hat_lib.cli.commands import evaluate, analyze, train, reproduce, sweep  # noqa: E402, F401, I001


def main() -> None:
    """The entry point of ``hat``."""
    # Read when transformers is first imported; its advice is for people who write code with it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="hat")


if __name__ == "__main__":
    main()
