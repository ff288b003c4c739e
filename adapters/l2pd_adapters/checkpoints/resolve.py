"""Finding a model by the name that a user gives."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from l2pd_adapters.tiny_models import folder_of, shipped_models
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import reason_of

SMALL_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.py",
    "tokenizer.model",
    "additional_chat_templates/*",
    "policies/*",
)
"""Patterns of what a checkpoint has besides its weights."""
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


def resolve_model(name: str | Path, called: str | None = None) -> str:
    """The folder of a shipped model or of a path, else the hub id. A shipped name takes precedence
    over a hub id.

    Raises L2PDError, which begins with `called`, if it is none of them.
    """
    text = str(name)
    if text in shipped_models():
        return str(folder_of(text))
    called = f"model {text!r}" if called is None else called
    folder = local_folder(text, called) if text else None
    if folder is not None:
        return str(folder)
    if isinstance(name, Path) or not HUB_ID.fullmatch(text):
        raise L2PDError(
            f"{called}: no shipped model (those are {', '.join(shipped_models())}), "
            "no folder, and no hub id (owner/name)"
        )
    return text


def local_folder(name: str, called: str) -> Path | None:
    """The folder of this name; None if there is nothing of this name here.

    Raises L2PDError, which begins with `called`, if it is a file, or cannot be looked for.
    """
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        is_file = folder.exists()
    except (OSError, RuntimeError) as error:  # the name is too long, or ~user is unknown
        raise L2PDError(f"{called}: {reason_of(error)}") from error
    if is_file:
        raise L2PDError(f"{called}: it is a file, expected a folder")
    return None


def snapshot_of(hub_id: str, patterns: Iterable[str], **hub: Any) -> Path:
    """The folder of a hub id in the hub's cache, with its files that match these patterns. hub:
    keywords of `snapshot_download`.

    Raises L2PDError if they are neither in the cache nor available from the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), **hub))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise L2PDError(
            f"model {hub_id!r} is neither in the hub's cache nor available: {reason_of(error)}"
        ) from error


def commit_of(snapshot: Path) -> str | None:
    """The commit of a folder of the hub's cache; None if its name is not a commit."""
    return snapshot.name if re.fullmatch(r"[0-9a-f]{40}", snapshot.name) else None
