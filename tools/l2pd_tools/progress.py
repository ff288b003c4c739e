"""Progress of a long command, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Advance(Protocol):
    """Called with the number of further items that are done."""

    def __call__(self, count: int, /) -> None: ...


class Start(Protocol):
    """Begins a phase with a label; returns the function that reports its progress."""

    def __call__(self, label: str, /) -> Advance: ...


Verbosity = Literal["quiet", "normal", "verbose"]
_verbosity: Verbosity = "normal"


@contextmanager
def verbosity(wanted: Verbosity) -> Iterator[None]:
    """How much the functions of this module print inside the block: nothing, progress, or the time
    of each phase, too.
    """
    global _verbosity
    before, _verbosity = _verbosity, wanted
    try:
        yield
    finally:
        _verbosity = before


def is_quiet() -> bool:
    """Whether nothing but results, warnings and errors is printed."""
    return _verbosity == "quiet"


@contextmanager
def working(label: str, *, spinner: bool = True) -> Iterator[None]:
    """Say on stderr what is going on: on a terminal with a spinner while it lasts, otherwise as a
    line. spinner: False for work that draws on the terminal itself.
    """
    console, began = _console(), time.perf_counter()
    if console.is_terminal and spinner and _verbosity == "normal":
        with console.status(label):
            yield
        return
    console.print(label, soft_wrap=True)
    yield
    if _verbosity == "verbose":
        say(f"{label}: {time.perf_counter() - began:.1f} s")


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """A spinner on stderr if it is a terminal; nothing otherwise."""
    console = _console()
    with console.status(label) if _draws(console) else nullcontext():
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

    return Console(stderr=True, highlight=False, markup=False, quiet=is_quiet())


def _draws(console: Console) -> bool:
    return console.is_terminal and not console.quiet


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
    with Progress(*columns, console=console, transient=True, disable=not _draws(console)) as bar:
        task = bar.add_task("", total=total)

        def start(label: str, /) -> Advance:
            bar.update(task, description=label)
            if not _draws(console):
                console.print(label, soft_wrap=True)
            return lambda count: bar.advance(task, count)

        yield start
