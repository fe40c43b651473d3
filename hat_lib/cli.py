"""The command line: ``hat setup | calibrate | generate | evaluate ...``, also ``python -m hat_lib``.

Each command checks what it was given before it loads a model; bad input becomes one line on stderr and exit
code 2. torch is imported inside the commands, so that ``hat --help`` answers at once.
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import Annotated

import typer

from . import __version__
from . import arguments as take
from .config import GRANULARITIES, HatConfig, HatError, check_capacity
from .console import app

FOUR_BIT = "the bundled base is a 4-bit file, dequantised; its perplexity is not that of the published weights"


@app.command()
def setup(
    fetch: Annotated[bool, take.option("Fetch the bundled base (93 MB) and texts (7 MB) if missing.")] = True,
    quiet: Annotated[bool, take.option("No report: say only what is fetched, or fails.", "--quiet")] = False,
) -> None:
    """Fetch the base and the texts, report the environment."""
    from .report import environment, fetch_bundled, lines

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
    take.check_count("tokens", tokens, 256)
    take.check_count("probe tokens", probe_tokens, 16)
    take.check_writable(save)

    from .base import load_base, parse_dtype
    from .calibrate import calibrate as measure
    from .model import HierarchicalTransformer
    from .text import held_out, text_hash

    parse_dtype(dtype)
    take.check_text(text, "validation")
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
    max_new_tokens: take.MaxNewTokens = 64,
    dtype: take.Dtype = None,
    temperature: take.Temperature = 0.0,
    seed: take.Seed = 0,
) -> None:
    """Continue a prompt, and say how much was executed.

    The text appears as it comes; the last line has requested and realised capacity,
    and the speed over prompt and new tokens together.
    """
    take.check_count("max new tokens", max_new_tokens, 1)
    take.check_count("seed", seed, 0)
    if not 0 <= temperature < math.inf:
        raise HatError(f"temperature must be a finite number of at least 0, got {temperature}")
    prompt = take.read_prompt(prompt)
    hat = take.load(base, checkpoint, capacity, exit_rate, dtype)

    import torch
    from transformers import TextStreamer

    from .state import TokenState

    lm, tokenizer = hat.lm, hat.base.tokenizer
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False).to(lm.device)
    given, context = inputs.input_ids.shape[1], lm.config.max_position_embeddings
    if given + max_new_tokens > context:
        raise HatError(
            f"{given} prompt tokens + {max_new_tokens} new ones exceed the context of {hat.base.name}: {context}"
        )
    torch.manual_seed(seed)
    start = time.perf_counter()
    with hat.collect() as states, torch.inference_mode():
        out = lm.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}),
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    seconds = time.perf_counter() - start
    new, trace = out.shape[1] - given, TokenState.cat(states)
    typer.echo(
        f"[capacity {hat.capacity:.2f} requested, {trace.capacity:.3f} realised; "
        f"exit rate {hat.exit_rate:.2f} requested, {trace.exit_rate:.3f} realised; "
        f"{new} new tokens, {new / seconds:.1f} tokens/s]"
    )


@app.command()
def evaluate(
    base: take.Base = None,
    checkpoint: take.Checkpoint = None,
    text: take.Text = "addresses",
    split: take.Split = "test",
    capacity: take.Capacity = None,
    exit_rate: take.ExitRate = None,
    max_tokens: take.MaxTokens = 4000,
    dtype: take.Dtype = None,
    as_json: take.AsJson = False,
) -> None:
    """Perplexity against the base, with its 95 % interval.

    Both are scored on the same blocks, and the interval is a paired one.
    """
    take.check_count("max tokens", max_tokens, 2)
    take.check_shares(capacity, exit_rate)
    take.check_text(text, split)
    hat = take.load(base, checkpoint, capacity, exit_rate, dtype)

    import torch

    from .evaluate import compare, score
    from .text import load_text, text_hash

    blocks = load_text(text, hat.base.tokenizer, split=split, max_tokens=max_tokens)
    with hat.dense():
        dense = score(hat, blocks)
    adaptive = score(hat, blocks)
    paired = compare(dense, adaptive)
    row = {
        "hat_lib": __version__,
        "base": hat.base.name,
        "base_fingerprint": hat.base.fingerprint[:16],
        "granularity": hat.config.granularity,
        "calibrated_on": hat.calibration.text if hat.calibration else "",
        "text": text,
        "split": split,
        "text_hash": text_hash(blocks)[:16],
        "tokens": paired.tokens,
        "blocks": paired.n_blocks,
        "requested_capacity": hat.capacity,
        "capacity": adaptive.capacity,
        "requested_exit_rate": hat.exit_rate,
        "exit_rate": adaptive.exit_rate,
        "model_share": adaptive.model_share,
        "base_perplexity": paired.base_ppl,
        "perplexity": paired.ppl,
        "increase": paired.increase,
        "increase_low": paired.low,
        "increase_high": paired.high,
        "device": hat.base.device.type,
        "dtype": str(hat.base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "note": FOUR_BIT if hat.base.name == "bundled" else "",
    }
    if as_json:
        typer.echo(json.dumps(row))
    else:
        typer.echo(EVALUATED.format(**row) + (f"\nnote         {row['note']}" if row["note"] else ""))


EVALUATED = """\
{text}, {split} split: {tokens} tokens in {blocks} blocks, SHA-256 {text_hash}
perplexity   {base_perplexity:.3f} for the base {base} ({dtype}), {perplexity:.3f} for the model
increase     {increase:+.2%}, 95 % interval {increase_low:+.2%} to {increase_high:+.2%}
capacity     {requested_capacity:.2f} requested, {capacity:.3f} realised
exit rate    {requested_exit_rate:.2f} requested, {exit_rate:.3f} realised
model share  {model_share:.3f} of the dense model's work, head and routers included"""


from . import runs, results  # noqa: E402, F401, I001 - register their commands, after those above in the help


def main() -> None:
    """The entry point of ``hat``."""
    # Read when transformers is first imported; its advice is for people who write code with it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="hat")


if __name__ == "__main__":
    main()
