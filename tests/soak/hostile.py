"""Hostile files: damaged by bytes and by structure.

A case is sound if the file is refused by a single one-line `HatError` that names it, or read correctly; whatever
happens, nothing hangs, memory does not grow, nothing is unpickled, no process starts and the base is left as it was.
Case ``n`` of a kind is the same on every run.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import signal
import sys
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from gguf_file import write_gguf
from notebook_files import notebook
from safetensors.torch import load_file
from tiny_runs import adaptive, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from hat_lib.backbone.base import Base, exact_hash, load_base
from hat_lib.backbone.shapes import byte_tokenizer
from hat_lib.config import DATA, HatError
from hat_lib.model.checkpoint import ADAPTER_FILE, CONFIG_FILE, read_checkpoint, write_checkpoint
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.rows import RowWriter, read_rows
from hat_lib.text.blocks import load_text
from hat_lib.workbook.batch import parse_grid
from soak import Found, peak_mib
from studies.quality import KEY, Row

SECONDS, MIB = 30, 1024
"""that one case may take, and add to the process's memory"""
WHOLE = [0, 1, 2, 7, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
OTHER = [
    None,
    True,
    -1,
    0,
    1,
    3,
    0.5,
    1e308,
    -1e308,
    float("inf"),
    float("nan"),
    10**30,
    2**63,
    "",
    "x",
    "0.5",
    "\ud800",
]
OTHER += [
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    [0, 2**62],
    [0, -1],
    [0] * 70,
    "F16",
    "I32",
    "F64",
    "BOOL",
    "F8_E8M0",
    "F4",
    "U64",
]


class Hang(BaseException):
    """Not an Exception, so that no loader handles it."""


# What is done to a file


def bytes_changed(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """One to three changes to the bytes, in the first ``within``."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(min(len(data), within or len(data)) + 1)
        before, byte, after = data[:at], data[at : at + 1], data[at + 1 :]
        noise, whole = rng.randbytes(rng.randrange(1, 40)), rng.choice(WHOLE).to_bytes(8, "little")
        flipped = bytes(b ^ 1 << rng.randrange(8) for b in byte)
        data = rng.choice([
            before, before + flipped + after, before + noise[:1] + after, before + noise + byte + after,
            before + after[len(noise) :], before + whole + after[7:], before + whole[:4] + after[3:],
            before + before[at // 2 :] + byte + after, after + before, noise,
        ])  # fmt: skip
    return data


def tree_changed(rng: random.Random, tree) -> None:
    """Replace, delete or add something somewhere in parsed JSON, at a leaf or a branch."""
    node, parent = tree, None
    while parent is None or (isinstance(node, dict | list) and node and rng.randrange(5)):
        parent = node
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        node = parent[key]
    what, value = rng.choice(["replace", "replace", "delete", "add"]), copy.deepcopy(rng.choice(OTHER))
    if what == "delete":
        del parent[key]
    elif what == "replace":
        parent[key] = value
    elif isinstance(parent, dict):
        parent[rng.choice(["a", "ü" * 200, f"{key}x", f"routers.{key}"])] = value
    else:
        parent.insert(key, value)


class Checkpoint:
    """The JSON of a checkpoint, with its digest or, as after an edit by hand, without."""

    file = CONFIG_FILE

    def __init__(self, folder: Path):
        self.base = tiny()
        self.frozen = exact_hash(self.base.model)
        hat = adaptive("channel")
        hat.training_summary = {"steps": 3, "loss": [0.5, 0.25], "done": True, "note": None}
        hat.save_pretrained(folder / "a folder, ünïcode 模型")
        self.path = folder / "a folder, ünïcode 模型" / self.file
        self.pristine = read_checkpoint(self.path.parent)
        self.good = {name: (self.path.parent / name).read_bytes() for name in (CONFIG_FILE, ADAPTER_FILE)}

    def damage(self, rng: random.Random) -> None:
        for name, data in self.good.items():
            (self.path.parent / name).write_bytes(data)
        data = self.good[self.file]
        self.path.write_bytes(bytes_changed(rng, data) if rng.random() < 0.4 else self.restructured(rng, data))

    def restructured(self, rng: random.Random, data: bytes) -> bytes:
        meta = json.loads(data)
        if rng.random() < 0.5:
            del meta["sha256"]
        for _ in range(rng.choice([1, 1, 2])):
            tree_changed(rng, meta)
        return json.dumps(meta).encode()

    def load(self) -> None:
        folder = self.path.parent
        try:
            hat = HierarchicalTransformer.from_pretrained(folder, self.base)
            with torch.inference_mode():
                assert hat.lm(torch.arange(24)[None] + 30).logits.isfinite().all()
            hat.unload()
            self.as_it_should_be(folder)
            write_checkpoint(folder, read_checkpoint(folder))  # whatever loads can be saved
        finally:
            assert exact_hash(self.base.model) == self.frozen and "forward" not in vars(self.base.model.model.layers[0])

    def as_it_should_be(self, folder: Path) -> None:
        meta, before = json.loads(self.path.read_bytes()), json.loads(self.good[CONFIG_FILE])
        assert "sha256" not in meta or meta == before, "a change was not noticed"


class Adapter(Checkpoint):
    """The tensors of a checkpoint. The JSON has their hash, so that only their contents can give them away."""

    file = ADAPTER_FILE

    def damage(self, rng: random.Random) -> None:
        super().damage(rng)
        meta = json.loads(self.good[CONFIG_FILE])
        if rng.random() < 0.8:
            del meta["sha256"]
            meta["adapter_sha256"] = hashlib.sha256(self.path.read_bytes()).hexdigest()
        (self.path.parent / CONFIG_FILE).write_text(json.dumps(meta))

    def restructured(self, rng: random.Random, data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8:start]), data[start:]
        for _ in range(rng.choice([0, 1, 1, 2])):
            tree_changed(rng, header)
        if rng.random() < 0.2:
            body = bytes_changed(rng, body)
        text = json.dumps(header).encode()
        size = len(text) if rng.random() < 0.9 else rng.choice(WHOLE)
        return size.to_bytes(8, "little") + text + body

    def as_it_should_be(self, folder: Path) -> None:
        found, expected = read_checkpoint(folder).tensors, load_file(self.path)
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in self.pristine.tensors.items()}
        assert all(torch.equal(t, expected[n]) and t.isfinite().all() for n, t in found.items())


def very_small() -> Base:
    """A Llama whose file is mostly its header."""
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=8, intermediate_size=8, vocab_size=260, num_attention_heads=1,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    lm = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in lm.parameters():
            p.copy_(torch.linspace(-0.3, 1, p.numel()).view_as(p))
    return Base(lm, byte_tokenizer(), "", "")


class Gguf:
    """A GGUF file of a very small Llama, usually damaged in its header."""

    def __init__(self, folder: Path):
        self.path = folder / "small.gguf"
        write_gguf(very_small(), self.path)
        self.good = self.path.read_bytes()

    def damage(self, rng: random.Random) -> None:
        self.path.write_bytes(bytes_changed(rng, self.good, rng.choice([24, 2000, 9000, None])))

    def load(self) -> None:
        base = load_base(self.path, dtype="fp32", device="cpu")
        assert base.model(torch.arange(5)[None] % base.model.config.vocab_size).logits.dim() == 3


class Folder(Gguf):
    """A folder as save_pretrained writes it: damaged in a JSON file, or in the header of the weights."""

    def __init__(self, folder: Path):
        self.path = folder / "small"
        base = very_small()
        for part in (base.model, base.tokenizer):
            part.save_pretrained(self.path)
        self.good = {path: path.read_bytes() for path in sorted(self.path.iterdir())}

    def damage(self, rng: random.Random) -> None:
        for path, data in self.good.items():
            path.write_bytes(data)
        path = rng.choice([self.path / "config.json", *self.good])
        if path.suffix == ".json" and rng.random() < 0.7:
            tree = json.loads(self.good[path])
            for _ in range(rng.choice([1, 1, 2])):
                tree_changed(rng, tree)
            path.write_text(json.dumps(tree))
        else:
            path.write_bytes(bytes_changed(rng, self.good[path], 3000))


class Corpus:
    """A .txt, .jsonl or .parquet file."""

    def __init__(self, folder: Path):
        self.folder, self.tokenizer = folder, byte_tokenizer()
        texts = ["The first text, of some words.", "Zweiter Text: Grüße, 第二行.", "The third one.\nOf two lines."]
        (folder / "a.txt").write_text("\n\n".join(texts))
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": t, "n": [1, {"a": None}]}) + "\n" for t in texts))
        pa.parquet.write_table(pa.table({"text": texts, "n": [1, 2, 3]}), folder / "a.parquet")
        self.texts = {path: path.read_bytes() for path in sorted(folder.iterdir())}
        self.path = folder / "a.txt"

    def damage(self, rng: random.Random) -> None:
        self.path, data = rng.choice(list(self.texts.items()))
        if self.path.suffix == ".jsonl" and rng.random() < 0.5:
            rows = [json.loads(line) for line in data.splitlines()]
            tree_changed(rng, rows)
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        else:
            data = bytes_changed(rng, data)
        self.path.write_bytes(data)

    def load(self) -> None:
        rows = load_text(self.path, self.tokenizer, split="all", block_size=16)
        assert all(2 <= len(ids) <= 16 and min(ids) >= 0 and max(ids) < 260 for ids in rows["input_ids"])


class Notebook:
    """A notebook passed to batch: its parameters are read, but none of its code is run."""

    def __init__(self, folder: Path):
        self.path = notebook(folder / "a.ipynb", "import os\nos.mkdir('run')", "1 / 0")
        self.good = self.path.read_bytes()

    def damage(self, rng: random.Random) -> None:
        if rng.random() < 0.6:
            nb = json.loads(self.good)
            for _ in range(rng.choice([1, 1, 2])):
                tree_changed(rng, nb)
            self.path.write_text(json.dumps(nb))
        else:
            self.path.write_bytes(bytes_changed(rng, self.good))

    def load(self) -> None:
        assert parse_grid(self.path, ["capacity=0.4,0.7"]) == [{"capacity": 0.4}, {"capacity": 0.7}]


class Csv:
    """A file of results: whatever is read can be written again as the same rows."""

    def __init__(self, folder: Path):
        self.path = folder / "quality.csv"
        self.good = b"".join((DATA / "results" / "quality.csv").read_bytes().splitlines(keepends=True)[:6])

    def damage(self, rng: random.Random) -> None:
        lines = [line.split(b",") for line in self.good.split(b"\n")]
        if rng.random() < 0.5:
            row = rng.choice(lines)
            row[rng.randrange(len(row))] = rng.choice(
                [b"", b"nan", b"1e999", b"=1+1", b'"', b"a\0b", b"9" * 5000, b"\xff"]
            )
            self.path.write_bytes(b"\n".join(b",".join(line) for line in lines))
        else:
            self.path.write_bytes(bytes_changed(rng, self.good))

    def load(self) -> None:
        before, rows = self.path.read_bytes(), read_rows(self.path, Row)
        try:
            with RowWriter(self.path, Row, KEY) as writer:
                assert repr(list(writer.done.values())) == repr(rows)
        except HatError:
            assert self.path.read_bytes() == before, "a refused file was changed"
            raise


KINDS = {"checkpoint JSON": Checkpoint, "checkpoint tensors": Adapter, "GGUF": Gguf, "base folders": Folder,
         "corpora": Corpus, "notebooks for batch": Notebook, "result CSVs": Csv}  # fmt: skip

# What must not happen

_armed: list[str] | None = None
ACTS = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


def _listen(event: str, args) -> None:
    if _armed is not None and event in ACTS:
        _armed.append(f"{event} {args[:2]}")


sys.addaudithook(_listen)  # cannot be removed, but does nothing until armed


@contextlib.contextmanager
def nothing_runs():
    """Raises AssertionError if something is unpickled, a process starts, or time runs out."""
    global _armed

    def late(*_):
        raise Hang(f"more than {SECONDS} s")

    _armed, before = [], signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except Hang as hang:
        raise AssertionError(str(hang)) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        acts, _armed = _armed, None
    assert not acts, f"it ran: {acts}"


def fuzz(kind: str, count: int, folder: Path, first: int = 0) -> Found:
    """Cases of a kind from ``first`` on; a failing case can be reproduced from its number."""
    target, found, before = KINDS[kind](folder), Found(), peak_mib()
    for number in range(first, first + count):
        target.damage(random.Random(f"{kind} {number}"))
        with found.case(f"{kind} {number}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with nothing_runs():
                    target.load()
            except HatError as error:
                assert str(target.path.parent) in str(error) or target.path.name in str(error), f"unnamed: {error}"
                raise
            assert peak_mib() - before < MIB, "memory"
    return found
