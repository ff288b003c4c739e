"""`l2pd doctor`: what a checkpoint is, which engines can run it, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import one_line, path_inside, read_object, whole_number
from l2pd_tools.cli.arguments import AsJson, argument, option
from l2pd_tools.cli.kinds import InFolder, Model

if TYPE_CHECKING:
    from l2pd_adapters.checkpoints import Checkpoint
    from l2pd_adapters.engines import Engine

CACHE_TOKENS = 1000
"""Number of tokens for which the size of keys and values is reported."""
_GIB = 2**30


@dataclass(frozen=True)
class FoundFilter:
    """A folder of a trained filter, and whether it fits a model."""

    folder: str
    block_length: int | None
    """Block length of the filter; None fits every length."""
    base_model: str
    problem: str
    """Why it does not fit; empty if it does."""


@dataclass(frozen=True)
class FoundEngine:
    """An engine, and whether it can decode a model here."""

    name: str
    supported: str
    installed: str | None
    problem: str
    """Why it cannot; empty if it can."""


def doctor(
    model: Annotated[str, argument(Model(), "A shipped model, a folder, or a hub id.")],
    filters: Annotated[
        list[Path] | None, option(InFolder(), "Folder of a filter. Repeatable.", "--filter")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is, what it needs, what can serve it, and what is wrong with it.

    It loads no weights and runs no code of the checkpoint. The exit code is 1
    if the checkpoint cannot be loaded.
    """
    from l2pd_adapters.checkpoints import find_checkpoint
    from l2pd_adapters.engines import ENGINES

    found = find_checkpoint(model)
    own = _own_filters(found)
    folders = [*own, *(filters or [])]
    report = _report(
        model,
        found,
        [read_filter(folder, found, of_model=folder in own) for folder in folders],
        [_engine(engine, found) for engine in ENGINES],
    )
    typer.echo(json.dumps(report, indent=2) if as_json else "\n".join(map(_shown, _lines(report))))
    if found.problems:
        raise typer.Exit(1)


def read_filter(folder: Path, model: Checkpoint, of_model: bool = False) -> FoundFilter:
    """Read a filter's folder and check whether it fits the model. With `of_model`, the filter has
    to be in the model's folder.
    """
    try:
        if of_model:
            path_inside(model.folder, str(folder.relative_to(model.folder)))
        config = read_object(path_inside(folder, "config.json"), "config.json")
    except L2PDError as error:
        return FoundFilter(str(folder), None, "", str(error))
    length, base = config.get("block_length"), config.get("base_model")
    known = length is None or whole_number(length, 1, 2**31)
    if not known or not isinstance(base, str) or "block_length" not in config:
        problem = "config.json cannot be read: it names no block_length and no base_model"
        return FoundFilter(str(folder), None, "", problem)
    base, problem = one_line(base), ""
    if not (folder / "model.safetensors").is_file():
        problem = "model.safetensors is missing"
    elif length is not None and length != model.block_length:
        problem = f"it is for blocks of {length} positions, the model's have {model.block_length}"
    return FoundFilter(str(folder), length, base, problem)


def _own_filters(model: Checkpoint) -> list[Path]:
    return sorted(path.parent for path in model.folder.glob("policies/*/config.json"))


def _engine(engine: Engine, model: Checkpoint) -> FoundEngine:
    if model.family is None:
        problem = "the model's family is not known"
    else:
        problem = engine.obstacle(model.family)
    return FoundEngine(engine.name, engine.supported_range, engine.installed, problem)


