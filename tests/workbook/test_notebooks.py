"""A notebook is checked before it starts, judged by what really went wrong, read for what it recorded, and cleaned.
On Colab its second code cell fetches the project, once, and leaves Colab's own torch alone."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from notebook_files import notebook
from typer.testing import CliRunner

from hat_lib.config import NOTEBOOKS, HatError
from hat_lib.workbook import __main__ as workbook
from hat_lib.workbook import notebooks
from hat_lib.workbook.session import begin, check, verdict


def test_values_take_the_type_of_their_default(tmp_path):
    path = notebook(tmp_path / "00_a.ipynb")
    wanted = {"capacity=1": 1.0, "capacity=5e-1": 0.5, "steps=4": 4, "profile=2024": "2024", "profile=a=b": "a=b"}
    for assignment, value in {**wanted, "train=True": True, "rates=[0.2, 0.3]": [0.2, 0.3]}.items():
        (parsed,) = notebooks.parse_parameters([assignment], [path]).values()
        assert parsed == value and type(parsed) is type(value)
    for wrong in ("capacity=high", "capacity=", "steps=0.5", "rates=0.5", "train=1", "rates=[1"):
        with pytest.raises(HatError, match=wrong.split("=")[0]):
            notebooks.parse_parameters([wrong], [path])


def test_select(tmp_path):
    paths = [notebook(tmp_path / f"0{i}_{name}.ipynb") for i, name in enumerate("ab")]
    assert notebooks.select([], tmp_path) == paths and notebooks.select([str(paths[0])], tmp_path) == paths[:1]
    assert notebooks.select(["01"], tmp_path) == notebooks.select(["01_b"], tmp_path) == paths[1:]
    with pytest.raises(HatError, match="00_a, 01_b"):
        notebooks.select(["07"], tmp_path)


def test_verdicts_are_read_from_what_ran(tmp_path, capsys):
    verdict("cheap", (0.0, 0.03), at_most=0.03)
    verdict("cheaper", (0.02, 0.04), at_most=0.03)
    verdict("fast", (1.2, 1.4), at_least=1.5, measured="1.3")
    check("one lies below two", 1 < 2)
    found = [("kept", "cheap"), ("open", "cheaper"), ("missed", "fast")]
    path = notebook(tmp_path / "00_a.ipynb", "1")
    nb = nbformat.read(path, as_version=4)
    nb.cells[-1].outputs = [nbformat.v4.new_output("stream", text=capsys.readouterr().out)]
    for counts, expected in (((3, 4), found), ((1, None), None), ((None, 1), None), ((1, 7), None)):
        nb.cells[0].execution_count, nb.cells[1].execution_count = counts
        nbformat.write(nb, path)
        assert notebooks.verdicts(path) == expected


def test_a_check_speaks_when_it_fails(capsys):
    check("two lies below one", 2 < 1, "2")
    assert capsys.readouterr().out == "check failed: two lies below one\n    measured: 2\n"


def test_findings_name_a_neighbour_that_was_partly_run(tmp_path, monkeypatch, capsys):
    (cell,) = (c for c in nbformat.read(NOTEBOOKS / "08_findings.ipynb", 4).cells if "verdicts(" in c.source)
    notebook(tmp_path / "00_setup.ipynb", "1")
    shutil.copy(NOTEBOOKS / "01_frozen_base.ipynb", tmp_path)
    monkeypatch.setattr("hat_lib.config.NOTEBOOKS", tmp_path)
    exec(cell.source, {})
    assert capsys.readouterr().out.startswith("00_setup: partly run\n01_frozen_base: ")


def test_begin():
    assert begin(profile="quick", seed=0, dtype="fp32", steps=(10, 10)) == 1
    assert begin(profile="full", seed=3, full=4) == 4
    for wrong in ({"profile": "slow"}, {"seed": -1}, {"steps": (9, 10)}, {"dtype": "int4"}):
        with pytest.raises(HatError, match=next(iter(wrong))):
            begin(**{"profile": "quick", "seed": 0, **wrong})


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project whose path has a space, and the commands pointed at it."""
    root = tmp_path / "a project"
    (root / "notebooks").mkdir(parents=True)
    for name, value in {"REPO": root, "NOTEBOOKS": root / "notebooks", "RUNS": root / "runs"}.items():
        monkeypatch.setattr(workbook, name, value)
    return root


