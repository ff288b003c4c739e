"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from l2pd_plugins import L2PDError, writing
from l2pd_tools.cli.completing import completion_of
from l2pd_tools.cli.kinds import (
    Adapter,
    Device,
    Kind,
    Model,
    OneOf,
    OutFile,
    PromptSource,
    PromptText,
    Whole,
)

END_OF_TEXT_RULES = ("block", "predicted", "off")
"""Repeated here because the core's module imports torch."""
CACHES = ("none", "prefix", "dual", "block")
"""Repeated here because the engine's module imports the engine."""
FORMATS = ("table", "markdown", "csv", "json")
MOST_POSITIONS = 2**20
MOST_ROWS = 2**16
MOST_PROMPTS = 10**9
SEEDS_BELOW = 2**63
TEMPERATURES = (1e-30, 1e30)
"""Bounds of `l2pd_adapters.huggingface.checking`, and of counts."""


def option(
    kind: Kind, help: str | None = None, *names: str, show_default: bool | str = True
) -> Any:
    """An option of typer with values of a kind. names: as typed, unless they are the parameter's;
    show_default: may be a text for a default that is found later.
    """
    placeholder = None if kind.metavar == Kind.metavar else kind.metavar  # typer's own for a text
    return typer.Option(
        *names,
        parser=kind,
        metavar=placeholder,
        help=help,
        show_default=show_default,
        autocompletion=completion_of(kind),
    )


def argument(kind: Kind, help: str, show_default: bool | str = True) -> Any:
    """An argument of typer with values of a kind; as `option`."""
    return typer.Argument(
        parser=kind,
        help=help,
        show_default=show_default,
        autocompletion=completion_of(kind),
    )


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; short for --format json.")]
Format = Annotated[
    str | None, option(OneOf(FORMATS), "How to print.", "--format", show_default="table")
]
ModelName = Annotated[str, option(Model(), "A shipped model, a folder, or a hub id.", "--model")]
AdapterName = Annotated[
    str | None,
    option(Adapter(), "A LoRA adapter for the model: a folder, or a hub id.", "--adapter"),
]
DeviceName = Annotated[str, option(Device(), "cpu, cuda, cuda:N, or auto.", "--device")]
MaxNewTokens = Annotated[int, option(Whole(1, MOST_POSITIONS), "Length of the canvas, in tokens.")]
BlockLength = Annotated[
    int | None, option(Whole(1, MOST_POSITIONS), "Positions per block.", show_default="the model's")
]
EndOfTextRule = Annotated[
    str,
    option(
        OneOf(END_OF_TEXT_RULES),
        "What ends a text: a committed end-of-text token, a predicted one, or nothing.",
    ),
]
Cache = Annotated[
    str | None,
    option(OneOf(CACHES), "Which keys and values are cached.", show_default="the model's"),
]
BatchSize = Annotated[int, option(Whole(1, MOST_ROWS), "Number of prompts decoded together.")]
PROMPT_HELP = "Lines of .txt, rows of .jsonl, .json, .csv or a data set (hf://...), or - for stdin."
PromptFile = Annotated[
    str | None,
    option(PromptSource(), PROMPT_HELP, show_default="the small world's held-out prompts"),
]
PromptLimit = Annotated[
    int | None,
    option(Whole(1, MOST_PROMPTS), "Only the first prompts.", "--limit", show_default="all"),
]
JsonFile = Annotated[Path | None, option(OutFile(), "Also write the figures to this file as JSON.")]

SystemPrompt = Annotated[
    str | None, option(PromptText(), "A system prompt before each prompt.", show_default="none")
]
POLICY_HELP = "NAME[,key=value...], as in confidence_threshold,threshold=0.9."


def format_of(form: str | None, as_json: bool) -> str:
    """One of `FORMATS`, from --format and --json. Raises L2PDError if they contradict."""
    if as_json and form not in (None, "json"):
        raise L2PDError(f"--format {form} and --json exclude each other; give one")
    return "json" if as_json else form or "table"


def write_json(file: Path | None, figures: Any) -> None:
    """Write the figures to --json-file, if it is given."""
    if file is not None:
        text = json.dumps(figures, indent=2) + "\n"
        writing.write_text(file, text, f"--json-file {file}")
