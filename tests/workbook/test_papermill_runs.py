"""A run is checked before it starts, judged by what really went wrong, and read for what it recorded."""

import os

import nbformat
import pytest
import torch

from hat_lib.config import HatError
from hat_lib.workbook.notebooks import KERNEL, THREADS, parse_parameters, results, run_notebook, select
from hat_lib.workbook.session import begin, record

PARAMETERS = """
capacity = 0.75  # executed / routable work
steps: int = 3
profile = "quick"
rates = [0.0, 0.1]
train = False
"""


def notebook(path, *sources, parameters=PARAMETERS):
    """Write a notebook with a ``parameters`` cell and one code cell per source."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), path)
    return path


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
    [
        "capacity=high",
        "capacity=true",
        "capacity=",
        "steps=0.5",
        "steps=true",
        "rates=0.5",
        "train=1",
        "rates=[1",
    ],
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


def test_select_names_what_there_is(tmp_path):
    paths = [notebook(tmp_path / f"0{i}_{name}.ipynb") for i, name in enumerate("ab")]
    assert select([], tmp_path) == paths
    assert select(["01", "01_b", "notebooks/01_b.ipynb"], tmp_path) == paths[1:]
    with pytest.raises(HatError, match="no notebook '07'; there are: 00_a, 01_b"):
        select(["07"], tmp_path)
    with pytest.raises(HatError, match="no notebook in"):
        select([], tmp_path / "empty")


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
