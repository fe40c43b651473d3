"""Pickles, and code meant to run when a file is read, in every place where a loader looks: none of it runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tiny_runs import adaptive, tiny

from hat_lib.backbone.base import Base, load_base
from hat_lib.config import HatError, cache_dir
from hat_lib.model.checkpoint import ADAPTER_FILE, CONFIG_FILE
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.rows import RowWriter, read_rows
from hat_lib.text.blocks import load_text
from hat_lib.text.mixture import self_text
from hat_lib.training.trainer import sound_checkpoint
from hat_lib.workbook.batch import parse_grid
from soak import Found
from studies.quality import KEY, Row


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def planted(folder: Path) -> Found:
    """A pickle, plain and as stored by torch and numpy, in every place where a loader looks."""
    found, witness, base = Found(), folder / "it ran", tiny()
    plain, zipped, array = pickle.dumps(Bomb(witness)), folder / "bomb.pt", folder / "bomb.npz"
    torch.save({"a": Bomb(witness)}, zipped)
    np.savez(array, input_ids=np.array([Bomb(witness)], dtype=object))
    hat = adaptive("channel")
    hat.save_pretrained(folder / "good")
    hat.unload()
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")

    def in_checkpoint(place):
        return HierarchicalTransformer.from_pretrained(place, base).unload()

    def in_training(place):
        work = place / "checkpoint-4"
        work.mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
            shutil.copy(place / "planted", work / name)
        for name in (CONFIG_FILE, ADAPTER_FILE):
            shutil.copy(folder / "good" / name, work)
        (work / "trainer_state.json").write_text('{"global_step": 4}')
        assert sound_checkpoint(place) is None

    def text(place):
        (place / "planted").rename(place / "a")
        for suffix in (".txt", ".jsonl", ".parquet"):
            with contextlib.suppress(HatError):
                load_text(shutil.copy(place / "a", place / f"a{suffix}"), base.tokenizer)

    def rows(place):
        for read in (lambda p: read_rows(p, Row), lambda p: RowWriter(p, Row, KEY), lambda p: parse_grid(p, ["a=1"])):
            with contextlib.suppress(HatError):
                read(place / "planted")

    def gguf(place):
        load_base((place / "planted").rename(place / "a.gguf"))

    places = [
        (folder / "good", name, in_checkpoint)
        for name in (CONFIG_FILE, ADAPTER_FILE, "pytorch_model.bin", "hat_adapter.pt")
    ]
    places += [(folder / "base", name, load_base) for name in (
        "pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "adapter_model.bin", "special_tokens_map.json",
    )]  # fmt: skip
    places += [(None, "planted", load) for load in (in_training, text, rows, gguf)]
    for payload in (plain, zipped.read_bytes(), array.read_bytes()):
        for source, name, load in places:
            place = folder / "place"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(source, place) if source else place.mkdir()
            (place / name).write_bytes(payload)
            with found.case(name), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    load(place)
                finally:
                    assert not witness.exists(), "it was unpickled"
    for make in (_remote_code, _extension_type, _cached_text):
        with found.case(make.__name__), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                make(folder, witness, base)
            finally:
                assert not witness.exists(), "it ran"
    return found


def _remote_code(folder: Path, witness: Path, base: Base) -> None:
    """Code beside a base, named wherever transformers could be told to run it."""
    place = shutil.copytree(folder / "base", folder / "remote")
    code = f"import os\nos.mkdir({str(witness)!r})\n"
    (place / "custom_generate").mkdir()
    for name in ("modeling_x.py", "tokenization_x.py", "custom_generate/generate.py", "__init__.py"):
        (place / name).write_text(code)
    classes = {
        "AutoConfig": "modeling_x.C",
        "AutoModelForCausalLM": "modeling_x.M",
        "AutoTokenizer": ["tokenization_x.T"] * 2,
    }
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps(settings | {"auto_map": classes}))
    load_base(place).model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=0)


def _extension_type(folder: Path, witness: Path, base: Base) -> None:
    """A parquet file whose column is of a type that pyarrow once unpickled."""
    hidden = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb(witness)),
    }
    schema = pa.schema([pa.field("text", pa.string(), metadata=hidden)])
    pa.parquet.write_table(pa.table([["Some words, and some more."]], schema=schema), folder / "a.parquet")
    assert len(load_text(folder / "a.parquet", base.tokenizer, split="all")) == 1


def _cached_text(folder: Path, witness: Path, base: Base) -> None:
    """The cache of text sampled from the base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAT_CACHE", str(folder / "cache"))
        how = {"block_size": 8, "batch_size": 2, "progress": False}
        made = self_text(base, 16, **how)
        (kept,) = cache_dir().rglob("*.npz")
        shutil.copy(folder / "bomb.npz", kept)
        with contextlib.redirect_stderr(io.StringIO()):
            assert self_text(base, 16, **how)["input_ids"] == made["input_ids"]
