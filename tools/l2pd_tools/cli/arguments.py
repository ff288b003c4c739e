"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from l2pd_plugins import writing
from l2pd_tools.cli.kinds import Adapter, Device, InFile, Model, OneOf, OutFile, Whole

END_OF_TEXT_RULES = ("block", "predicted", "off")
"""Repeated here because the core's module imports torch."""
CACHES = ("none", "prefix", "dual", "block")
"""Repeated here because the engine's module imports the engine."""
MOST_POSITIONS = 2**20
MOST_ROWS = 2**16
MOST_PROMPTS = 10**9
SEEDS_BELOW = 2**63
TEMPERATURES = (1e-30, 1e30)
"""Bounds of `l2pd_adapters.huggingface.checking`, and of counts."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelName = Annotated[
    str,
    typer.Option("--model", parser=Model(), help="A shipped model, a folder, or a hub id."),
]
AdapterName = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        parser=Adapter(),
        help="A LoRA adapter for the model: a folder, or a hub id.",
    ),
]
DeviceName = Annotated[
    str, typer.Option("--device", parser=Device(), help="cpu, cuda, cuda:N, or auto.")
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        parser=Whole(1, MOST_POSITIONS),
        metavar=Whole.metavar,
        help="Length of the canvas, in tokens.",
    ),
]
BlockLength = Annotated[
    int | None,
    typer.Option(
        parser=Whole(1, MOST_POSITIONS),
        metavar=Whole.metavar,
        help="Positions per block.",
        show_default="the model's",
    ),
]
EndOfTextRule = Annotated[
    str,
    typer.Option(
        parser=OneOf(END_OF_TEXT_RULES),
        metavar=OneOf(END_OF_TEXT_RULES).metavar,
        help="What ends a text: a committed end-of-text token, a predicted one, or nothing.",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        parser=OneOf(CACHES),
        metavar=OneOf(CACHES).metavar,
        help="Which keys and values are cached.",
        show_default="the model's",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        parser=Whole(1, MOST_ROWS),
        metavar=Whole.metavar,
        help="Number of prompts decoded together.",
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        parser=InFile(),
        metavar=InFile.metavar,
        help="One per line, or .jsonl objects with a 'prompt'.",
        show_default="the small world's held-out prompts",
    ),
]
PromptLimit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        parser=Whole(1, MOST_PROMPTS),
        metavar=Whole.metavar,
        help="Only the first prompts.",
        show_default="all",
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        parser=OutFile(),
        metavar=OutFile.metavar,
        help="Also write the figures to this file as JSON.",
    ),
]

POLICY_HELP = "NAME[,key=value...], as in confidence_threshold,threshold=0.9."


def write_json(file: Path | None, figures: Any) -> None:
    """Write the figures to --json-file, if it is given."""
    if file is not None:
        text = json.dumps(figures, indent=2) + "\n"
        writing.write_text(file, text, f"--json-file {file}")
