"""Damaged and hostile base folders: `load_base` loads a base that computes, or raises one `HatError` of one line."""

import json
import os
import pickle
import random
import shutil
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from hat_lib.base.load import load_base
from hat_lib.base.shapes import byte_tokenizer, random_model
from hat_lib.config import HatError

NAMES = ["x.bin", "x.pt", "x.pkl", "", 7, None, "x\0.safetensors", "x.safetensors\0.bin", "x.safetensors/../x.bin"]
NAMES += [f"{way}outside.safetensors" for way in ("../", "..\\", "sub/../../", "./../", "/", "\x1b[31m\n")]
CLASSES = ["LlamaForCausalLM", "BertModelFast", "RagRetriever", "pipeline", "AutoModel", "LlamaTokenizer", "x", 7, {}]
ODD = [("transformers_weights", name) for name in ("adapter_model.bin", *NAMES)] + [("auto_map", {"AutoConfig": "x.C"})]
KEYS = ("hidden_size", "num_hidden_layers", "head_dim", "hidden_act", "model_type", "dtype", "auto_map")
CHANGES = {"config.json": ODD + [(key, value) for key in KEYS for value in (0, -1, 3, "x", {})]}
CHANGES["tokenizer_config.json"] = [("tokenizer_class", name) for name in CLASSES]
CHANGES["model.safetensors.index.json"] = [("weight_map", {"lm_head.weight": name}) for name in NAMES]
OTHERS = ["cut", "byte", "gone", "deep", "shape", "adapter"]


def damage(folder: Path, way: str, draws: random.Random) -> None:
    file = folder / way if way in CHANGES else draws.choice(sorted(folder.iterdir()))
    if way in CHANGES:
        file.write_text(json.dumps(json.loads(file.read_text()) | dict([draws.choice(CHANGES[way])])))
    elif way == "cut":
        os.truncate(file, int(file.stat().st_size * draws.random() ** 3))
    elif way == "byte":
        content = bytearray(file.read_bytes())
        content[draws.randrange(min(len(content), 800))] = draws.randrange(256)  # of a header: any weight is a weight
        file.write_bytes(content)
    elif way == "shape":
        save_file({name: t[:-1].clone() for name, t in load_file(file).items()}, file)
    elif way == "gone":
        file.unlink()
    else:  # deep JSON, or an adapter
        (file if way == "deep" else folder / "adapter_config.json").write_text("[" * 10**5 if way == "deep" else "{}")


def run(count: int, folder: Path) -> None:
    """``count`` folders, the same on every run. A pickle that runs makes a folder, and weights from outside are NaN."""
    draws, whole, base, marker = random.Random(0), folder / "whole", folder / "base", folder / "unpickled"
    random_model("random:tiny", torch.float32).save_pretrained(whole, max_shard_size="400KB")
    byte_tokenizer().save_pretrained(whole)
    payload = pickle.dumps(type("P", (), {"__reduce__": lambda self: (os.mkdir, (str(marker),))})())
    for name in ("x.bin", "x.pt", "x.pkl", "adapter_model.bin", "pytorch_model.bin"):
        (whole / name).write_bytes(payload)
    save_file({"lm_head.weight": torch.full((260, 64), torch.nan)}, folder / "outside.safetensors")
    for number in range(count):
        shutil.copytree(whole, base)
        for way in (ways := draws.choices([*OTHERS, *2 * [*CHANGES]], k=draws.randint(1, 3))):
            with suppress(Exception):  # what cannot be read any more is damaged enough
                damage(base, way, draws)
        name = draws.choice([*[str(base)] * 9, f"{base}/../base", f"{base}\0", f"{base}/../..", "../base", "base/.."])
        with patch.object(torch, "load") as opened:  # which by weights alone would run nothing
            try:
                logits = load_base(name, dtype="fp32", device="cpu").model(torch.arange(2)[None]).logits
                assert logits.shape[:2] == (1, 2) and logits.isfinite().all(), (number, ways)
            except HatError as error:
                assert "\n" not in str(error) and name.strip("\0") in str(error), (number, ways, error)
        assert not opened.called and not marker.exists(), (number, ways)
        shutil.rmtree(base)
