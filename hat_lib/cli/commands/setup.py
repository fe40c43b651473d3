"""``hat setup``: fetch what is needed, say what the machine has."""

from __future__ import annotations

from typing import Annotated

import typer

from hat_lib.cli.options import option


def setup(
    fetch: Annotated[bool, option("Fetch the bundled base (93 MB) and texts (7 MB) if missing.")] = True,
    quiet: Annotated[bool, option("No report: say only what is fetched, or fails.", "--quiet")] = False,
) -> None:
    """Fetch the base and the texts, report the environment."""
    from hat_lib.workbook.environment import environment, fetch_bundled, lines

    try:
        if fetch:
            fetch_bundled()
    finally:  # above all when fetching failed
        if not quiet:
            typer.echo("\n".join(lines(environment())))
