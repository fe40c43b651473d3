"""README and docs say what the data says, and nothing more."""

import pytest

from hat_lib import config
from hat_lib.config import HatError
from studies.registry import all_tables, documents, fill, outdated


def test_every_table_is_that_of_the_data():
    assert not outdated(all_tables()), "run `python -m studies --tables`"


def test_a_table_takes_the_place_of_what_stood_there():
    text = "before\n<!-- table: one -->\n| old |\n<!-- end -->\nbetween\n<!-- table: two -->\n<!-- end -->\nafter\n"
    tables = {"one": "| a |\n", "two": "| b |\n", "unused": ""}
    filled = text.replace("| old |", "| a |").replace("two -->\n", "two -->\n| b |\n")
    assert fill(text, tables, "x.md") == filled == fill(filled, tables, "x.md")
    with pytest.raises(HatError, match="x.md: no table 'two'; there are: one"):
        fill(text, {"one": ""}, "x.md")
    with pytest.raises(HatError, match="x.md: table 'one' has no line `<!-- end -->`"):
        fill(text.replace("<!-- end -->\nbetween", "between"), tables, "x.md")


def test_a_changed_number_is_found(tmp_path, monkeypatch):
    for path in ("README.md", "data/README.md", "docs/more/deep.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("<!-- table: one -->\n| 1.00x |\n<!-- end -->\n")
    monkeypatch.setattr(config, "REPO", tmp_path)
    assert len(documents()) == 3 and outdated({"one": "| 1.00x |\n"}) == {}
    found = outdated({"one": "| 1.01x |\n"})
    assert len(found) == 3 and all("| 1.01x |" in text for text in found.values())
