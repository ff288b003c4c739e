"""Options that several commands share, and how they are read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from l2pd_plugins import L2PDError, writing
from l2pd_tools.cli.kinds import Adapter, Device, InFile, Model, OneOf, OutFile, Whole

END_OF_TEXT_RULES = ("block", "predicted", "off")
"""Spelled out here because the core's module imports torch."""
CACHES = ("none", "prefix", "dual", "block")
"""Likewise, because the engine's module imports the engine."""
MOST_POSITIONS = 2**20
MOST_ROWS = 2**16
MOST_PROMPTS = 10**9
SEEDS_BELOW = 2**63
TEMPERATURES = (1e-30, 1e30)
"""Bounds of `l2pd_adapters.huggingface.checking`, and of what is counted."""

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
        help="What ends a text: a committed end-of-text token, a predicted one, nothing.",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        parser=OneOf(CACHES),
        metavar=OneOf(CACHES).metavar,
        help="Which keys and values are kept.",
        show_default="the model's",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        parser=Whole(1, MOST_ROWS),
        metavar=Whole.metavar,
        help="Prompts that are decoded together.",
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
JsonFile = Annotated[
    Path | None,
    typer.Option(
        parser=OutFile(), metavar=OutFile.metavar, help="Write the figures there as JSON, too."
    ),
]

POLICY_HELP = "NAME[,key=value...], as in confidence_threshold,threshold=0.9."


def parse_policy(text: str) -> dict[str, Any]:
    """A policy's config from ``NAME[,key=value...]``; values are YAML scalars.

    Raises L2PDError for what does not read so. Whether there is such a policy, and such an
    option, is for `create_policy` to say.
    """
    try:
        return read_policy(text)
    except ValueError as error:
        raise L2PDError(f"policy {text!r}: {error}") from None


def read_policy(text: str) -> dict[str, Any]:
    """What `parse_policy` returns. Raises ValueError, which does not name the text."""
    name, *pairs = text.split(",")
    config: dict[str, Any] = {"name": name.strip()}
    if not config["name"]:
        raise ValueError("there is no name; expected NAME[,key=value...]")
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{pair!r} does not read key=value")
        if key in config:
            raise ValueError(f"{key!r} is given twice")
        config[key] = _scalar(value, repr(pair))
    return config


def parse_values(text: str) -> tuple[str, list[Any]]:
    """An option and the values to try from ``key=value,value,...``; values are YAML scalars.

    Raises L2PDError for what does not read so.
    """
    key, equals, values = (part.strip() for part in text.partition("="))
    parts = [value.strip() for value in values.split(",")]
    if not (key and equals and all(parts)):
        raise L2PDError(f"{text!r} does not read key=value,value,...")
    try:
        return key, [_scalar(value, repr(value)) for value in parts]
    except ValueError as error:
        raise L2PDError(f"{text!r}: {error}") from None


def _scalar(text: str, what: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter for a date that is none, or too many digits
        raise ValueError(f"{what} is no YAML scalar") from None
    if isinstance(value, list | dict | set | tuple):
        raise ValueError(f"{what} is no YAML scalar")
    try:
        # YAML 1.1 takes 1e-3 for a text; nobody who writes it means one.
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def write_json(file: Path | None, figures: Any) -> None:
    """Write what --json-file asks for, if it is given."""
    if file is not None:
        text = json.dumps(figures, indent=2) + "\n"
        writing.write_text(file, text, f"--json-file {file}")


def resolve_device(device: str) -> str:
    """What a `Device` option names: "auto" is the GPU of this process if there is one, else cpu."""
    import torch

    if device != "auto":
        return device
    rank = os.environ.get("LOCAL_RANK", "0")  # set by accelerate launch and torchrun
    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def load_model(name: str, device: str, adapter: str | None = None) -> tuple[Any, Any]:
    """The model and its tokenizer, on a device as `resolve_device` reads it.

    No progress bar where the weights load in no time, or nobody is watching.
    """
    from transformers.utils import logging

    from l2pd_adapters.huggingface import load
    from l2pd_adapters.tiny_models import shipped_models

    shown = logging.is_progress_bar_enabled()
    if name in shipped_models() or not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        return load(name, device=resolve_device(device), adapter=adapter)
    finally:
        if shown:
            logging.enable_progress_bar()
