"""The prompts that a command decodes. The commands know the small world; `evaluation` does not."""

from __future__ import annotations

import sys
from pathlib import Path

from l2pd_plugins.files import decoded
from l2pd_tools.evaluation.prompts import Prompt, PromptForm, parse_prompts, read_prompts
from l2pd_tools.tiny_world import TASKS

STDIN = "-"


def prompts_of(source: str, limit: int | None, form: PromptForm) -> list[Prompt]:
    """The first `limit` prompts of a source, with the checkers of the small world's tasks; `STDIN`
    is stdin.

    Raises L2PDError, with the line's number, if it cannot be read or a line is malformed.
    """
    if source == STDIN:
        text = decoded(sys.stdin.buffer.read(), "prompts stdin")
        return parse_prompts(text, "stdin", limit=limit, tasks=TASKS, form=form)
    return read_prompts(source, limit, tasks=TASKS, form=form)


def prompts_or_shipped(
    source: str | None, shipped: Path, limit: int | None, form: PromptForm
) -> tuple[str, list[Prompt]]:
    """The source's name for the figures, and its first prompts; those of `shipped` by default."""
    if source is None:
        return shipped.name, prompts_of(str(shipped), limit, form)
    return "stdin" if source == STDIN else source, prompts_of(source, limit, form)
