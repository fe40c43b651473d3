"""README and docs say what the data says, and name commands that exist."""

import re

import pytest
from typer.main import get_command

from hat_lib import config
from hat_lib.cli.app import app
from hat_lib.config import HatError
from studies.registry import all_tables, documents, fill, outdated

COMMANDS = get_command(app).commands


def test_every_table_is_that_of_the_data():
    assert not outdated(all_tables()), "run `python -m studies --tables`"


def test_every_command_exists():
    used = set()
    for path in [*documents(), *config.NOTEBOOKS.glob("*.ipynb")]:
        text = path.read_text(encoding="utf-8").replace("\\n", "\n")
        for command, rest in re.findall(r"(?:^|`|-m )hat(?:_lib)? ([a-z]+)((?: [^`\n#]*)?)", text, re.M):
            assert command in COMMANDS, f"{path.name}: hat {command}"
            known = {name for option in COMMANDS[command].params for name in (*option.opts, *option.secondary_opts)}
            unknown = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest)) - known - {"--help"}
            assert not unknown, f"{path.name}: hat {command} {unknown}"
            used.add(command)
    assert len(used) > 5


def test_a_table_takes_the_place_of_what_stood_there():
    text = "before\n<!-- table: one -->\n| old |\n<!-- end -->\nafter\n"
    filled = text.replace("| old |", "| a |")
    assert fill(text, {"one": "| a |\n", "unused": ""}, "x.md") == filled
    with pytest.raises(HatError, match="x.md"):
        fill(text, {"two": ""}, "x.md")
    with pytest.raises(HatError, match="x.md"):
        fill(text.replace("<!-- end -->", ""), {"one": ""}, "x.md")
