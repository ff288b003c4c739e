"""What `l2pd compare` and `l2pd tune` print besides their own tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from l2pd_tools.cli.tables import (
    Column,
    comma_separated,
    markdown,
    print_figures,
    print_text,
    width,
)

_KEY = re.compile(r" (?=\w+=)")


def in_lines(form: str) -> bool:
    """Whether a cell may have several lines: on a terminal."""
    return form == "table" and width() is not None


def print_table(
    form: str, columns: Sequence[Column], rows: Sequence[Sequence[Any]], keys: int
) -> None:
    """Print a table of figures, as Markdown if the form is "markdown"."""
    if form == "markdown":
        typer.echo(markdown(columns, rows))
    else:
        print_figures(columns, rows, keys)


def print_comma_separated(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of plain values as CSV; the first row's keys are the header."""
    columns = [Column(name) for name in rows[0]]
    cells = [[None if row[name] is None else str(row[name]) for name in rows[0]] for row in rows]
    typer.echo(comma_separated(columns, cells))


def print_configurations(form: str, configurations: Sequence[str]) -> None:
    """Print what is equal in all configurations once, then what differs in each of the rows."""
    common, rest = divided(configurations)
    lines = [f"all: {common}"] if common else []
    lines += [f"{number}: {each}" for number, each in enumerate(rest, start=1)]
    for line in lines:
        if form == "markdown":
            typer.echo(f"- {line}")
        else:
            print_text(line, hanging=2)


def divided(configurations: Sequence[str]) -> tuple[str, list[str]]:
    """What is equal in all configurations, and what is left of each: its policy, at least."""
    if len(configurations) == 1:
        return "", list(configurations)
    parts = [_parts(configuration) for configuration in configurations]
    common = [
        part
        for part in parts[0]
        if all(part in each for each in parts) and not part.startswith("policy=")
    ]
    return " ".join(common), [
        " ".join(part for part in each if part not in common) for each in parts
    ]


def _parts(configuration: str) -> list[str]:
    """The parts ``key=value`` of a configuration; blanks in brackets do not divide it."""
    parts, begun = [], ""
    for part in _KEY.split(configuration):
        begun = f"{begun} {part}" if begun else part
        if all(begun.count(a) <= begun.count(b) for a, b in ("()", "[]")):
            parts.append(begun)
            begun = ""
    return [*parts, begun] if begun else parts


def interval(bounds: Sequence[float] | None) -> str:
    """Two bounds, which are shares, as percentages."""
    return "-" if bounds is None else " ".join(f"{100 * bound:.1f}" for bound in bounds)


def signed_interval(bounds: Sequence[float] | None) -> str:
    """Two bounds of a difference of shares, in points."""
    return "-" if bounds is None else " ".join(f"{100 * bound:+.1f}" for bound in bounds)
