"""Load: many generations in one process, the end of the context, ragged batches, and threads on two models.

Memory is read fifty times after the first tenth; its slope is in KiB per generation. Slowdown is the median CPU time
of the last tenth over that of the first, so that other work on the machine does not count.
"""

from __future__ import annotations

import gc
import resource
import statistics
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from notebook_files import notebook
from tiny_runs import page, random_blocks, skipping, tiny_run
from transformers import DynamicCache

from hat_lib.config import DATA
from hat_lib.model.checkpoint import ADAPTER_FILE
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.rows import read_rows
from hat_lib.training.run import train
from hat_lib.workbook.batch import BatchRow, Local, batch
from soak import Found
from soak.faults import sweeping

MOST_KIB, MOST_SLOWDOWN = 2.0, 1.3


def resident_kib() -> float:
    """Memory this process uses now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1024


def generations(count: int, model: str = "tiny", path: str = "engine") -> Found:
    """Texts of 16 tokens after prompts of 4 to 16, one after the other."""
    bundled = DATA / "checkpoints" / "default"
    hat = skipping("channel") if model == "tiny" else HierarchicalTransformer.from_pretrained(bundled)
    found, seconds, memory = Found(), [], []
    how = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    prompts = [torch.tensor([block[: 4 + n % 13]]) for n, block in enumerate(random_blocks(26))]
    looks = set(np.linspace(count // 10, count - 1, 50).astype(int).tolist())
    with hat.reference() if path == "reference" else nullcontext(), torch.no_grad():
        for n in range(-3, count):  # the first ones compile and allocate
            start = time.process_time()
            out = hat.lm.generate(prompts[n % 26], **how)
            if n >= 0:
                seconds.append(time.process_time() - start)
            if n in looks:
                gc.collect()
                memory.append((n, resident_kib()))
        found.cases = count
        assert out.shape[1] - prompts[n % 26].shape[1] == 16 and (hat.trace.executed is None) == (path == "reference")
    tenth = max(1, count // 10)
    found.slowdown = round(statistics.median(seconds[-tenth:]) / statistics.median(seconds[:tenth]), 3)
    found.kib_per_case = round(float(np.polyfit(*np.array(memory).T, 1)[0]), 3) if len(memory) > 1 else None
    if count >= 200:
        if found.slowdown > MOST_SLOWDOWN:
            found.fail("slowdown", ValueError(found.slowdown))
        if found.kib_per_case > MOST_KIB and count >= 1000:
            found.fail("memory", ValueError(f"{found.kib_per_case} KiB a generation"))
    return found


def context_limit(length: int = 2048) -> Found:
    """A prompt as long as the context, and a cache that grows to that length token by token, on both paths."""
    found, hat = Found(), skipping("channel", exit_layers=())
    ids = torch.tensor(random_blocks(1, length))
    with torch.no_grad():
        with hat.record(), hat.reference():
            expected = hat.lm(ids).logits[0, -1]
        masks = hat.trace.masks
        for path in (nullcontext, hat.reference):
            with found.case(f"{length} tokens, {path.__name__}"), path(), hat.force(masks):
                cache = DynamicCache(config=hat.lm.config)
                for step in ids.split(1, dim=1):
                    logits = hat.lm(step, cache=cache, use_cache=True).logits[0, -1]
                assert (
                    cache.get_seq_length() == length and (logits - expected).abs().max() < 1e-4 * expected.abs().max()
                )
        with found.case("a prompt to the last token"):
            out = hat.lm.generate(ids[:, :-1], max_new_tokens=1, do_sample=False, pad_token_id=0)
            assert out.shape[1] == length
    return found


def ragged(rows: int = 64) -> Found:
    """A batch of prompts of all lengths: each row's text is that of the row alone, in the dense model."""
    found, hat = Found(), skipping("channel")
    prompts = [block[: 1 + 7 * n % 32] for n, block in enumerate(random_blocks(rows))]
    width, how = max(map(len, prompts)), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[258] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad(), hat.dense():
        together = hat.lm.generate(ids, attention_mask=mask, **how)[:, width:]
        for n, prompt in enumerate(prompts):
            with found.case(f"row {n}"):
                alone = hat.lm.generate(torch.tensor([prompt]), **how)[0, len(prompt) :]
                assert torch.equal(together[n, : len(alone)], alone)
    return found


def threads(rounds: int = 20, count: int = 8) -> Found:
    """Eight threads generate with two models at two capacities: each text is what a single thread writes."""
    found, hats, barrier = (
        Found(),
        [skipping("channel"), skipping("channel", exit_layers=(2,))],
        threading.Barrier(count),
    )
    ids = torch.tensor(random_blocks(count, 8))

    @torch.no_grad()
    def text(n):
        hat = hats[n % 2]
        with hat.at((0.7, 1.0)[n // 2 % 2]):
            return hat.lm.generate(ids[n : n + 1], max_new_tokens=12, do_sample=False, pad_token_id=0)

    expected, wrong = [text(n) for n in range(count)], []

    def work(n):
        barrier.wait()
        for _ in range(rounds):
            try:
                if not torch.equal(text(n), expected[n]):
                    wrong.append((f"thread {n}", AssertionError("another text")))
            except Exception as error:
                wrong.append((f"thread {n}", error))

    working = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    found.cases = rounds * count
    for failure in wrong:
        found.fail(*failure)
    return found


def notebooks(count: int, folder: Path) -> Found:
    """Notebooks that load a model and generate, all at once."""
    source = notebook(
        folder / "a.ipynb",
        "from hat_lib.backbone.base import load_base\nbase = load_base('random:tiny')",
        "import torch\nbase.model.generate(torch.tensor([[5, 6]]), max_new_tokens=steps, pad_token_id=0)",
    )
    found = Found()
    for row in batch(source, [{"steps": n + 2} for n in range(count)], folder / "out", Local(count), threads=1):
        with found.case(row.run):
            assert row.status == "ok" and row.attempts == 1, row.error
    assert len(read_rows(folder / "out" / "runs.csv", BatchRow)) == count
    return found


def determinism(folder: Path, counts: tuple[int, ...] = (1, 2, 3)) -> Found:
    """The same measurement with any number of threads, and the same training with the same number, give the same files
    byte for byte. Training with another number of threads may round differently, which the note then says."""
    found, made, before, text = Found(), {}, torch.get_num_threads(), page(folder)
    for count in (counts[0], *counts):
        torch.set_num_threads(count)
        out = folder / f"{len(made)} {count}"
        out.mkdir()
        sweeping(out, folder)
        train(tiny_run("channel", text, steps=3), out / "run", progress=False)
        made[out] = [(out / "rows.csv").read_bytes(), (out / "run" / ADAPTER_FILE).read_bytes()]
    torch.set_num_threads(before)
    first, *others = made.values()
    for name, (rows, trained) in zip(list(made)[1:], others, strict=True):
        with found.case(f"{name.name[2:]} threads"):
            assert rows == first[0], "another CSV"
            if trained != first[1]:
                assert not name.name.endswith(f" {counts[0]}"), "the same training ends otherwise"
                found.note = (
                    found.note or f"a training with {name.name[2:]} threads ends otherwise than with {counts[0]}"
                )
    return found
