"""How far a long command has come, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Says that so many more are done."""

    def __call__(self, count: int, /) -> None: ...


class Start(Protocol):
    """Says what is begun; returns how its progress is told."""

    def __call__(self, label: str, /) -> Advance: ...


@contextmanager
def progress(total: int) -> Iterator[Start]:
    """Progress on stderr: a bar with the time left on a terminal, else a line for every run."""
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
