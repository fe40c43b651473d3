import pytest

from hat_lib.text.blocks import load_text

TEXT = "In 2025 Ada met 3 of the Kings, and they didn’t say a naïve word 🦙.\nThe quick brown fox jumps. " * 5


@pytest.fixture(scope="module")
def strided(tiny_base, tmp_path_factory):
    """Windows of one document, with context; the last one is shorter."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(TEXT)
    return list(load_text(path, tiny_base.tokenizer, split="train", block_size=64, stride=40))
