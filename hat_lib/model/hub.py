"""Checkpoints on the Hugging Face Hub: two small files and a model card, never the base.

    hat = HierarchicalTransformer.from_pretrained("owner/name")
    hat.push_to_hub("owner/name", private=True)

A connection is opened only to push, or to load a name that is not a local path. This module and the Hub's client are
imported only when needed.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

from hat_lib import __version__
from hat_lib.backbone.base import BUNDLED, HUB_ID, first_line
from hat_lib.backbone.shapes import SHAPES
from hat_lib.config import HatError
from hat_lib.model.checkpoint import ADAPTER_FILE, CONFIG_FILE, Checkpoint, read_checkpoint, write_checkpoint

CARD_FILE = "README.md"
# What the bundled base was made from, for the card's link.
BUNDLED_SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"

CARD = """\
---
{front}
---

# {name}

Routers and exit gates for a frozen Llama, which then spends compute per token. These files hold the small
trained parts alone; the base is loaded from where it lives, and checked against its fingerprint.

```python
from hat_lib import HierarchicalTransformer

hat = HierarchicalTransformer.from_pretrained("{repo_id}")
hat.lm.generate(...)  # transformers' own LlamaForCausalLM
```

| | |
|---|---|
"""


def local_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint; one that is named ``owner/name`` and is not a local path comes from the Hub, just its
    two files and the card, into the Hub's own cache. Raises `HatError` if they can't be fetched."""
    if not isinstance(checkpoint, str | os.PathLike):
        raise HatError(f"a checkpoint must be a folder, or owner/name on the Hub, got {checkpoint!r}")
    repo_id = checkpoint.as_posix() if isinstance(checkpoint, Path) else str(checkpoint)
    if os.path.exists(repo_id) or not HUB_ID.fullmatch(repo_id):
        return Path(checkpoint)
    import huggingface_hub

    files = [CONFIG_FILE, ADAPTER_FILE, CARD_FILE]
    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=files))
    except Exception as error:  # whatever a dead network or a refusal raises, inside two libraries
        why = f"{first_line(error)}; offline, pass a local folder with {CONFIG_FILE} and {ADAPTER_FILE}"
        raise HatError(f"no folder {repo_id}, and it can't be fetched from the Hub: {why}") from error
    if not (folder / CONFIG_FILE).is_file():
        raise HatError(f"{repo_id} on the Hub is not a HAT checkpoint: {CONFIG_FILE} is missing")
    return folder


def push_to_hub(
    checkpoint, repo_id: str, *, private: bool = False, token: str | None = None, base_model: str | None = None
) -> str:
    """Upload routers, gates, config, calibration and training summary; returns the commit's address.

    Args:
        checkpoint: a folder, or a model with `save_pretrained`.
        repo_id: ``owner/name``; created if it does not exist. An existing card is kept.
        private: for a new repository. One that is already public is refused, rather than written to.
        token: None takes the one that ``hf auth login`` stored.
        base_model: Hub id to load the base by, needed if the checkpoint names a local path.

    Raises `HatError` if the checkpoint is invalid (before any connection), or the Hub refuses or can't be reached.
    """
    for what, name in {"repo_id": repo_id, "base_model": repo_id if base_model is None else base_model}.items():
        if not isinstance(name, str) or not HUB_ID.fullmatch(name):
            raise HatError(f"{what} must be a Hub id (owner/name), got {name!r}")
    with tempfile.TemporaryDirectory() as scratch:
        source, folder = Path(scratch, "source"), Path(scratch, "upload")
        if hasattr(checkpoint, "save_pretrained"):
            checkpoint.save_pretrained(source)
        found = read_checkpoint(source if hasattr(checkpoint, "save_pretrained") else checkpoint)
        found = replace(found, base=base_model or _public_name(found.base))
        # A folder of its own: only what `write_checkpoint` writes is uploaded, and never a base weight.
        write_checkpoint(folder, found)
        import huggingface_hub

        try:
            api = huggingface_hub.HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise HatError(f"{repo_id} is public on the Hub, but private=True was asked for: nothing was uploaded")
            if not api.file_exists(repo_id, CARD_FILE):
                (folder / CARD_FILE).write_text(model_card(found, repo_id), encoding="utf-8")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a HAT checkpoint"))
        except HatError:
            raise
        except Exception as error:  # as above
            why = f"{first_line(error)}; offline, hand on the folder that save_pretrained writes"
            raise HatError(f"cannot push to {repo_id} on the Hub: {why}") from error


def model_card(checkpoint: Checkpoint, repo_id: str) -> str:
    """Markdown with YAML front matter: what the files are, what they need and how to load them."""
    from huggingface_hub import ModelCardData

    base, config, calibration = checkpoint.base, checkpoint.config, checkpoint.calibration
    front = ModelCardData(license="mit", library_name="hat_lib", tags=["hat", "adaptive-computation", "llama"])
    if base not in SHAPES:
        front.base_model, front.base_model_relation = BUNDLED_SOURCE if base == BUNDLED else base, "adapter"
    table = {
        "base": f"{base}, fingerprint {checkpoint.base_fingerprint[:16]}...",
        "parameters": f"{sum(tensor.numel() for tensor in checkpoint.tensors.values()):,}",
        "granularity": config.granularity,
        "default capacity": config.capacity,
        "exit layers": ", ".join(map(str, config.exit_layers)) or "none",
        "calibrated on": (calibration.text or "an unnamed text").replace("|", "/") if calibration else "nothing yet",
        "written by": f"hat_lib {__version__}",
    }
    head = CARD.format(front=front.to_yaml(), name=repo_id.split("/")[1], repo_id=repo_id)
    return head + "".join(f"| {name} | {value} |\n" for name, value in table.items())


def _public_name(base: str) -> str:
    if base == BUNDLED or base in SHAPES or (HUB_ID.fullmatch(base) and not Path(base).exists()):
        return base
    raise HatError(f"the checkpoint's base is the local path {base}: pass base_model=, the Hub id of the same base")
