"""The answers in a source of prompts, for scoring."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from l2pd_plugins import L2PDError
from l2pd_plugins.files import one_line
from l2pd_tools.evaluation.prompt_sources import rows_of

ANSWER = "answer"
"""The field with a row's answer, or its answers."""


def answers_of(
    source: str | Path, field: str = ANSWER, format: str | None = None, limit: int | None = None
) -> list[list[str]]:
    """The answers of each of the first `limit` rows: a text, or a list of texts. The source is one
    of `read_prompts`.

    Raises L2PDError, with the row's place, for a row without them.
    """
    made = []
    for row in islice(rows_of(source, format=format, limit=limit), limit):
        found = row.value.get(field) if isinstance(row.value, Mapping) else None
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise L2PDError(
                f"{row.where}: {one_line(field)} = {one_line(repr(found)[:60])}; expected a text, "
                "or a list of texts (--answer-field)"
            )
        made.append(texts)
    return made
