"""The weight files of a local folder, before any is read."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from l2pd_plugins.errors import L2PDError


def check_shards(source: str) -> None:
    """Raise L2PDError if a file that the folder's index names is not there. Of a hub id, nothing is
    asked: what is missing there, the download says."""
    folder = Path(source)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not folder.is_dir() or (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise L2PDError(
            f"{len(missing)} of the {len(named)} weight files that {index.name} names are missing: "
            f"{', '.join(missing)}"
        )