def call(*arguments):
    return CliRunner().invoke(workbook.app, [str(a) for a in arguments])


@pytest.mark.slow
def test_run_goes_on_after_failures_and_leaves_the_tree_alone(project):
    folder = project / "notebooks"
    figure = "import os, pathlib\npathlib.Path(os.environ['HAT_FIGURES'], 'a.png').write_text('drawn')"
    notebook(folder / "00_ok.ipynb", figure, "assert os.getcwd().endswith('notebooks') and capacity == 0.5")
    notebook(folder / "01_fails.ipynb", "y = 2\nraise KeyError('no layer')", "print('not reached')")
    notebook(folder / "02_dies.ipynb", "import os; os._exit(3)")
    notebook(folder / "03_hangs.ipynb", "import time; time.sleep(60)")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    done = call("run", "--name", "trial", "--cell-timeout", 3, "-p", "capacity=0.5")

    assert done.exit_code == 1 and "1 of 4 passed" in done.output
    rows = {line.split()[0]: line for line in done.output.splitlines()}
    expected = {"00_ok": "ok", "01_fails": "KeyError", "02_dies": "DeadKernelError", "03_hangs": "CellTimeoutError"}
    assert all(word in rows[name] for name, word in expected.items())
    assert (project / "runs/trial/figures/00_ok/a.png").read_text() == "drawn"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before and "HAT_FIGURES" not in os.environ
    assert call("run", "--name", "trial").exit_code == 2  # no run overwrites another


def test_a_wrong_command_runs_nothing(project):
    notebook(project / "notebooks/00_a.ipynb")
    notebook(project / "notebooks/01_b.ipynb", parameters="steps = 3")
    for wrong in (["42"], ["-p", "capcity=0.9"], ["-p", "capacity=0.9"], ["-p", "capacity"]):
        assert call("run", *wrong).exit_code == 2
    assert not (project / "runs").exists()


@pytest.mark.slow
def test_execute_replaces_outputs_and_figures_only_on_success(project):
    folder = project / "notebooks"
    save = "import os, pathlib; pathlib.Path(os.environ['HAT_FIGURES'], f'{n}.png').write_text('drawn')"
    good = notebook(folder / "00_good.ipynb", "n = 'good'", save, "print('done')")
    bad = notebook(folder / "01_bad.ipynb", "n = 'bad'", save, "1 / 0")
    before = bad.read_bytes()

    done = call("execute")

    assert done.exit_code == 1 and "ZeroDivisionError" in done.output
    nb = nbformat.read(good, as_version=4)
    assert [cell.execution_count for cell in nb.cells] == [1, 2, 3, 4] and nb.cells[-1].outputs[0].text == "done\n"
    assert "papermill" not in nb.metadata and nb.cells[0].metadata == {"tags": ["parameters"]}
    assert bad.read_bytes() == before
    assert [path.name for path in (project / "figures").iterdir()] == ["good.png"]


