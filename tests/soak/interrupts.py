"""Ctrl-C at any line of the library: what comes next is as if the interrupted call had never been."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hat_lib

HOME = str(Path(hat_lib.__file__).parent)


def at_every_line(call: Callable[[], object], some: Callable[[list], list] = list) -> Iterator[str]:
    """Interrupt ``call`` at each line of the library that it comes to, or at ``some`` of them, when it does so for the
    first time; yields the name of each line, after the interrupt."""
    lines: dict[tuple[str, int], None] = {}
    _traced(call, lambda place: lines.setdefault(place))
    for place in some([*lines]):

        def interrupt(here, place=place):
            if here == place:
                raise KeyboardInterrupt

        try:
            _traced(call, interrupt)
        except KeyboardInterrupt:
            yield f"{Path(place[0]).name}:{place[1]}"


def _traced(call: Callable[[], object], see: Callable[[tuple[str, int]], object]) -> None:
    def watch(frame, event, arg):
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event in ("line", "return"):
            see((frame.f_code.co_filename, frame.f_lineno))
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        call()
    finally:
        sys.settrace(before)
