"""`l2pd generate`: answers to prompts, under one policy."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_plugins import L2PDError
from l2pd_tools.cli import arguments
from l2pd_tools.cli.arguments import POLICY_HELP, option
from l2pd_tools.cli.groups import Decoding, Drawing, Form, Loading, Watching
from l2pd_tools.cli.kinds import PolicyText, PromptSource, PromptText, quoted
from l2pd_tools.cli.needing_torch import policy_of
from l2pd_tools.progress import importing, say

if TYPE_CHECKING:
    from l2pd_tools.evaluation.prompts import Prompt
    from l2pd_tools.evaluation.results import Answer, Evaluation


def generate(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(
            parser=PromptText(), help="The prompt.", show_default="one per line of stdin"
        ),
    ] = None,
    file: Annotated[
        str | None, option(PromptSource(), arguments.PROMPT_HELP, "--file", "--prompts")
    ] = None,
    limit: arguments.PromptLimit = None,
    form: Form,
    loading: Loading,
    policy: Annotated[str, option(PolicyText(), POLICY_HELP)] = "fixed_schedule",
    decoding: Decoding,
    drawing: Drawing,
    trace: Annotated[
        bool, typer.Option("--trace", help="Show on stderr which step committed each token.")
    ] = False,
    watching: Watching,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_json_lines: Annotated[
        bool, typer.Option("--jsonl", help="Print a line of JSON for each answer.")
    ] = False,
) -> None:
    """Answer prompts.

    The answers go to stdout; a line on stderr has the configuration and the speed.
    """
    if as_json and as_json_lines:
        raise L2PDError("--json and --jsonl exclude each other; give one")
    watching.require()
    if prompt is not None and file is not None:
        raise L2PDError(
            f"the prompt {quoted(prompt)} and --file {quoted(file)} exclude each other; give one"
        )
    for name, value in (
        ("--limit", limit),
        ("--prompt-field", form.prompt_field),
        ("--prompt-format", form.prompt_format),
    ):
        if prompt is not None and value is not None:
            raise L2PDError(f"{name} {quoted(value)}: only for prompts of a file or of stdin")
    if prompt is None and file is None and sys.stdin.isatty():
        raise L2PDError("give a prompt as the argument, with --file, or on stdin")
    prompts = _prompts(prompt, file, limit, form)
    settings: dict[str, Any] = {**decoding.settings, **drawing.settings(len(prompts))}
    with importing():
        settings["policy"] = policy_of(policy)
        from l2pd_tools.evaluation.run import evaluate

        watched = watching.terminal()
    loaded, tokenizer = loading.load()
    if watched is None:
        result = evaluate(loaded, tokenizer, prompts, batch_size=decoding.batch_size, **settings)
        seconds = result.seconds
    else:
        from l2pd_tools.viewing import live_terminal

        console, pace = watched
        result, seconds = live_terminal.watch(
            console, loaded, tokenizer, prompts, pace=pace, **settings
        )
    if as_json:
        typer.echo(json.dumps(_as_json(result, seconds)))
    elif as_json_lines:
        for answer in result.answers:
            typer.echo(json.dumps(_fields(answer)))
    else:
        for answer in result.answers:
            typer.echo(answer.text)
    if trace:
        _print_trace(result, tokenizer)
    say(
        f"{result.configuration} NFE={result.nfe:.4g} TPF={result.tokens_per_forward:.3g} "
        f"seconds={seconds:.3g}"
    )


def _prompts(prompt: str | None, file: str | None, limit: int | None, form: Form) -> list[Prompt]:
    from l2pd_tools.cli.prompt_files import STDIN, prompts_of
    from l2pd_tools.evaluation.prompts import Prompt

    wanted = form.form
    if prompt is None:
        return prompts_of(file or STDIN, limit, wanted)
    return [Prompt(prompt, "1", before=wanted.before, raw=wanted.raw)]


def _fields(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.prompt.id,
        "prompt": answer.prompt.text,
        "text": answer.text,
        "valid": answer.valid,
        "nfe": answer.nfe,
        "tokens_per_forward": answer.length / answer.nfe,
        "tokens": answer.tokens,
        "committed_at": answer.committed_at[: answer.length],
    }


def _as_json(result: Evaluation, seconds: float) -> dict[str, Any]:
    return {
        "configuration": result.configuration,
        "nfe": result.nfe,
        "tokens_per_forward": result.tokens_per_forward,
        "seconds": seconds,
        "answers": [_fields(answer) for answer in result.answers],
    }


def _print_trace(result: Evaluation, tokenizer: Any) -> None:
    from rich.console import Console

    from l2pd_tools.viewing.annotated_text import LEGEND, annotated

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    for answer in result.answers:
        if len(result.answers) > 1:
            console.print(f"{answer.prompt.id}: {answer.prompt.text}")
        steps = answer.committed_at[: answer.length]
        for line in annotated(tokenizer, answer.tokens, steps, console.width):
            console.print(line)
    console.print(LEGEND)
