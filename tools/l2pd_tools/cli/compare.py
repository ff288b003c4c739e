"""`l2pd compare`: several policies on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import L2PDError
from l2pd_plugins.policy_attributes import name_of
from l2pd_tools.cli import arguments
from l2pd_tools.cli.arguments import POLICY_HELP, format_of, option
from l2pd_tools.cli.groups import Decoding, Drawing, Loading, Prompting
from l2pd_tools.cli.keeping import Decodes, Out
from l2pd_tools.cli.kinds import OutFile, PolicyText
from l2pd_tools.cli.needing_torch import policy_of
from l2pd_tools.progress import importing

if TYPE_CHECKING:
    from l2pd_tools.evaluation.comparison import Row

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
    show_differing: Annotated[
        bool,
        typer.Option(
            "--show-differing", help="Also show the prompts that are answered differently."
        ),
    ] = False,
    out: Out = None,
    form: arguments.Format = None,
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
    Speed-ups are relative to the first row. Ctrl-C ends the command with the rows
    that are finished.
    """
    specs = list(policy or (DEMO_POLICIES if demo else ()))
    if not specs:
        raise L2PDError("name the policies to compare with --policy, or see --demo")
    if html is not None and len(specs) != 2:
        raise L2PDError(f"--html {html} plays two policies side by side, {len(specs)} are named")
    form = format_of(form, as_json)
    file, asked = prompting.read(heldout_prompts(), limit=DEMO_PROMPTS if demo else None)
    decodes = Decodes(asked, decoding, drawing, out)
    with importing():
        policies = [policy_of(spec) for spec in specs]
    loaded, tokenizer = loading.load()
    rows = decodes.rows(loaded, tokenizer, policies)
    if rows:
        from l2pd_tools.cli import compared

        figures = compared.as_json(rows, file, show_differing)
        if form == "json":
            typer.echo(json.dumps(figures, indent=2))
        else:
            compared.print_rows(form, rows, file, by_task=by_task, show_differing=show_differing)
            if demo and form == "table":
                _print_example(rows, tokenizer)
        arguments.write_json(json_file, figures)
    decodes.end(rows, policies)
    if html is not None:
        from l2pd_tools.viewing.side_by_side import write_page

        write_page(html, loaded, tokenizer, rows, source=file, settings=decodes.settings)


def _print_example(rows: Sequence[Row], tokenizer: Any) -> None:
    """The first mixed prompt's answer, step by step, under the first policy and learn2pd."""
    from rich.console import Console

    from l2pd_tools.viewing.annotated_text import LEGEND, annotated

    learned = next((row for row in rows if name_of(row.policy) == "learn2pd"), rows[-1])
    shown = [rows[0]] if learned is rows[0] else [rows[0], learned]
    console = Console(highlight=False, markup=False)
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