def test_clean(tmp_path):
    """What papermill and JupyterLab leave: timings, widget state, progress bars. The record of a run is refused."""
    v4, path = nbformat.v4, tmp_path / "00_a.ipynb"
    bar = "  0%|          | 0/8 [00:00<?, ?it/s]\r100%|██████████| 8/8 [00:01<00:00,  6.1it/s]\n"
    texts = ("stdout", "loss 0.50\n"), ("stderr", bar), ("stderr", bar + "UserWarning: careful\n")
    outputs = [v4.new_output("stream", name=name, text=text) for name, text in texts]
    views = [{"text/plain": f"a {name}", notebooks.WIDGET_VIEW: {"model_id": name}} for name in ("slider", "screen")]
    outputs += [v4.new_output("display_data", data=view) for view in views]
    layout = {"model_module": "@jupyter-widgets/base", "state": {}}
    state = {"of_slider": layout, "of_screen": layout}
    for name, module in {"slider": "@jupyter-widgets/controls", "screen": "anywidget"}.items():
        state[name] = {"model_module": module, "state": {"layout": f"IPY_MODEL_of_{name}"}}
    metadata = {"tags": ["parameters", "hide-input"], "papermill": {"duration": 1.5}, "collapsed": True}
    cells = [v4.new_code_cell("work()", execution_count=3, metadata=metadata, outputs=outputs)]
    cells.append(v4.new_markdown_cell("# Title", metadata={"papermill": {}}))
    kernel, widgets = {"name": "my-env", "display_name": "Mine"}, {notebooks.WIDGET_STATE: {"state": state}}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"widgets": widgets, "kernelspec": kernel}), path)

    assert notebooks.clean_file(path) and path.read_bytes().endswith(b"}\n") and not notebooks.clean_file(path)
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert nb.metadata.pop("widgets")[notebooks.WIDGET_STATE]["state"].keys() == {"screen", "of_screen"}
    assert nb.metadata == {"kernelspec": notebooks.KERNEL, "language_info": {"name": "python"}}
    code, title = nb.cells
    folded = {"tags": ["parameters", "hide-input"], "jupyter": {"source_hidden": True}}
    assert title.metadata == {} and code.metadata == folded and (code.execution_count, code.source) == (3, "work()")
    assert [o.get("text", "")[-9:] for o in code.outputs] == ["oss 0.50\n", " careful\n", "", ""]
    assert [o.data for o in code.outputs[2:]] == [{"text/plain": "a slider"}, views[1]]
    code.metadata.tags = ["injected-parameters"]
    nbformat.write(nb, path)
    with pytest.raises(HatError, match="00_a.ipynb"):
        notebooks.clean_file(path)


def cells(path, kind):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_the_project_is_fetched_once_and_torch_stays(monkeypatch, tmp_path):
    ran = []

    def run(command, check):
        ran.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()

    source = cells(NOTEBOOKS / "00_setup.ipynb", "code")[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(subprocess, "run", run)
    exec(source, {})
    assert ran == []  # elsewhere nothing is fetched
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(source, {})
    exec(source, {})
    clone, install = ran
    assert clone[:2] == ["git", "clone"] and clone[-1] == "hat-workbook"
    # The installed torch is requested by its exact version, so that pip cannot choose another.
    assert install[1:4] == ["-m", "pip", "install"]
    assert install[-2:] == ["hat-workbook[workbook]", f"torch=={version('torch')}"]
    assert sys.path[0] == str(tmp_path / "hat-workbook")  # an editable install shows only in the next process


def test_every_notebook_has_that_cell_and_a_badge_that_opens_it():
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert cells(path, "code")[1] == cells(NOTEBOOKS / "00_setup.ipynb", "code")[1], path.name
        link = f"https://colab.research.google.com/github/hat-workbook/hat-workbook/blob/main/notebooks/{path.name}"
        assert f"]({link})" in cells(path, "markdown")[0]


def test_no_cell_is_long():
    long = [path.stem for path in NOTEBOOKS.glob("*.ipynb") for code in cells(path, "code") if code.count("\n") >= 25]
    assert long == []


def test_the_marked_path_takes_as_long_as_the_readme_says():
    """200 words and 15 lines of code a minute, without folded cells: at most an hour and a quarter."""
    readme = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
    said, marked = re.search(r"If you have (\d+) minutes, read ([\d, and]+);", readme).groups()
    paths = notebooks.select(re.findall(r"\d+", marked), NOTEBOOKS)
    shown = [cell for path in paths for cell in nbformat.read(path, 4).cells]
    words = sum(len(c.source.split()) for c in shown if c.cell_type == "markdown")
    code = [c.source for c in shown if c.cell_type == "code" and "hide-input" not in c.metadata.get("tags", [])]
    minutes = words / 200 + sum(line.strip() != "" for source in code for line in source.split("\n")) / 15
    assert abs(minutes - int(said)) <= 5 and minutes <= 75, f"{minutes:.0f} minutes"
