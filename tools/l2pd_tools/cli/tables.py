"""Tables of the command line: for terminals of any width, for pipes, as Markdown and as CSV.

On a terminal a table takes at most its width. Two kinds of tables differ in what happens when the
columns do not fit: a `listing` becomes one paragraph for each row, `figures` become several tables
of fewer columns. A name is never broken, and no column is left out. Without a terminal (a pipe, a
file) each row is one line, unless the environment sets COLUMNS.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import typer

from l2pd_plugins.errors import printable

_LEAST_WIDTH = 20
_LEAST_PROSE = 24
"""Columns that a text gets at least; with fewer, a listing becomes paragraphs."""
_LONGEST = 1000
"""Greatest number of characters of a cell or a line; names and reasons come from third parties and
may have any length.
"""


@dataclass(frozen=True)
class Column:
    """A column: its header, whose lines are joined where a header has one line, and its kind."""

    header: str
    prose: bool = False
    """Whether the cells are texts, which may be wrapped between words."""
    right: bool = False
    """Whether the cells are aligned to the right, as figures are."""
    least: int | None = None
    """In figures: the width that the cells get at least, if their lines may be wrapped."""

    @property
    def title(self) -> str:
        """The header as one line."""
        return " ".join(self.header.split())


@dataclass(frozen=True)
class Styled:
    """A cell with a style of rich, such as a colour; styles add no information."""

    text: str
    style: str


Cell = str | Styled


def shown(text: str) -> str:
    """The text as one line, with characters that this terminal cannot print escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return printable(text, _LONGEST).encode(encoding, "backslashreplace").decode(encoding)


def width() -> int | None:
    """Columns of the terminal, or those that the environment sets; None without either."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        return None
    return max(console.width, _LEAST_WIDTH)


def print_text(text: str, hanging: int = 0) -> None:
    """Print a text. On a terminal its paragraphs are filled anew, except those with indented
    lines, such as lists. hanging: blanks before the second and later lines of what is wrapped.
    """
    available = width()
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            typer.echo()
        lines = [shown(line) for line in paragraph.split("\n")]
        if available is not None:
            if not any(line.startswith(" ") for line in lines):
                lines = [" ".join(lines)]
            lines = [part for line in lines for part in _wrapped(line, available, hanging)]
        typer.echo("\n".join(lines))


def _wrapped(line: str, available: int, hanging: int) -> list[str]:
    indent = " " * min(len(line) - len(line.lstrip()) + hanging, available // 2)
    filled = textwrap.fill(
        line,
        available,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.split("\n")


def print_listing(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> None:
    """Print rows of names and texts; the first column is the row's name."""
    cells = [[_clean(cell) for cell in row] for row in rows]
    available = width()
    if available is None:
        _print_lines(columns, cells)
    elif _fits(columns, cells, available):
        _print_grid(columns, cells)
    elif _fits(columns, divided := [list(map(_divided, row)) for row in cells], available):
        _print_grid(columns, divided)
    else:
        _print_paragraphs(columns, cells, available)


def _fits(columns: Sequence[Column], rows: Sequence[Sequence[Styled]], available: int) -> bool:
    """Whether a table fits in which only texts are wrapped."""
    sizes = zip(columns, _sizes(columns, rows), strict=True)
    needed = [min(size, _LEAST_PROSE) if column.prose else size for column, size in sizes]
    return sum(needed) + len(columns) - 1 <= available


def _divided(cell: Styled) -> Styled:
    """A name of the form DISTRIBUTION:NAME as two lines."""
    before, colon, after = cell.text.partition(":")
    is_pair = bool(colon) and " " not in cell.text
    return Styled(f"{before}:\n{after}", cell.style) if is_pair else cell


def print_figures(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], keys: int = 1) -> None:
    """Print rows of figures; cells may have several lines. The first `keys` columns name the row,
    and the first of them is repeated if the columns are divided into several tables.
    """
    cells = [[_clean_lines(cell) for cell in row] for row in rows]
    available = width()
    if available is None:
        _print_lines(columns, cells)
        return
    sizes = _sizes(columns, cells)
    least = [c.least or size for c, size in zip(columns, sizes, strict=True)]
    if sum(least) + len(columns) - 1 <= available:
        _print_grid(columns, cells)
        return
    for number, part in enumerate(_parts(sizes, available, keys)):
        if number:
            typer.echo()
        _print_grid([columns[i] for i in part], [[row[i] for i in part] for row in cells])


