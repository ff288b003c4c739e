"""`l2pd compare`: several policies on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import L2PDError
from l2pd_plugins.policy_attributes import name_of, printable_name_of
from l2pd_tools.cli import arguments
from l2pd_tools.cli.arguments import POLICY_HELP, option
from l2pd_tools.cli.groups import Decoding, Drawing, Loading, Prompting
from l2pd_tools.cli.kinds import OutFile, PolicyText
from l2pd_tools.cli.needing_torch import policy_of
from l2pd_tools.cli.tables import Column, print_figures, width
from l2pd_tools.evaluation.comparison import Row, percent, require_accepted, run_policies
from l2pd_tools.progress import importing

if TYPE_CHECKING:
    from rich.console import Console

    from l2pd_tools.evaluation.intervals import Interval

DEMO_POLICIES = (
    "fixed_schedule",
    "confidence_threshold,threshold=0.9",
    "confidence_threshold,threshold=0.7",
    "learn2pd",
    "settled",
    "oracle",
)
DEMO_PROMPTS = 120
"""Eight of each task: every fifteen prompts of the file contain one of each task."""
_WIDEST = 1000
"""Columns in which a table is measured, so that no name is wrapped."""


def compare(
    *,
    policy: Annotated[
        list[str] | None, option(PolicyText(), f"{POLICY_HELP} Give it several times.")
    ] = None,
    loading: Loading,
    prompting: Prompting,
    decoding: Decoding,
    drawing: Drawing,
    by_task: Annotated[
        bool, typer.Option("--by-task", help="Also show validity and TPF of every task.")
    ] = False,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help="The project's own policies on its own small model, and one answer step by step; "
            f"--limit is {DEMO_PROMPTS} where it is not given.",
        ),
    ] = False,
    as_json: arguments.AsJson = False,
    json_file: arguments.JsonFile = None,
    html: Annotated[
        Path | None,
        option(
            OutFile(),
            "Write a page that plays two policies side by side, step by step, on the first "
            "prompts.",
        ),
    ] = None,
) -> None:
    """Compare policies on the same prompts.

    Validity is the share of answers that the prompts' checkers accept. Agreement is
    the share that equal the answers at one token per step; these are decoded first
    if no row has them. NFE counts forward passes, TPF tokens per forward pass.
    Speed-ups are relative to the first row.
    """
    specs = list(policy or (DEMO_POLICIES if demo else ()))
    if not specs:
        raise L2PDError("name the policies to compare with --policy, or see --demo")
    if html is not None and len(specs) != 2:
        raise L2PDError(f"--html {html} plays two policies side by side, {len(specs)} are named")

    from rich.console import Console

    file, asked = prompting.read(heldout_prompts(), limit=DEMO_PROMPTS if demo else None)
    settings = {**decoding.settings, **drawing.settings(len(asked))}
    with importing():
        policies = [policy_of(spec) for spec in specs]
    loaded, tokenizer = loading.load()
    require_accepted(loaded, policies, settings)

    rows = run_policies(
        loaded, tokenizer, asked, policies, {**settings, "batch_size": decoding.batch_size}
    )
    figures = _as_json(rows, file)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        console = Console(highlight=False, markup=False)
        _print_table(console, rows)
        if by_task:
            _print_tasks(console, rows)
        _print_configurations(console, rows, file)
        if demo:
            _print_example(console, rows, tokenizer)
    arguments.write_json(json_file, figures)
    if html is not None:
        from l2pd_tools.viewing.side_by_side import write_page

        write_page(html, loaded, tokenizer, rows, source=file, settings=settings)


def _print_table(console: Console, rows: Sequence[Row]) -> None:
    from rich.cells import cell_len
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    first = rows[0].result
    kinds = list(first.by_kind())
    headers = ["valid\n%", *(f"{_two_lines(kind)}" for kind in kinds), "agree\n%", "NFE", "TPF"]
    headers += ["s", "x\nNFE", "x\ntime"]
    # One blank between the columns: the table of the small world's three kinds has 80 columns.
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", justify="right")
    table.add_column("policy", overflow="fold")
    for header in headers:
        table.add_column(header, justify="right", vertical="top", no_wrap=True)
    texts = []
    for number, row in enumerate(rows, start=1):
        result, parts = row.result, row.result.by_kind()
        figures = [
            percent(result.validity),
            *(percent(parts[kind].validity) for kind in kinds),
            percent(result.agreement),
            f"{result.nfe:.1f}",
            f"{result.tokens_per_forward:.2f}",
            _seconds(result.seconds),
            f"{first.nfe / result.nfe:.1f}",
            f"{first.seconds / result.seconds:.1f}",
        ]
        table.add_row(str(number), Text(row.label_in_lines), *figures)
        texts.append([str(number), row.label_in_lines, *figures])
    labels = [row.label_in_lines.split("\n") for row in rows]
    # A policy's options may be wrapped, its name may not.
    spare = max(cell_len(line) for lines in labels for line in lines)
    spare -= max(cell_len(lines[0]) for lines in labels)
    wide = console.options.update(max_width=_WIDEST)
    if width() is None or Measurement.get(console, wide, table).maximum - spare <= console.width:
        console.print(table)
        return
    columns = [Column("", right=True), Column("policy")]
    columns += [Column(header, right=True) for header in headers]
    print_figures(columns, texts, keys=2)


def _print_configurations(console: Console, rows: Sequence[Row], file: str) -> None:
    """Below the tables: the configuration of each row, and the interval of its validity."""
    from l2pd_tools.evaluation.intervals import validity_difference

    console.print()
    for number, row in enumerate(rows, start=1):
        line = f"{number}: {row.result.configuration} prompts_file={file}"
        console.print(line, soft_wrap=True)
    console.print()
    for number, row in enumerate(rows[1:], start=2):
        interval = validity_difference(row.result, rows[0].result)
        if interval is not None:
            console.print(
                f"validity of {number} against 1: {100 * interval.difference:+.1f} points, "
                f"{100 * interval.level:.0f} % interval {100 * interval.low:+.1f} to "
                f"{100 * interval.high:+.1f} ({interval.method})",
                soft_wrap=True,
            )
    if any("reference" in row.policy.requires for row in rows):
        names = ", ".join(
            printable_name_of(row.policy) for row in rows if "reference" in row.policy.requires
        )
        console.print(
            f"{names} is given the answers at one token per step, whose cost is not counted.",
            soft_wrap=True,
        )


def _print_tasks(console: Console, rows: Sequence[Row]) -> None:
    from rich.table import Table

    tasks = [row.result.by_task() for row in rows]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    table.add_column("n", justify="right")
    for number in range(1, len(rows) + 1):
        table.add_column(f"{number}\nvalid", justify="right", no_wrap=True)
        table.add_column("\nTPF", justify="right", no_wrap=True)
    for name, part in tasks[0].items():
        cells = [(parts[name].validity, parts[name].tokens_per_forward) for parts in tasks]
        figures = [cell for valid, tpf in cells for cell in (percent(valid), f"{tpf:.2f}")]
        table.add_row(name, str(len(part.answers)), *figures)
    console.print()
    console.print(table)


def _print_example(console: Console, rows: Sequence[Row], tokenizer: Any) -> None:
    """The first mixed prompt's answer, step by step, under the first policy and learn2pd."""
    from l2pd_tools.viewing.annotated_text import LEGEND, annotated

    learned = next((row for row in rows if name_of(row.policy) == "learn2pd"), rows[-1])
    shown = [rows[0]] if learned is rows[0] else [rows[0], learned]
    kinds = [answer.prompt.kind for answer in rows[0].result.answers]
    index = kinds.index("mixed") if "mixed" in kinds else 0
    console.print()
    console.print(f"Example: {rows[0].result.answers[index].prompt.text}", soft_wrap=True)
    console.print(LEGEND, soft_wrap=True)
    for row in shown:
        answer = row.result.answers[index]
        verdict = {True: ", valid", False: ", not valid", None: ""}[answer.valid]
        console.print()
        console.print(
            f"{row.label}: {answer.length} tokens in {answer.nfe} steps{verdict}", soft_wrap=True
        )
        steps = answer.committed_at[: answer.length]
        for line in annotated(tokenizer, answer.tokens, steps, console.width):
            console.print(line, soft_wrap=True)


def _as_json(rows: Sequence[Row], file: str) -> dict[str, Any]:
    from l2pd_tools.evaluation.intervals import validity_difference

    first = rows[0].result

    def fields(row: Row) -> dict[str, Any]:
        interval: Interval | None = validity_difference(row.result, first)
        return {
            "policy": row.label,
            **row.result.summary(),
            "speedup_nfe": first.nfe / row.result.nfe,
            "speedup_seconds": first.seconds / row.result.seconds,
            "validity_against_first": None if interval is None else vars(interval),
        }

    return {
        "prompts_file": file,
        "prompts": len(first.answers),
        "rows": [fields(row) for row in rows],
    }


def _seconds(seconds: float) -> str:
    """At most 3 characters below 1,000 seconds, so that a slow machine does not widen a table."""
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}"


def _two_lines(kind: str) -> str:
    return kind.replace("_", "\n", 1) if "_" in kind else f"{kind}\n%"
