"""A notebook is checked before it starts, judged by what really went wrong, read for what it recorded, and cleaned."""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from notebook_files import notebook
from typer.testing import CliRunner

from hat_lib.config import REPO, HatError
from hat_lib.workbook import __main__ as workbook
from hat_lib.workbook.notebooks import (
    KERNEL,
    THREADS,
    WIDGET_STATE,
    WIDGET_VIEW,
    clean,
    clean_file,
    parse_parameters,
    predictions,
    results,
    run_notebook,
    select,
)  # fmt: skip
from hat_lib.workbook.session import begin, judge, record


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("capacity=0.5", 0.5),
        ("capacity=1", 1.0),
        ("capacity=5e-1", 0.5),
        ("steps=4", 4),
        ("profile=full", "full"),
        ("profile=2024", "2024"),
        ("profile=a=b", "a=b"),
        ("rates=[0.2, 0.3]", [0.2, 0.3]),
        ("train=true", True),
    ],
)
def test_values_take_the_type_of_their_default(tmp_path, assignment, value):
    parsed = parse_parameters([assignment], [notebook(tmp_path / "00_a.ipynb")])
    assert list(parsed.values()) == [value]
    assert type(parsed[assignment.split("=")[0]]) is type(value)


@pytest.mark.parametrize(
    "assignment",
    ["capacity=high", "capacity=true", "capacity=", "steps=0.5", "steps=true", "rates=0.5", "train=1", "rates=[1"],
)
def test_values_of_another_type_are_refused(tmp_path, assignment):
    with pytest.raises(HatError, match=assignment.split("=")[0]):
        parse_parameters([assignment], [notebook(tmp_path / "00_a.ipynb")])


@pytest.mark.parametrize("kernel", [{}, {"kernelspec": {"name": "unheard-of", "display_name": "?"}}])
def test_a_notebook_that_names_no_language_is_refused(tmp_path, kernel):
    path = notebook(tmp_path / "00_a.ipynb")
    nb = nbformat.read(path, as_version=4)
    nb.metadata = nbformat.from_dict(kernel)
    nbformat.write(nb, path)
    with pytest.raises(HatError, match="00_a.ipynb: No (kernel name|language) found"):
        parse_parameters(["steps=1"], [path])


def test_predictions_are_those_that_were_judged(tmp_path, capsys):
    judge("one lies below two", 1 < 2, "1")
    judge("two lies below one", 2 < 1)
    said = capsys.readouterr().out
    assert said == "held: one lies below two\n    measured: 1\nFAILED: two lies below one\n"
    path = notebook(tmp_path / "00_a.ipynb", "1")
    nb = nbformat.read(path, as_version=4)
    nb.cells[-1].outputs = [nbformat.v4.new_output("stream", text=said)]
    nbformat.write(nb, path)
    assert predictions(path) == {"held": ["one lies below two"], "FAILED": ["two lies below one"]}


def test_select_names_what_there_is(tmp_path):
    paths = [notebook(tmp_path / f"0{i}_{name}.ipynb") for i, name in enumerate("ab")]
    assert select([], tmp_path) == paths
    assert select(["01", "01_b", "notebooks/01_b.ipynb"], tmp_path) == paths[1:]
    with pytest.raises(HatError, match="no notebook '07'; there are: 00_a, 01_b"):
        select(["07"], tmp_path)
    with pytest.raises(HatError, match="no notebook in"):
        select([], tmp_path / "empty")


def test_a_wrong_command_is_one_line():
    done = subprocess.run([sys.executable, "-m", "hat_lib.workbook", "run", "42"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: no notebook '42'; there are: 00")


@pytest.mark.slow
def test_results_are_what_cells_recorded_and_threads_are_set(tmp_path):
    source = notebook(
        tmp_path / "00_a.ipynb",
        "import os\nfrom hat_lib.workbook.notebooks import THREADS\nfrom hat_lib.workbook.session import record",
        "record(capacity=capacity, deep={'a': [1]})",
        "record(threads=[os.environ[name] for name in THREADS], capacity=2 * capacity)",
        "print('nothing recorded')",
    )
    before = dict(os.environ)
    output = tmp_path / "{a} folder" / "done.ipynb"
    output.parent.mkdir()
    result = run_notebook(source, output, tmp_path / "figures", {"capacity": 0.25}, 60, threads=3)
    assert result.error == "" and result.notebook == "00_a" and result.seconds > 0
    assert results(output) == {"capacity": 0.5, "deep": {"a": [1]}, "threads": ["3"] * len(THREADS)}
    shown = nbformat.read(output, as_version=4).cells[3].outputs[0].data["text/plain"]
    assert shown == "capacity = 0.25, deep = {'a': [1]}"
    assert results(source) == {} and dict(os.environ) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, KERNEL.keys()])
