"""The small models that are shipped with the project, and their prompt files."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in _HERE.glob("*/config.json"))


def folder_of(name: str) -> Path:
    """The checkpoint folder of a shipped model."""
    return _HERE / name


def heldout_prompts() -> Path:
    """JSON lines of held-out prompts, with the data for their checkers."""
    return _HERE / "heldout.jsonl"


def training_prompts() -> Path:
    """JSON lines of the same form from the training split, used to train filters."""
    return _HERE / "train_prompts.jsonl"
