"""Every file of data/results has a study with one interface; `python -m studies` runs, draws and tabulates them."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from hat_lib import config
from hat_lib.config import DATA, REPO, HatError
from hat_lib.rows import read_rows
from studies import registry, state

RESULTS = DATA / "results"


def test_one_module_for_each_file_and_each_file_for_one_module():
    others = {"reliability.csv", state.FILE}  # from `make soak`, and what the others were made from
    assert {path.name for path in RESULTS.iterdir()} - others == {f"{name}.csv" for name in registry.NAMES}


@pytest.mark.parametrize("name", registry.NAMES)
def test_the_committed_rows_read_back_and_are_told_apart_by_their_key(name):
    study = registry.load(name)
    assert study.ABOUT and study.MINUTES > 0
    rows = read_rows(RESULTS / f"{name}.csv", study.Row)
    assert rows and len({tuple(getattr(row, key) for key in study.KEY) for row in rows}) == len(rows)


@pytest.mark.parametrize("name", registry.NAMES)
def test_figures_and_tables_come_from_the_files_alone(name, tmp_path):
    made = [getattr(registry.load(name), what, dict) for what in ("figures", "tables")]
    drawn, tables = (make() for make in made)
    assert all(isinstance(figure, Figure) and (REPO / "figures" / f"{f}.png").is_file() for f, figure in drawn.items())
    assert all(text.startswith("| ") and text.count("\n") > 2 for text in tables.values())
    for make, found in zip(made, (drawn, tables), strict=True):
        if found:
            with pytest.raises(HatError, match="make it with `python -m studies"):
                make(tmp_path)


# --- what is measured ---


@dataclass(frozen=True)
class Row:
    point: int
    cost: float


@pytest.fixture
def stand_in(monkeypatch):
    """A study that counts what it measures, and stops where told to."""
    seen = []

    def rows(done=(), *, count: int = 3, stop: int | None = None, shares: list[float] = (), name: str = "a"):
        for point in range(count):
            if point == stop:
                raise KeyboardInterrupt
            if (point,) not in done:
                seen.append(point)
                yield Row(point, 0.5 + len(seen))

    module = SimpleNamespace(ABOUT="a count", MINUTES=1, Row=Row, KEY=("point",), rows=rows, seen=seen)
    module.tables = lambda results: {"counted": "| 1 |\n"}
    monkeypatch.setattr(registry, "NAMES", ("counted",))
    monkeypatch.setattr(registry, "load", lambda name: module)
    return module


def test_a_stopped_run_goes_on_and_again_replaces_all_at_once(stand_in, run_studies, tmp_path):
    out = tmp_path / "new" / "counted.csv"
    run = ("counted", "--out", out.parent)
    assert run_studies(*run, "--set", "stop=2")[0] == 130 and stand_in.seen == [0, 1]
    assert run_studies(*run)[0] == 0 and stand_in.seen == [0, 1, 2]
    first = out.read_text()
    assert "0 new rows" in run_studies(*run)[1] and out.read_text() == first
    assert run_studies(*run, "--again", "--set", "stop=1")[0] == 130 and out.read_text() == first
    assert run_studies(*run, "--again")[0] == 0 and stand_in.seen == [0, 1, 2, 0, 1, 2]
    assert [row.cost for row in read_rows(out, Row)] == [4.5, 5.5, 6.5]
    assert {path.name for path in out.parent.iterdir()} == {out.name, state.FILE}


def test_what_has_not_changed_is_not_measured_again(stand_in, run_studies, tmp_path, monkeypatch):
    run = ("counted", "--out", tmp_path, "--again", "--stale")
    assert run_studies(*run)[0] == 0 and stand_in.seen == [0, 1, 2]
    assert "nothing has changed" in run_studies(*run)[1] and len(stand_in.seen) == 3
    assert run_studies(*run[:-1], "--set", "count=2")[0] == 0 and len(stand_in.seen) == 5
    assert state.is_stale("counted", tmp_path), "rows with other options are another file"
    assert run_studies(*run)[0] == 0 and len(stand_in.seen) == 8
    monkeypatch.setattr(state, "_shared", lambda: b"other code")
    assert run_studies(*run)[0] == 0 and len(stand_in.seen) == 11
    assert run_studies(*run[:-1], "--set", "stop=1")[0] == 130
    monkeypatch.setattr(state, "_shared", lambda: b"other code again")
    assert run_studies(*run)[0] == 2 and len(stand_in.seen) == 12, "rows of two states would be mixed"


def test_a_digest_sees_code_and_not_comments(tmp_path, monkeypatch):
    (tmp_path / "studies").mkdir()
    file = tmp_path / "studies" / "a.py"
    monkeypatch.setattr(state, "REPO", tmp_path)
    found = []
    for text in ("x = 1", "# why\nx = 1\n'a docstring'", "x = 2", "from studies import b\nx = 2"):
        file.write_text(text)
        found.append(state.digest("a"))
    assert found[0] == found[1] and len(set(found)) == 3
    (tmp_path / "studies" / "b.py").write_text("y = 3")
    assert state.digest("a") != found[-1]


def test_settings_are_read_by_type(stand_in):
    found = registry.parse("counted", ["count=4", "stop=1", "shares=0.5, 0.7", "name=b"])
    assert found == {"count": 4, "stop": 1, "shares": [0.5, 0.7], "name": "b"}


@pytest.mark.parametrize("args", [
    "nothing", "quality published --set dtype=fp32", "tasks --set tokens=5", "answers --set rounds=few",
    "frontier --set rounds=0", "frontier --set tokens=10", "speed_targets --set weights=q3",
    "self_speculative --set capacities=2", "quality --set grains=word",
])  # fmt: skip
def test_a_typo_is_one_error_before_anything_is_loaded(run_studies, tmp_path, monkeypatch, args):
    monkeypatch.setattr("hat_lib.hat.HierarchicalTransformer.from_pretrained", None)
    code, _, err = run_studies(*args.split(), "--out", tmp_path)
    assert code == 2 and err.count("error: ") == 1


def test_tables_of_the_documents(run_studies, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for path in ("README.md", "data/README.md"):
        (tmp_path / path).write_text("<!-- table: quality -->\n| 0 |\n<!-- end -->\n")
    monkeypatch.setattr(config, "REPO", tmp_path)
    monkeypatch.setattr("studies.quality.write_prices", lambda: None)
    code, out, _ = run_studies("--tables", "--out", tmp_path)
    assert code == 0 and out.count("wrote ") == 2
    assert registry.all_tables()["quality"] in (tmp_path / "README.md").read_text()
