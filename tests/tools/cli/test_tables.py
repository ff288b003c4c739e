"""Tables at any width: nothing is lost, no name is broken, and a pipe gets one line per row."""

from __future__ import annotations

import csv
import io
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2pd_tools.cli import tables
from l2pd_tools.cli.tables import Column, Styled

NAMES = st.text("abc_", min_size=1, max_size=18)
WORDS = st.text("xyz,.[]", min_size=1, max_size=12)
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)
ORIGINS = st.tuples(NAMES, NAMES).map(":".join)
LISTING = (Column("name"), Column("summary", prose=True), Column("origin"))
ROWS = st.lists(st.tuples(NAMES, TEXTS, ORIGINS), min_size=1, max_size=5)
WIDTHS = st.sampled_from([40, 60, 80, 120])
QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def printed(monkeypatch, capsys, width: int | None, function, *given) -> list[str]:
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    capsys.readouterr()
    function(*given)
    return capsys.readouterr().out.splitlines()


@QUICK
@given(rows=ROWS, width=WIDTHS)
def test_a_listing_keeps_every_name_and_word_within_the_width(
    monkeypatch, capsys, rows, width
) -> None:
    lines = printed(monkeypatch, capsys, width, tables.print_listing, LISTING, rows)
    assert all(len(line) <= width for line in lines)
    said = " ".join(lines).split()
    for name, summary, origin in rows:
        assert name in said
        assert all(word in said for word in summary.split())
        # An origin may end its line behind the colon, never elsewhere.
        before, after = origin.split(":")
        assert origin in said or (f"{before}:" in said and after in said)


@QUICK
@given(rows=ROWS)
def test_a_pipe_gets_one_line_for_each_row(monkeypatch, capsys, rows) -> None:
    header, *lines = printed(monkeypatch, capsys, None, tables.print_listing, LISTING, rows)
    assert header.split() == ["name", "summary", "origin"]
    assert [" ".join(line.split()) for line in lines] == [
        " ".join(f"{name} {summary} {origin}".split()) for name, summary, origin in rows
    ]


FIGURES = st.integers(1, 12).flatmap(
    lambda count: st.lists(
        st.lists(st.decimals(0, 999, places=1).map(str), min_size=count, max_size=count),
        min_size=1,
        max_size=4,
    )
)


@QUICK
@given(figures=FIGURES, width=WIDTHS)
def test_figures_are_divided_into_tables_that_name_their_rows(
    monkeypatch, capsys, figures, width
) -> None:
    count = len(figures[0])
    columns = [Column("", right=True), Column("policy")]
    columns += [Column(f"figure\n{chr(97 + i)}", right=True) for i in range(count)]
    rows = [
        [str(number), f"policy_{number}\n threshold=0.{number}", *cells]
        for number, cells in enumerate(figures, start=1)
    ]
    lines = printed(monkeypatch, capsys, width, tables.print_figures, columns, rows, 2)
    assert all(len(line) <= width for line in lines)
    for number, cells in enumerate(figures, start=1):
        mine = [line.split() for line in lines if line.split()[:1] == [str(number)]]
        assert mine[0][1] == f"policy_{number}"
        assert mine[0][2:] + [cell for part in mine[1:] for cell in part[1:]] == cells
    letters = [word for line in lines for word in line.split() if re.fullmatch("[a-l]", word)]
    assert letters == [chr(97 + i) for i in range(count)]
    (header, *whole) = printed(monkeypatch, capsys, None, tables.print_figures, columns, rows, 2)
    assert header.split()[1:3] == ["figure", "a"]
    assert [line.split()[3:] for line in whole] == figures


def test_a_name_wider_than_the_terminal_is_folded_and_not_cut(monkeypatch, capsys) -> None:
    name = "n" * 50
    rows = [(name, "a text", "dist:entry")]
    lines = printed(monkeypatch, capsys, 40, tables.print_listing, LISTING, rows)
    assert lines[:2] == ["n" * 40, "n" * 10]


@QUICK
@given(rows=ROWS)
def test_csv_reads_back_and_markdown_has_every_cell(rows) -> None:
    made = list(csv.reader(io.StringIO(tables.comma_separated(LISTING, rows))))
    assert made == [["name", "summary", "origin"], *map(list, rows)]
    lines = tables.markdown(LISTING, rows).split("\n")
    assert lines[1] == "| --- | --- | --- |"
    assert len(lines) == 2 + len(rows)
    assert all(line.count(" | ") == 2 for line in lines if "|  |" not in line)


def test_cells_of_third_parties_cannot_forge_lines_or_colours(monkeypatch, capsys) -> None:
    columns = (Column("name"), Column("status"))
    rows = [("a\nb", Styled("x\x1b[31m|y", "red"))]
    lines = printed(monkeypatch, capsys, None, tables.print_listing, columns, rows)
    assert lines[1].split() == ["a\\nb", "x\\x1b[31m|y"]
    assert tables.markdown(columns, rows).endswith("| a\\nb | x\\x1b[31m\\|y |")


@pytest.mark.parametrize("width", [40, None])
def test_texts_are_filled_on_a_terminal_only(monkeypatch, capsys, width) -> None:
    text = "One sentence that is\nbroken early.\n\nArgs:\n    limit: as it stands."
    lines = printed(monkeypatch, capsys, width, tables.print_text, text)
    if width is None:
        assert lines == text.split("\n")
    else:
        assert lines[0] == "One sentence that is broken early."
        assert lines[1:] == ["", "Args:", "    limit: as it stands."]
