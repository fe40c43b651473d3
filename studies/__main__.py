"""``python -m studies``: measure results again, row by row, and draw and tabulate what uses them."""

from studies.registry import app

app(prog_name="python -m studies")
