"""What the commands take: each option with the words that explain it.

torch is not imported here, so that help answers at once; what was given is checked by `hat_lib.cli.validation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hat_lib.config import DATA

CHECKPOINTS = DATA / "checkpoints"
CALIBRATED = CHECKPOINTS / "calibrated"
"""a reference checkpoint of the bundled base, which comes with the repository"""

BASE_HELP = "bundled, a Hub id (owner/name), a folder with safetensors, a .gguf file, or random:tiny"
TEXT_HELP = "addresses, docstrings, a .txt, .jsonl or .parquet file, or a Hub dataset (owner/name[:config])"
CAPACITY_HELP = "share of the routable work to execute, 0.1-1.0, where 1.0 runs everything"
DTYPES_HELP = "fp32, bf16 or fp16"


def option(words: str, *names: str, **settings):
    return typer.Option(*names, help=words, **settings)


Base = Annotated[
    str | None, option(f"The frozen Llama: {BASE_HELP}. [default: the one the checkpoint names, or bundled]")
]
Checkpoint = Annotated[
    Path | None,
    option(
        "Folder that `hat calibrate` wrote. [default: the one that comes with the bundled base; capacity 1.0 "
        "needs none]"
    ),
]
# Strings, so that a wrong number gets the library's own message.
Capacity = Annotated[
    str | None, option(f"Compute per token: {CAPACITY_HELP}. [default: the checkpoint's]", metavar="SHARE")
]
ExitRate = Annotated[
    str | None,
    option(
        "Share of tokens to leave before the last layer, 0-1, where 0 is off; above 0 needs a checkpoint with "
        "trained exit gates. [default: the checkpoint's]",
        metavar="SHARE",
    ),
]
Dtype = Annotated[
    str | None,
    option(f"{DTYPES_HELP}. [default: bf16 where the hardware computes in it, else fp32]"),
]

# hat calibrate
Save = Annotated[Path, option("Folder to write the checkpoint to; an older one in it is replaced.")]
BundledBase = Annotated[str, option(f"The frozen Llama: {BASE_HELP}.")]
HeldOutText = Annotated[str, option(f"Whose train and validation splits to measure on: {TEXT_HELP}.")]
Granularity = Annotated[
    str,
    option(
        "What a router decides about, per token: channel (an input channel of a linear layer) or token (the "
        "whole FFN; the published method)."
    ),
]
Tokens = Annotated[int, option("Tokens of text for the scores, at least 256; more is steadier and slower.")]
ProbeTokens = Annotated[
    int, option("Tokens for how sensitive the output is to each layer (backward passes), at least 16.")
]
PassDtype = Annotated[str, option(f"Of the passes: {DTYPES_HELP}. The thresholds serve every dtype.")]
DefaultCapacity = Annotated[
    str | None,
    option(
        f"Default of the checkpoint, which serves every capacity: {CAPACITY_HELP}. [default: 0.75 for channel, "
        "0.55 for token]",
        metavar="SHARE",
    ),
]

# hat generate
Prompt = Annotated[str, option("Text to continue, as it is, without a chat template; - reads stdin.")]
MaxNewTokens = Annotated[int, option("Most tokens to add, at least 1; an end-of-text token stops earlier.")]
Temperature = Annotated[
    float, option("0 takes the likeliest token (greedy); above 0 samples from the whole distribution.")
]
TargetSpeedup = Annotated[
    str | None,
    option(
        "In place of a capacity: decode this many times as fast, at the largest capacity that does.", metavar="TIMES"
    ),
]
Versus = Annotated[
    str, option("What speedups are held against: dense (our own dense path) or hf (plain transformers).")
]
Lossless = Annotated[bool, option("The base's own text: the adaptive model drafts, the base decides.", "--lossless")]
ShowCompute = Annotated[
    bool, option("Show the new tokens once more, coloured by the work that chose each.", "--show-compute")
]
Seed = Annotated[int, option("Seed of the sampling, at least 0; greedy has no use for it.")]

# hat evaluate
Text = Annotated[str, option(f"What to measure on: {TEXT_HELP}.")]
Split = Annotated[str, option("Part of the text: train, validation or test.")]
MaxTokens = Annotated[int, option("Tokens of text, at least 2; more makes the interval narrower.")]
Documents = Annotated[bool, option("Also a line for each document.", "--documents")]
Tasks = Annotated[
    str | None,
    option(
        "Instead of a text: tasks of lm-evaluation-harness, comma-separated, such as address_cloze and "
        'address_perplexity. Needs pip install -e ".[eval]".',
        metavar="NAMES",
    ),
]
TasksPath = Annotated[
    Path | None,
    option(
        "Folder of the tasks: YAML files, with their data. Python that a task names is run. [default: data/tasks]",
        metavar="DIR",
    ),
]
BatchSize = Annotated[int, option("Blocks or requests a forward, at least 1; changes no result beyond rounding.")]
AsJson = Annotated[bool, option("Print one JSON object on stdout and nothing else.", "--json")]

# hat sweep
ChannelTrained = Annotated[Path, option("Trained checkpoint of the channel grain.")]
TokenTrained = Annotated[Path, option("Trained checkpoint of the token grain.")]
ChannelUntrained = Annotated[Path, option("Calibrated, untrained checkpoint of the channel grain, as a control.")]
TokenUntrained = Annotated[Path, option("Calibrated, untrained checkpoint of the token grain, as a control.")]
Grains = Annotated[str, option("Which grains to measure, comma-separated: channel, token.", metavar="GRAINS")]

SweepOut = Annotated[Path, option("CSV file; rows that it holds are kept. The figure goes beside it.")]
SweepCapacities = Annotated[str, option("Capacities, 0.1-1.0, comma-separated.", "--capacity", metavar="SHARES")]
SweepRates = Annotated[str, option("Exit rates, 0-1, comma-separated.", "--exit-rate", metavar="SHARES")]
SweepSeeds = Annotated[str, option("Seeds of what is drawn at random, comma-separated.", "--seed", metavar="SEEDS")]
SweepTexts = Annotated[str, option(f"Texts, comma-separated; each {TEXT_HELP}.", metavar="TEXTS")]
SweepVariants = Annotated[str, option("The trained model and its controls, comma-separated.", metavar="NAMES")]

# hat train
Phase = Annotated[
    str, option("routers, exit (gates alone; needs --checkpoint with trained routers), or full: one after the other.")
]
RunFolder = Annotated[Path | None, option("Folder of a new run: checkpoint, log.csv and run.json.", "--save")]
Resume = Annotated[
    Path | None,
    option("Folder of a run that was stopped: go on where it stopped, as it was asked for.", "--resume", metavar="DIR"),
]
TrainedBase = Annotated[str, option(f"The frozen Llama: {BASE_HELP}.")]
TrainingText = Annotated[
    str,
    option(
        "Sources joined by +: self (text that the base writes itself) and train splits of addresses, a .txt, .jsonl or "
        ".parquet file or a Hub dataset. [default: addresses+self; quick: addresses]"
    ),
]
TrainedGrain = Annotated[
    str,
    option(
        "What a router decides about, per token: channel (an input channel of a linear layer) or token (the whole "
        "FFN; the published method)."
    ),
]
RecipeName = Annotated[
    str, option("Hyperparameters: default (what worked best for the grain) or published (token grain alone).")
]
Profile = Annotated[str, option("quick (a few minutes on two cores) or full.")]
MaxMinutes = Annotated[
    float | None, option("Stop after this many minutes, saved; --resume goes on. [default: no limit]", metavar="M")
]
Start = Annotated[
    Path | None,
    option(
        "Checkpoint to start from, instead of nothing: its calibration (channel grain), or its routers (phase exit).",
        "--checkpoint",
    ),
]
TrainDtype = Annotated[str, option(f"Of the frozen base: {DTYPES_HELP}. What is trained is fp32 in any case.")]
Settings = Annotated[
    list[str] | None,
    option("Change one hyperparameter; may be repeated: --set router_lr=1e-3 --set tokens=50000.", "--set",
           metavar="NAME=VALUE"),
]  # fmt: skip


# hat batch
BatchNotebook = Annotated[
    str, typer.Argument(metavar="NOTEBOOK", help="A path, or a number or name in notebooks/.", show_default=False)
]
Grid = Annotated[
    list[str],
    option(
        "Values of one of the notebook's parameters; repeated, every combination runs: --grid capacity=0.4,0.7 "
        "--grid seed=0,1,2.",
        "--grid",
        metavar="NAME=VALUE,...",
    ),
]
BatchOut = Annotated[Path, option("New folder, or that of the same notebook's batch to go on with.", metavar="DIR")]
Engine = Annotated[
    str, option("local (processes on this machine) or dask (the workers of --scheduler).", metavar="ENGINE")
]
Scheduler = Annotated[str | None, option("Address of a Dask scheduler.", metavar="tcp://HOST:PORT")]
Jobs = Annotated[
    int | None,
    option("Runs at once, each with a model of its own; 1 suits a GPU. [default: one for each core]", metavar="N"),
]
KernelThreads = Annotated[
    int | None, option("Threads that each run computes with. [default: cores / runs at once]", metavar="N")
]
Retries = Annotated[int, option("Further attempts for a run that failed or whose worker was killed.")]
CellTimeout = Annotated[int, option("Seconds that one cell may take.")]

# hat analyze
AnalysisOut = Annotated[
    Path | None,
    option("Also write tables (CSV), figures (PNG) and coloured text (HTML) to this folder.", metavar="DIR"),
]