def test_only_json_is_recorded(value):
    with pytest.raises(HatError, match="what is recorded must be JSON"):
        record(perplexity=value)


def test_a_notebook_begins_with_its_parameters_checked(capsys):
    assert begin(profile="quick", seed=0, dtype="fp32", steps=(10, 10)) == 1
    assert "torch" in capsys.readouterr().out and torch.initial_seed() == 0
    assert begin(profile="full", seed=3, full=4) == 4 and begin(profile="full", seed=3, dtype="auto") == 8


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"profile": "slow"}, "profile must be quick or full, got 'slow'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"steps": (9, 10)}, "steps must be a whole number of at least 10, got 9"),
        ({"dtype": "int4"}, "dtype must be one of"),
    ],
)
def test_a_parameter_that_makes_no_sense_ends_a_notebook_at_once(wrong, told):
    with pytest.raises(HatError, match=told):
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
    notebook(folder / "00_ok.ipynb", figure, "assert os.getcwd().endswith('notebooks'); print(capacity)")
    notebook(folder / "01_fails.ipynb", "x = 1", "y = 2\nraise KeyError('no layer')", "print('not reached')")
    notebook(folder / "02_dies.ipynb", "import os; os._exit(3)")
    notebook(folder / "03_hangs.ipynb", "import time; time.sleep(60)")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    done = call("run", "--name", "trial", "--cell-timeout", 3)

    assert done.exit_code == 1
    table = {line.split()[0]: line.split() for line in done.output.split("\n\n")[-1].splitlines()[1:]}
    ends = {"00_ok": "ok", "01_fails": "FAILED", "02_dies": "FAILED", "03_hangs": "FAILED"}
    assert {name: row[1] for name, row in table.items()} == ends
    assert table["00_ok"][3] == "runs/trial/figures/00_ok"
    assert "cell [3] KeyError: 'no layer'" in done.output
    assert "    | raise KeyError" in done.output and "not reached" not in done.output
    assert "DeadKernelError" in done.output and "CellTimeoutError" in done.output
    assert (project / "runs/trial/figures/00_ok/a.png").read_text() == "drawn"
    assert (project / "runs/trial/00_ok.ipynb").exists()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert "HAT_FIGURES" not in os.environ


def test_a_run_takes_parameters_and_sees_errors_that_a_widget_hides(project):
    show = (
        "from IPython.display import display\nfrom ipywidgets import Output\nout = Output()\ndisplay(out)\n"
        "with out:\n    raise RuntimeError('hidden')"
    )
    told_to_kernel = "print(len(out.outputs))"  # in a message that may lose the cell's reply
    notebook(project / "notebooks/00_a.ipynb", "print(capacity, steps)", show, told_to_kernel)
    notebook(project / "notebooks/01_b.ipynb", parameters="steps = 3")
    for assignment, told in {
        "capcity=0.9": "00_a.ipynb has no parameter 'capcity'; it has: capacity, steps, profile",
        "capacity=0.9": "01_b.ipynb has no parameter 'capacity'; it has: steps",
        "capacity": "a parameter is written name=value, got 'capacity'",
    }.items():
        error = call("run", "-p", assignment).exception
        assert isinstance(error, HatError) and told in str(error)
    assert call("run", "0").exit_code == 1  # a notebook's number has two digits
    assert not (project / "runs").exists()
    done = call("run", "00", "-p", "capacity=0.5", "-p", "steps=9", "--name", "trial")
    assert done.exit_code == 1 and "in a widget's callback: RuntimeError: hidden" in done.output
    ran = nbformat.read(project / "runs/trial/00_a.ipynb", as_version=4)
    assert [ran.cells[at].outputs[0].text for at in (-3, -1)] == ["0.5 9\n", "0\n"]
    assert not (project / "runs/trial/01_b.ipynb").exists()
    assert "exists; choose another --name" in str(call("run", "--name", "trial").exception)


def test_execute_replaces_outputs_and_figures_only_on_success(project):
    folder = project / "notebooks"
    save = "import os, pathlib; pathlib.Path(os.environ['HAT_FIGURES'], f'{n}.png').write_text('drawn')"
    good = notebook(folder / "00_good.ipynb", "n = 'good'", save, "print('done')")
    bad = notebook(folder / "01_bad.ipynb", "n = 'bad'", save, "1 / 0")
    before = bad.read_bytes()

    done = call("execute")

    assert done.exit_code == 1 and "ZeroDivisionError" in done.output
    nb = nbformat.read(good, as_version=4)
    assert [cell.execution_count for cell in nb.cells] == [1, 2, 3, 4]
    assert nb.cells[-1].outputs[0].text == "done\n"
    assert "papermill" not in nb.metadata and nb.cells[0].metadata == {"tags": ["parameters"]}
    assert bad.read_bytes() == before
    assert [path.name for path in (project / "figures").iterdir()] == ["good.png"]
    assert sorted(path.name for path in folder.iterdir()) == ["00_good.ipynb", "01_bad.ipynb"]