def _report(
    name: str, model: Checkpoint, filters: Iterable[FoundFilter], engines: Iterable[FoundEngine]
) -> dict[str, Any]:
    """The report as plain values."""
    family, vocabulary = model.family, model.vocabulary
    return {
        "model": name,
        "folder": str(model.folder),
        "family": None if family is None else family.name,
        "model_type": model.model_type,
        "architectures": model.config.get("architectures"),
        "runs_on": model.runs_on,
        "attention": None if family is None else family.attention,
        "logit_shift": None if family is None else family.logit_shift,
        "dtype": model.dtype,
        "parameters": model.parameters,
        "stored": model.stored,
        "stored_bytes": model.stored_bytes,
        "quantisation": model.quantisation,
        "weight_bytes": model.weight_bytes(),
        "cache_bytes_per_1000_tokens": {
            name: model.cache_bytes(CACHE_TOKENS, name) for name in ("float32", "bfloat16")
        },
        "block_length": model.block_length,
        "mask_token": _token(model, model.mask_token_id),
        "end_of_text": [_token(model, number) for number in model.end_of_text],
        "vocab_size": model.native.get("vocab_size"),
        "largest_token_id": None if vocabulary is None else vocabulary.largest,
        "chat_template": model.chat_template,
        "engines": [asdict(engine) for engine in engines],
        "filters": [asdict(each) for each in filters],
        "notes": model.notes,
        "problems": model.problems,
    }


def _token(model: Checkpoint, number: int | None) -> dict[str, Any] | None:
    if number is None:
        return None
    text = None if model.vocabulary is None else model.vocabulary.text_of(number)
    return {"id": number, "text": text}


def _lines(report: dict[str, Any]) -> Iterable[str]:
    """The lines of the printed report."""
    yield from (f"{name + ':':<15}{value}" for name, value in _facts(report) if value)
    for engine in report["engines"]:
        found = engine["problem"] or f"{engine['installed']} decodes it"
        yield f"{engine['name'] + ':':<15}{found} ({engine['name']}{engine['supported']})"
    for each in report["filters"]:
        fits = each["problem"] or (
            "fits" if each["block_length"] else "fits, as it does every block length"
        )
        yield f"{'filter:':<15}{each['folder']}, of {each['base_model'] or 'no model'}: {fits}"
    yield from (f"{'note:':<15}{note}" for note in report["notes"])
    yield from (f"{'problem:':<15}{problem}" for problem in report["problems"])
    verdict = "it cannot be loaded" if report["problems"] else "nothing is wrong with it"
    yield f"{report['model']}: {verdict}"


def _shown(line: str) -> str:
    """The line with unprintable characters escaped: names in a checkpoint are untrusted."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _facts(report: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if report["family"] is None:
        yield "model type", str(report["model_type"] or "")
        return
    shift = f", logits shifted by {report['logit_shift']}" if report["logit_shift"] else ""
    yield "family", f"{report['family']}, {report['attention'].replace('_', '-')}{shift}"
    yield "runs on", f"transformers' {report['runs_on']}, in {report['dtype']}; no code of its own"
    if report["parameters"]:
        stored = ", ".join(f"{_count(n)} {kind}" for kind, n in report["stored"].items())
        yield "parameters", f"{report['parameters']:,} ({stored}; {_gib(report['stored_bytes'])})"
    yield (
        "weights",
        ", ".join(f"{_gib(size)} in {name}" for name, size in report["weight_bytes"].items()),
    )
    cache = report["cache_bytes_per_1000_tokens"]
    spared = "; none with cache=none" if report["mask_token"] else ""
    yield (
        "cache",
        ", ".join(f"{_gib(size)} in {name}" for name, size in cache.items() if size)
        + f" for {CACHE_TOKENS:,} tokens of a sequence{spared}",
    )
    yield "block length", str(report["block_length"])
    yield "mask token", _told(report["mask_token"])
    yield "end of text", ", ".join(map(_told, report["end_of_text"]))
    if report["largest_token_id"] is not None:
        yield (
            "tokens",
            f"ids up to {report['largest_token_id']}, {report['vocab_size']} rows in the embedding",
        )
    yield "chat template", "yes" if report["chat_template"] else "no"


def _told(token: dict[str, Any] | None) -> str:
    if token is None:
        return ""
    return str(token["id"]) + (f" {token['text']}" if token["text"] else "")


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.2f} MiB"
