"""The method by hand (`hat_lib.by_hand`: plain torch, nothing of the library) against the library, block by block."""

import ast
from pathlib import Path

import nbformat
import pytest
import torch

from hat_lib import by_hand
from hat_lib.config import DATA, NOTEBOOKS
from hat_lib.evaluation.perplexity import score
from hat_lib.hat import HierarchicalTransformer
from hat_lib.text.blocks import load_text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capacity"), [("default", 0.7), ("calibrated", 0.55)])
def test_the_library_computes_what_is_written_by_hand(bundled, name, capacity):
    """Decisions and states are the same to the bit; only the head is read in other slices. ``default`` has corrections,
    ``calibrated`` a strength of token sensitivity."""
    folder = DATA / "checkpoints" / name
    rows = load_text("docstrings", bundled.tokenizer, split="test", block_size=256, max_tokens=400)
    blocks = [torch.tensor([ids]) for ids in rows["input_ids"]]
    losses = by_hand.losses(bundled.model, blocks, by_hand.adapt(bundled.model, by_hand.read(folder, capacity)))
    hat = HierarchicalTransformer.from_pretrained(folder, bundled)
    try:
        with hat.at(capacity):
            scored = score(hat, rows, progress=False)
    finally:
        hat.unload()
    assert len(rows) > 1 and scored.capacity == pytest.approx(capacity, abs=0.03)
    ours = losses.split([len(ids[0]) - 1 for ids in blocks])
    assert [float(part.double().sum()) for part in ours] == pytest.approx(list(scored.nll), rel=1e-5)


@torch.no_grad()
def test_what_leaves_freezes_and_is_read_by_later_layers(bundled):
    """With every gate open to all, each token but the protected leaves at the first: later layers give it back."""
    now, seen = by_hand.read(DATA / "checkpoints" / "default", 0.7), []
    exits = dict.fromkeys((5, 11, 16, 22, 26), -float("inf"))
    hooks = by_hand.adapt(bundled.model, now, exits)
    hooks += [
        layer.register_forward_hook(lambda _, args, out: seen.append(out)) for layer in bundled.model.model.layers
    ]
    by_hand.losses(bundled.model, [torch.arange(5, 25)[None]], hooks)
    assert not torch.equal(seen[4][:, 2:], seen[3][:, 2:])
    assert all(torch.equal(h[:, 2:], seen[4][:, 2:]) and not torch.equal(h, seen[4]) for h in seen[5:])


def test_the_functions_are_cells_of_the_notebooks():
    """Character for character, but for `main`, which uses the library; and no notebook has another by its name."""
    source = Path(by_hand.__file__).read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    lines, texts = source.splitlines(), {}
    for name, node in functions.items():
        first = min(part.lineno for part in [node, *node.decorator_list])
        texts[name] = "\n".join(lines[first - 1 : node.end_lineno])
    paths = [next(NOTEBOOKS.glob(f"{number}_*.ipynb")) for number in ("02", "03", "04")]
    cells = [cell.source for path in paths for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [name for name, text in texts.items() if text not in cells] == ["main"]
    assert not [name for name in texts for cell in cells if f"\ndef {name}(" in f"\n{cell}" and texts[name] != cell]
