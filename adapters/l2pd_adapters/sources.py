"""Where a model is, by the name that a user gives."""

from __future__ import annotations

from pathlib import Path

from l2pd_adapters.tiny_models import folder_of, shipped_models
from l2pd_plugins.errors import L2PDError


def source_of(name: str | Path) -> str:
    """The folder of a shipped model or of a path, else the hub id. A shipped name wins over a hub
    id.

    Raises L2PDError if it is none of them.
    """
    text = str(name)
    if text in shipped_models():
        return str(folder_of(text))
    folder = Path(text).expanduser()
    if folder.is_dir():
        return str(folder)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise L2PDError(
            f"model {text!r}: no shipped model (those are {', '.join(shipped_models())}), "
            "no folder, and no hub id (owner/name)"
        )
    return text
