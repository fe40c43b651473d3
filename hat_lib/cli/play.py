"""``hat play``: a prompt and a dial in a browser. ``hat explain``: each token of a prompt, coloured by its work."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option


def play(
    base: str | None = options.BASE,
    checkpoint: Path | None = options.CHECKPOINT,
    exit_rate: str | None = options.EXIT_RATE,
    dtype: str = option("fp32", f"{options.DTYPES_HELP}.", check=options.check_dtype),
    threads: int | None = options.THREADS,
    port: int = option(8765, "Port of the page, on this machine alone.", min=0, max=65535),
    show: bool = option(True, "Open the page in a browser.", "--open/--no-open"),
) -> None:
    """Type a sentence, move the capacity, watch: in the browser.

    The map of the work, the next tokens, how the text goes on, its price and its speed move together. Ctrl-C ends it.
    """
    options.start(threads)
    from hat_lib.workbook.play_page import Server
    from hat_lib.workbook.screen import Screen

    server = Server(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    typer.echo(f"http://{server.host}/ (Ctrl-C ends it)", err=True)
    if show:
        webbrowser.open(f"http://{server.host}/")
    server.screen.set_result(Screen(options.load(base, checkpoint, None, exit_rate, dtype)))
    threading.Event().wait()


def explain(
    prompt: str = typer.Argument(..., help="Text to read."),
    base: str | None = options.BASE,
    checkpoint: Path | None = options.CHECKPOINT,
    capacity: str | None = options.CAPACITY,
    exit_rate: str | None = options.EXIT_RATE,
    dtype: str | None = options.DTYPE,
    threads: int | None = options.THREADS,
    html: Path | None = option(None, "Also write a page to explore it at nine capacities, which needs no network."),
) -> None:
    """Which tokens of a prompt got the work."""
    options.check_prompt("explain", prompt)
    if html is not None:
        html = html.expanduser()
        options.check_writable(html.parent, "a page")
    options.start(threads)
    hat = options.load(base, checkpoint, capacity, exit_rate, dtype)
    from hat_lib.evaluation import tokens
    from hat_lib.plotting.style import write
    from hat_lib.workbook.play_page import still_page
    from hat_lib.workbook.screen import Screen, check_prompt

    if html is not None:
        check_prompt(hat, prompt)
    typer.echo(str(tokens.explain(hat, prompt)))
    if html is not None:
        write(html, still_page(Screen(hat), {"Prompt": (prompt, "")}).encode())
        typer.echo(f"wrote {html}", err=True)
