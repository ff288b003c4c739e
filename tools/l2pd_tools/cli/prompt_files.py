"""The prompts that a command decodes. The commands know the small world; `evaluation` does not."""

from __future__ import annotations

from pathlib import Path

from l2pd_tools.evaluation.prompts import Prompt, read_prompts
from l2pd_tools.tiny_world import TASKS


def prompts_of(file: Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a file, with the checkers of the small world's tasks.

    Raises L2PDError, with the line's number, if the file cannot be read or a line is malformed.
    """
    return read_prompts(file, limit, tasks=TASKS)


def prompts_or_shipped(
    file: Path | None, shipped: Path, limit: int | None
) -> tuple[str, list[Prompt]]:
    """The file's name for the figures, and its first prompts; without a file, those of
    `shipped`.
    """
    if file is None:
        return shipped.name, prompts_of(shipped, limit)
    return str(file), prompts_of(file, limit)