def markdown(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> str:
    """The rows as a table of Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rules = ["---:" if column.right else "---" for column in columns]
    texts = [[_joined(_clean(cell).text) for cell in row] for row in rows]
    return "\n".join([line(c.title for c in columns), line(rules), *map(line, texts)])


def comma_separated(columns: Sequence[Column], rows: Iterable[Sequence[Cell | None]]) -> str:
    """The rows as CSV; None is an empty cell."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(column.title for column in columns)
    writer.writerows(["" if cell is None else _clean(cell).text for cell in row] for row in rows)
    return made.getvalue().rstrip("\n")


def _clean(cell: Cell) -> Styled:
    return (
        Styled(shown(cell), "") if isinstance(cell, str) else Styled(shown(cell.text), cell.style)
    )


def _clean_lines(cell: Cell) -> Styled:
    text, style = (cell, "") if isinstance(cell, str) else (cell.text, cell.style)
    return Styled("\n".join(map(shown, text.split("\n"))), style)


def _joined(text: str) -> str:
    return " ".join(text.split())


def _sizes(columns: Sequence[Column], rows: Sequence[Sequence[Styled]]) -> list[int]:
    """The width of every column if nothing is wrapped."""
    from rich.cells import cell_len

    texts = [[column.header, *(row[i].text for row in rows)] for i, column in enumerate(columns)]
    return [max(cell_len(line) for text in each for line in text.split("\n")) for each in texts]


def _parts(sizes: Sequence[int], available: int, keys: int) -> list[list[int]]:
    """The columns of every table, as indices: as many as fit, the first of all repeated."""
    parts = [list(range(keys))]
    used = sum(sizes[:keys]) + keys - 1
    for i in range(keys, len(sizes)):
        if used + 1 + sizes[i] > available and len(parts[-1]) > 1:
            parts.append([0])
            used = sizes[0]
        parts[-1].append(i)
        used += 1 + sizes[i]
    return parts


def _print_lines(columns: Sequence[Column], rows: Sequence[Sequence[Styled]]) -> None:
    """Every row as one line."""
    from rich.cells import cell_len

    lines = [[column.title for column in columns]]
    lines += [[_joined(cell.text) for cell in row] for row in rows]
    sizes = [max(map(cell_len, texts)) for texts in zip(*lines, strict=True)]
    for line in lines:
        padded = []
        for column, size, text in zip(columns, sizes, line, strict=True):
            blanks = " " * (size - cell_len(text))
            padded.append(blanks + text if column.right else text + blanks)
        typer.echo("  ".join(padded).rstrip())


def _print_grid(columns: Sequence[Column], rows: Sequence[Sequence[Styled]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # One blank between columns: the table of the small world's three kinds has 80 columns.
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(
            column.header,
            justify="right" if column.right else "left",
            vertical="top",
            no_wrap=not column.prose and column.least is None,
            overflow="fold",
        )
    for row in rows:
        # Text, not str: rich would read brackets as markup.
        table.add_row(*(Text(cell.text, cell.style) for cell in row))
    Console(width=width(), highlight=False, markup=False).print(table)


def _print_paragraphs(
    columns: Sequence[Column], rows: Sequence[Sequence[Styled]], available: int
) -> None:
    """Every row as its name, and below it the other cells, each behind its header."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=available, highlight=False, markup=False)
    label = 2 + max(len(column.title) for column in columns[1:]) + 2
    for number, row in enumerate(rows):
        if number:
            console.print()
        console.print(Text(row[0].text, row[0].style or "bold"), overflow="fold")
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if not cell.text:
                continue
            longest = max(map(len, cell.text.split()))
            # A word that does not fit beside the header goes below it.
            indent = label if longest <= available - label else 2
            lines = Text(cell.text, cell.style).wrap(console, available - indent)
            title = f"  {column.title}".ljust(label)
            if indent < label:
                console.print(Text(title.rstrip(), "dim"))
                title = " " * indent
            for line in lines:
                line.rstrip()
                console.print(Text.assemble((title, "dim"), line))
                title = " " * indent
