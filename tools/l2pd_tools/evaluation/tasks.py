"""Tasks: kinds of exercises whose answers can be checked.

Standard library only, so that checkers need no model and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Data = Mapping[str, Any]
"""The input of a checker: a JSON object that comes with the prompt."""
UNKNOWN_PLACE = 2**31
"""The place of prompts whose task is unknown: after all others."""


@dataclass(frozen=True)
class Task:
    """A kind of exercise.

    `check(data, answer)` says whether `answer` is valid for the prompt that `data` describes; it
    never raises for an answer, however malformed. Without it, answers are not checked.
    """

    name: str
    kind: str | None = None
    check: Callable[[Data, str], bool] | None = None
    description: str = ""
    place: int = UNKNOWN_PLACE
    """Position in tables of results, from 0."""
