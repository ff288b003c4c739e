"""`l2pd generate`: answers to prompts, under one policy."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_plugins import L2PDError, create_policy
from l2pd_tools.cli import arguments
from l2pd_tools.cli.arguments import POLICY_HELP, SEEDS_BELOW, TEMPERATURES, option
from l2pd_tools.cli.kinds import InFile, Number, PolicyText, PromptText, Whole
from l2pd_tools.loading import load_model
from l2pd_tools.policy_text import parse_policy

if TYPE_CHECKING:
    from l2pd_tools.evaluation.prompts import Prompt
    from l2pd_tools.evaluation.results import Answer, Evaluation

_FREE_SEEDS = 2**31
"""Upper bound of a seed that the command draws itself."""

PACE = 0.1
"""Default of --pace: seconds that --watch shows each step."""

LONGEST_PACE = 3600.0
"""Greatest --pace in seconds; with a longer one the command would seem to hang."""


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            parser=PromptText(), help="The prompt.", show_default="one per line of stdin"
        ),
    ] = None,
    file: Annotated[
        Path | None,
        option(
            InFile(dash=True),
            "Prompts: one per line, or .jsonl objects with a 'prompt'; - is stdin.",
        ),
    ] = None,
    model: arguments.ModelName = "tiny-llada",
    adapter: arguments.AdapterName = None,
    device: arguments.DeviceName = "auto",
    policy: Annotated[str, option(PolicyText(), POLICY_HELP)] = "fixed_schedule",
    max_new_tokens: arguments.MaxNewTokens = 128,
    block_length: arguments.BlockLength = None,
    end_of_text: arguments.EndOfTextRule = "block",
    temperature: Annotated[
        float, option(Number(*TEMPERATURES, or_zero=True), "Temperature of sampling; 0 is greedy.")
    ] = 0.0,
    seed: Annotated[
        int | None,
        option(
            Whole(0, SEEDS_BELOW - 1),
            "Seed of sampling; prompt i draws with seed + i.",
            show_default="a fresh one",
        ),
    ] = None,
    cache: arguments.Cache = None,
    batch_size: arguments.BatchSize = 16,
    trace: Annotated[
        bool, typer.Option("--trace", help="Show on stderr which step committed each token.")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Draw every step on the terminal (stderr); prompts are decoded one by one.",
        ),
    ] = False,
    pace: Annotated[
        float | None,
        option(
            Number(0, LONGEST_PACE),
            "Least number of seconds that --watch shows each step.",
            show_default=f"{PACE}",
        ),
    ] = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Answer prompts.

    The answers go to stdout; a line on stderr has the configuration and the speed.
    """
    if pace is not None and not watch:
        raise L2PDError(f"--pace {pace} requires --watch")
    if prompt is not None and file is not None:
        raise L2PDError(f"the prompt {prompt!r} and --file {file} exclude each other; give one")
    if prompt is None and file is None and sys.stdin.isatty():
        raise L2PDError("give a prompt as the argument, with --file, or on stdin")
    made = create_policy(parse_policy(policy))
    if temperature > 0 and seed is None:
        # Drawn here and printed, so that any answer can be reproduced.
        seed = secrets.randbelow(_FREE_SEEDS)

    from l2pd_tools.evaluation.run import evaluate
    from l2pd_tools.viewing import live_terminal

    console = live_terminal.terminal() if watch else None
    prompts = _prompts(prompt, file)
    if seed is not None and seed + len(prompts) > SEEDS_BELOW:
        raise L2PDError(
            f"--seed {seed}: prompt i draws with seed + i; expected at most "
            f"{SEEDS_BELOW - len(prompts)} for {len(prompts)} prompts"
        )
    loaded, tokenizer = load_model(model, device, adapter)
    settings: dict[str, Any] = {
        "policy": made,
        "max_new_tokens": max_new_tokens,
        "block_length": block_length,
        "end_of_text": end_of_text,
        "cache": cache,
        "temperature": temperature,
        "seed": seed,
    }
    if console is None:
        result = evaluate(loaded, tokenizer, prompts, batch_size=batch_size, **settings)
        seconds = result.seconds
    else:
        pace = PACE if pace is None else pace
        result, seconds = live_terminal.watch(
            console, loaded, tokenizer, prompts, pace=pace, **settings
        )
    if as_json:
        typer.echo(json.dumps(_as_json(result, seconds)))
    else:
        for answer in result.answers:
            typer.echo(answer.text)
    if trace:
        _print_trace(result, tokenizer)
    typer.echo(
        f"{result.configuration} NFE={result.nfe:.4g} TPF={result.tokens_per_forward:.3g} "
        f"seconds={seconds:.3g}",
        err=True,
    )


def _prompts(prompt: str | None, file: Path | None) -> list[Prompt]:
    from l2pd_tools.cli.prompt_files import prompts_of
    from l2pd_tools.evaluation.prompts import Prompt, parse_prompts

    if prompt is not None:
        return [Prompt(prompt, "1")]
    if file is None or str(file) == "-":
        try:
            return parse_prompts(sys.stdin, "stdin")
        except UnicodeDecodeError as error:
            raise L2PDError(f"prompts stdin: {error}") from error
    return prompts_of(file)


def _as_json(result: Evaluation, seconds: float) -> dict[str, Any]:
    def fields(answer: Answer) -> dict[str, Any]:
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

    return {
        "configuration": result.configuration,
        "nfe": result.nfe,
        "tokens_per_forward": result.tokens_per_forward,
        "seconds": seconds,
        "answers": [fields(answer) for answer in result.answers],
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
