"""Whether a text can be read, before a base is loaded."""

from __future__ import annotations

from types import SimpleNamespace

from hat_lib.text.blocks import load_text, names_file
from hat_lib.text.mixture import OWN, sources


def check_text(source: str, *splits: str | None) -> None:
    """Raise as `load_text` would for each of ``splits``, by reading the source with a stand-in tokenizer.

    Without a split (None), a file is checked as a whole and any other text by its test split.
    """

    def two_tokens(text: str, **_):
        return SimpleNamespace(input_ids=list(text.encode()[:2]))

    for split in splits:
        load_text(source, two_tokens, split=split or ("all" if names_file(source) else "test"), max_tokens=2)


def check_training_texts(text: str, validation: str) -> None:
    """`check_text` for the sources of a `Recipe` and, unless it is empty, the text of its learning curve."""
    for source in {*sources(text)} - {*OWN}:
        check_text(source, "train", "validation")
    if validation:
        check_text(validation, "validation")
