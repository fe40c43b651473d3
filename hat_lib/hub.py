"""A checkpoint on the Hugging Face Hub, with a model card."""

import tempfile
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import huggingface_hub

from hat_lib.base.load import BUNDLED, HUB_ID
from hat_lib.base.shapes import SHAPES
from hat_lib.checkpoint import Checkpoint, write_checkpoint
from hat_lib.config import HatError

CARD_FILE = "README.md"
BUNDLED_SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def push_to_hub(
    checkpoint: Checkpoint, repo_id: str, *, private: bool = False, token: str | None = None,
    base_model: str | None = None,
) -> str:  # fmt: skip
    """Upload a checkpoint, with a model card, to the Hugging Face Hub; returns the commit's address.

    Args:
        repo_id: ``owner/name``; created if it does not exist. An existing card is kept.
        private: for a new repository. One that is already public is refused, rather than written to (`HatError`).
        token: None takes the one that ``hf auth login`` stored.
        base_model: Hub id to load the base by, needed if the checkpoint names a local path (else `HatError`).
    """
    # Not its `ModelHubMixin`, which asks for a config.json of its own and writes a card into every local folder.
    base = base_model or checkpoint.base
    if Path(base).exists() or not (base == BUNDLED or base in SHAPES or HUB_ID.fullmatch(base)):
        raise HatError(f"the checkpoint's base is the local path {base}: pass base_model=, the Hub id of the same base")
    api = huggingface_hub.HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise HatError(f"{repo_id} is public on the Hub, but private=True was asked for: nothing was uploaded")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(scratch, replace(checkpoint, base=base))
        if not api.file_exists(repo_id, CARD_FILE):
            tags = ["hat", "adaptive-computation", "llama"]
            front = huggingface_hub.ModelCardData(license="mit", library_name="hat_lib", tags=tags)
            if base not in SHAPES:
                front.base_model, front.base_model_relation = BUNDLED_SOURCE if base == BUNDLED else base, "adapter"
            count = sum(tensor.numel() for tensor in checkpoint.tensors.values())
            text = files("hat_lib").joinpath("hub.md").read_text(encoding="utf-8")
            card = text.format(front=front.to_yaml(), repo_id=repo_id, base=base, parameters=count)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a HAT checkpoint"))
