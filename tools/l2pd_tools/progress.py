"""Progress of a long command, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Advance(Protocol):
    """Called with the number of further items that are done."""

    def __call__(self, count: int, /) -> None: ...


class Start(Protocol):
    """Begins a phase with a label; returns the function that reports its progress."""

    def __call__(self, label: str, /) -> Advance: ...


@contextmanager
def working(label: str, *, spinner: bool = True) -> Iterator[None]:
    """Say on stderr what is going on: on a terminal with a spinner while it lasts, otherwise as a
    line. spinner: False for work that draws on the terminal itself.
    """
    console = _console()
    if console.is_terminal and spinner:
        with console.status(label):
            yield
    else:
        console.print(label, soft_wrap=True)
        yield


@contextmanager
def importing() -> Iterator[None]:
    """Around what may import torch, which takes seconds: says so, unless torch is imported."""
    if "torch" in sys.modules:
        yield
    else:
        with working("importing torch"):
            yield


def say(line: str) -> None:
    """Print a line on stderr that is no result."""
    _console().print(line, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


@contextmanager
def progress(total: int) -> Iterator[Start]:
    """Progress on stderr: on a terminal a bar with the remaining time, otherwise one line for every
    phase.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = _console()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)

        def start(label: str, /) -> Advance:
            bar.update(task, description=label)
            if not console.is_terminal:
                console.print(label, soft_wrap=True)
            return lambda count: bar.advance(task, count)

        yield start
