"""Small notebooks to run."""

import nbformat

from hat_lib.workbook.notebooks import KERNEL

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
