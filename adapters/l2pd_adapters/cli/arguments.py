"""Options that several commands share, and how they are read."""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from l2pd_plugins import L2PDError, writing


class EndOfText(str, Enum):
    """The end-of-text rules, spelled out here because the core's module imports torch."""

    block = "block"
    predicted = "predicted"
    off = "off"


class CacheKind(str, Enum):
    """The caches, spelled out here because the engine's module imports the engine."""

    none = "none"
    prefix = "prefix"
    dual = "dual"
    block = "block"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelName = Annotated[
    str, typer.Option("--model", help="A shipped model, a folder, or a hub id (owner/name).")
]
Adapter = Annotated[
    str | None, typer.Option(help="A LoRA adapter for the model: a folder, or a hub id.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of the canvas, in tokens.")]
BlockLength = Annotated[
    int | None, typer.Option(min=1, help="Positions per block.", show_default="the model's")
]
EndOfTextRule = Annotated[
    EndOfText,
    typer.Option(help="What ends a text: a committed end-of-text token, a predicted one, nothing."),
]
Cache = Annotated[
    CacheKind | None,
    typer.Option(help="Which keys and values are kept.", show_default="the model's"),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts that are decoded together.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        help="One per line, or .jsonl objects with a 'prompt'.",
        show_default="the small world's held-out prompts",
    ),
]
JsonFile = Annotated[Path | None, typer.Option(help="Write the figures there as JSON, too.")]

POLICY_HELP = "NAME[,key=value...], as in confidence_threshold,threshold=0.9."


def parse_policy(text: str) -> dict[str, Any]:
    """A policy's config from ``NAME[,key=value...]``; values are YAML scalars.

    Raises L2PDError for what does not read so. Whether there is such a policy, and such an
    option, is for `create_policy` to say.
    """
    name, *pairs = text.split(",")
    config: dict[str, Any] = {"name": name.strip()}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise L2PDError(f"policy {text!r}: {pair!r} does not read key=value")
        if key in config:
            raise L2PDError(f"policy {text!r}: {key!r} is given twice")
        config[key] = _scalar(value, f"policy {text!r}: the value of {pair!r}")
    return config


def parse_values(text: str) -> tuple[str, list[Any]]:
    """An option and the values to try from ``key=value,value,...``; values are YAML scalars.

    Raises L2PDError for what does not read so.
    """
    key, equals, values = (part.strip() for part in text.partition("="))
    parts = [value.strip() for value in values.split(",")]
    if not (key and equals and all(parts)):
        raise L2PDError(f"{text!r} does not read key=value,value,...")
    return key, [_scalar(value, f"{text!r}: {value!r}") for value in parts]


def _scalar(text: str, what: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise L2PDError(f"{what} is no YAML scalar") from None
    try:
        # YAML 1.1 takes 1e-3 for a text; nobody who writes it means one.
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def require_writable(option: str, file: Path | None) -> None:
    """Raise L2PDError, naming the option, if the file could not be written afterwards."""
    if file is not None:
        writing.require_writable(file, f"{option} {file}")


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
