"""Progress of a long command, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called with the number of further items that are done."""

    def __call__(self, count: int, /) -> None: ...


class Start(Protocol):
    """Begins a phase with a label; returns the function that reports its progress."""

    def __call__(self, label: str, /) -> Advance: ...


@contextmanager
def progress(total: int) -> Iterator[Start]:
    """Progress on stderr: on a terminal a bar with the remaining time, otherwise one line for every
    phase.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False, markup=False)
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
