"""What `l2pd compare` prints about its rows: as tables, CSV or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from rich.cells import cell_len

from l2pd_plugins.policy_attributes import printable_name_of
from l2pd_tools.cli.figures import (
    in_lines,
    interval,
    print_comma_separated,
    print_configurations,
    print_table,
    signed_interval,
)
from l2pd_tools.cli.tables import Column, print_text, shown
from l2pd_tools.evaluation.comparison import Differing, Row, differing, percent
from l2pd_tools.evaluation.intervals import (
    agreement_interval,
    validity_difference,
    validity_interval,
)


def as_json(rows: Sequence[Row], file: str, show_differing: bool) -> dict[str, Any]:
    """The figures as plain values."""
    first = rows[0].result

    def fields(row: Row) -> dict[str, Any]:
        difference = validity_difference(row.result, first)
        return {
            "policy": row.label,
            **row.result.summary(),
            "validity_interval": validity_interval(row.result),
            "agreement_interval": agreement_interval(row.result),
            "speedup_nfe": first.nfe / row.result.nfe,
            "speedup_seconds": first.seconds / row.result.seconds,
            "validity_against_first": None if difference is None else vars(difference),
        }

    figures = {
        "prompts_file": file,
        "prompts": len(first.answers),
        "rows": [fields(row) for row in rows],
    }
    if show_differing:
        figures["differing"] = [
            {
                "id": each.prompt.id,
                "prompt": each.prompt.text,
                "answers": [
                    {"rows": list(rows), "text": a.text, "valid": a.valid, "cut": a.cut}
                    for rows, a in each.answers
                ],
            }
            for each in differing(rows)
        ]
    return figures


def print_rows(
    form: str, rows: Sequence[Row], file: str, *, by_task: bool, show_differing: bool
) -> None:
    """Print everything about the rows in a format of `arguments.FORMATS`, except JSON."""
    configurations = [f"{row.result.configuration} prompts_file={file}" for row in rows]
    if form == "csv":
        pairs = zip(rows, configurations, strict=True)
        print_comma_separated([_plain(row, rows[0], text) for row, text in pairs])
        return
    _print_figures(form, rows)
    if by_task:
        typer.echo()
        _print_tasks(form, rows)
    typer.echo()
    print_configurations(form, configurations)
    typer.echo()
    _print_notes(rows)
    if show_differing:
        _print_differing(differing(rows))


def _plain(row: Row, first: Row, configuration: str) -> dict[str, Any]:
    """A row of the CSV."""
    result = row.result
    valid, agreed = (
        made(result) or (None, None) for made in (validity_interval, agreement_interval)
    )
    against = validity_difference(result, first.result)
    return {
        "policy": row.word,
        "prompts": len(result.answers),
        "validity": result.validity,
        "validity_low": valid[0],
        "validity_high": valid[1],
        "against_first": against and against.difference,
        "against_first_low": against and against.low,
        "against_first_high": against and against.high,
        **{f"validity_{name}": part.validity for name, part in result.by_kind().items()},
        "agreement": result.agreement,
        "agreement_low": agreed[0],
        "agreement_high": agreed[1],
        "nfe": result.nfe,
        "tokens_per_forward": result.tokens_per_forward,
        "seconds": result.seconds,
        "speedup_nfe": first.result.nfe / result.nfe,
        "speedup_seconds": first.result.seconds / result.seconds,
        "cut": result.cut,
        "configuration": configuration,
    }


def _print_figures(form: str, rows: Sequence[Row]) -> None:
    """Print the figures of every row, and below them how certain the shares are."""
    first = rows[0].result
    kinds = list(first.by_kind())
    names = [row.label_in_lines if in_lines(form) else row.word for row in rows]
    headers = ["valid\n%", *(_two_lines(kind) for kind in kinds), "agree\n%", "NFE", "TPF"]
    headers += ["s", "x\nNFE", "x\ntime"]
    # A policy's options may be wrapped, its name may not.
    longest = max(cell_len(name.split("\n")[0]) for name in names)
    columns = [Column("", right=True), Column("policy", least=longest)]
    columns += [Column(header, right=True) for header in headers]
    cells = []
    for number, (row, name) in enumerate(zip(rows, names, strict=True), start=1):
        result, parts = row.result, row.result.by_kind()
        shares = [result.validity, *(parts[kind].validity for kind in kinds), result.agreement]
        cells.append(
            [
                str(number),
                name,
                *map(percent, shares),
                f"{result.nfe:.1f}",
                f"{result.tokens_per_forward:.2f}",
                _seconds(result.seconds),
                f"{first.nfe / result.nfe:.1f}",
                f"{first.seconds / result.seconds:.1f}",
            ]
        )
    print_table(form, columns, cells, keys=2)
    typer.echo()
    _print_certainty(form, rows)


def _print_certainty(form: str, rows: Sequence[Row]) -> None:
    """Print of how many answers the shares are, their intervals, and how many answers were cut."""
    headers = ["valid\nof", "95 %\ninterval", "against\n1", "95 %\ninterval"]
    headers += ["agree\nof", "95 %\ninterval", "answers\ncut"]
    columns = [Column(header, right=True) for header in ("", *headers)]
    cells = []
    for number, row in enumerate(rows, start=1):
        result = row.result
        difference = None if number == 1 else validity_difference(result, rows[0].result)
        known = [answer.valid for answer in result.answers if answer.valid is not None]
        total = len(result.answers)
        agreement = result.agreement
        cells.append(
            [
                str(number),
                f"{sum(known)}/{len(known)}" if known else "-",
                interval(validity_interval(result)),
                "-" if difference is None else f"{100 * difference.difference:+.1f}",
                signed_interval(None if difference is None else (difference.low, difference.high)),
                "-" if agreement is None else f"{round(agreement * total)}/{total}",
                interval(agreement_interval(result)),
                str(result.cut),
            ]
        )
    print_table(form, columns, cells, keys=1)


def _print_notes(rows: Sequence[Row]) -> None:
    """Print how the intervals were made, and what else a reader of the figures needs."""
    differences = [validity_difference(row.result, rows[0].result) for row in rows[1:]]
    drawn = [
        str(number)
        for number, each in enumerate(differences, start=2)
        if each is not None and each.method != "exact"
    ]
    other = f", except against 1 in {', '.join(drawn)}: paired bootstrap" if drawn else ""
    print_text(f"Intervals are exact{other}.")
    if any(row.result.cut for row in rows):
        print_text("Answers that were cut had not ended at --max-new-tokens.")
    helped = [printable_name_of(r.policy) for r in rows if "reference" in r.policy.requires]
    if helped:
        print_text(
            f"{', '.join(helped)} is given the answers at one token per step, whose cost is not "
            "counted."
        )


def _print_tasks(form: str, rows: Sequence[Row]) -> None:
    tasks = [row.result.by_task() for row in rows]
    columns = [Column("task"), Column("n", right=True)]
    for number in range(1, len(rows) + 1):
        columns += [Column(f"{number}\n{figure}", right=True) for figure in ("valid", "TPF")]
    cells = []
    for name, part in tasks[0].items():
        shares = [(parts[name].validity, parts[name].tokens_per_forward) for parts in tasks]
        figures = [cell for valid, tpf in shares for cell in (percent(valid), f"{tpf:.2f}")]
        cells.append([name, str(len(part.answers)), *figures])
    print_table(form, columns, cells, keys=2)


def _print_differing(differing: Sequence[Differing]) -> None:
    """Print the prompts that the rows answer differently, and their answers."""
    for each in differing:
        typer.echo()
        print_text(f"{each.prompt.id}: {shown(each.prompt.text)}", hanging=2)
        for rows, answer in each.answers:
            verdict = {True: "valid", False: "not valid", None: ""}[answer.valid]
            told = ", ".join(filter(None, [*rows, verdict, "cut" * answer.cut]))
            print_text(f"  {told}: {shown(answer.text)}", hanging=2)


def _seconds(seconds: float) -> str:
    """At most 3 characters below 1,000 seconds, so that a slow machine does not widen a table."""
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}"


def _two_lines(kind: str) -> str:
    return kind.replace("_", "\n", 1) if "_" in kind else f"{kind}\n%"