@pytest.mark.slow
def test_a_notebook_run_as_jupyter_runs_it_changes_nothing_that_is_committed(tmp_path, monkeypatch):
    for folder in ("hat_lib", "data", "figures", "notebooks"):
        shutil.copytree(REPO / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))

    def files(*folders):
        paths = (path for folder in folders for path in (tmp_path / folder).rglob("*") if path.suffix != ".pyc")
        return {path: path.read_bytes() for path in paths if path.is_file()}

    before = files("data", "figures", "notebooks")
    monkeypatch.delenv("HAT_FIGURES", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "notebooks" / "08_findings.ipynb"
    NotebookClient(nbformat.read(path, 4), resources={"metadata": {"path": path.parent}}).execute()
    assert files("data", "figures", "notebooks") == before
    drawn = {path.name for path in files("runs/figures")}
    assert drawn and drawn == {path.name for path in (tmp_path / "figures").glob("08_*.png")}


@pytest.fixture
def dirty():
    """A notebook as left by papermill and JupyterLab: timings, widget state, a progress bar."""
    v4 = nbformat.v4
    bar = "  0%|          | 0/8 [00:00<?, ?it/s]\r100%|██████████| 8/8 [00:01<00:00,  6.1it/s]\n"
    view = {"text/plain": "FloatSlider(value=0.75)", WIDGET_VIEW: {"model_id": "abc"}}
    code = v4.new_code_cell(
        "work()",
        execution_count=3,
        metadata={
            "tags": ["parameters", "nbval-ignore-output"],
            "papermill": {"duration": 1.5},
            "execution": {"iopub.status.busy": "2026-01-01T00:00:00Z"},
            "collapsed": True,
        },
        outputs=[
            v4.new_output("stream", name="stdout", text="loss 0.50\n"),
            v4.new_output("stream", name="stderr", text=bar),
            v4.new_output("stream", name="stderr", text="100 docs [00:02, 44.1 docs/s]\n"),
            v4.new_output("stream", name="stderr", text=bar + "UserWarning: careful\n"),
            v4.new_output("display_data", data=view),
        ],
    )
    state = {WIDGET_STATE: {"state": {"abc": {"state": {"value": 0.75}}}, "version_major": 2}}
    return v4.new_notebook(
        cells=[v4.new_markdown_cell("# Title", metadata={"papermill": {}}), code],
        metadata={
            "widgets": state,
            "papermill": {"duration": 2},
            "kernelspec": {"name": "my-env", "display_name": "Mine", "language": "python"},
            "language_info": {"name": "python", "version": "3.11.7"},
        },
    )


def test_clean_keeps_what_counts_and_drops_the_rest(dirty):
    ids = [cell.id for cell in dirty.cells]
    nb = clean(dirty)
    nbformat.validate(nb)
    title, code = nb.cells
    assert nb.metadata == {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    assert title.metadata == {} and code.metadata == {"tags": ["parameters", "nbval-ignore-output"]}
    assert [cell.id for cell in nb.cells] == ids and code.execution_count == 3 and code.source == "work()"
    assert [o.get("text", "")[-9:] for o in code.outputs] == ["oss 0.50\n", " careful\n", ""]
    assert code.outputs[-1].data == {"text/plain": "FloatSlider(value=0.75)"}


def test_a_cell_that_is_tagged_so_is_folded(dirty):
    dirty.cells[0].metadata.tags = ["hide-input"]
    title, code = clean(dirty).cells
    assert title.metadata == {"tags": ["hide-input"], "jupyter": {"source_hidden": True}}
    assert "jupyter" not in code.metadata


def test_clean_file_is_idempotent(dirty, tmp_path):
    path = tmp_path / "00_a.ipynb"
    nbformat.write(dirty, path)
    assert clean_file(path)
    first = path.read_bytes()
    assert not clean_file(path) and path.read_bytes() == first
    assert first.endswith(b"}\n") and json.loads(first)["nbformat_minor"] == 5
    assert call("clean", path).output == ""
    assert [p.name for p in tmp_path.iterdir()] == ["00_a.ipynb"]


@pytest.mark.parametrize("tag", ["injected-parameters", "papermill-error-cell-tag"])
def test_the_record_of_a_run_is_not_cleaned_into_the_workbook(dirty, tmp_path, tag):
    dirty.cells[1].metadata.tags = [tag]
    path = tmp_path / "00_a.ipynb"
    nbformat.write(dirty, path)
    before = path.read_bytes()
    with pytest.raises(HatError, match=f"00_a.ipynb: a cell that papermill added .{tag}."):
        clean_file(path)
    assert path.read_bytes() == before
