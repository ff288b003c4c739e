"""Prompts, read from a file or from lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2pd_plugins import L2PDError
from l2pd_plugins.files import decoded, one_line, parse_json, read_text, reading
from l2pd_tools.evaluation.tasks import Task

_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Prompt:
    """A user's message with its task and the data of its checker."""

    text: str
    id: str
    task: Task | None = None
    kind: str | None = None
    data: Mapping[str, Any] | None = None
    """The data for the task's checker; None if answers cannot be checked."""

    def valid(self, answer: str) -> bool | None:
        """Whether the checker accepts the answer; None without a checker."""
        if self.task is None or self.task.check is None or self.data is None:
            return None
        return self.task.check(self.data, answer)


def read_prompts(
    path: str | Path, limit: int | None = None, *, tasks: Mapping[str, Task] | None = None
) -> list[Prompt]:
    """The prompts of a file, the first `limit` of them.

    ``.jsonl`` holds an object per line: ``{"prompt": ..., "id", "task", "kind", "data"}``, all but
    the first optional. Any other file holds one prompt per line. Empty lines are skipped.

    tasks: the tasks that can be checked, by name, as `l2pd_tools.tiny_world.TASKS`. An answer is
    checked if its prompt has data and names one of them. Without tasks, no answer is checked.

    Raises L2PDError, with the line's number, if the file cannot be read, a line is malformed, or
    has data that no task of `tasks` can check.
    """
    path = Path(path)
    return parse_prompts(
        read_prompt_text(path).split("\n"),
        str(path),
        json_lines=path.suffix in _JSON_LINES,
        limit=limit,
        tasks=tasks,
    )


def read_prompt_text(path: Path) -> str:
    """The text of a prompt file, which may be a pipe. Raises L2PDError if it cannot be read."""
    called = f"prompts {path}"
    if path.is_fifo():  # for example the shell's <(command)
        with reading(called):
            return decoded(path.read_bytes(), called)
    return read_text(path, called)


def parse_prompts(
    lines: Iterable[str],
    source: str,
    *,
    json_lines: bool = False,
    limit: int | None = None,
    tasks: Mapping[str, Task] | None = None,
) -> list[Prompt]:
    """The prompts of some lines; `source` is their name in errors. See `read_prompts`."""
    if limit is not None and limit < 1:
        raise L2PDError(f"limit={limit}: expected a whole number from 1")
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if len(prompts) == limit:
            break
        line = line.rstrip("\r\n")
        if number == 1:
            line = line.removeprefix("\ufeff")  # a byte order mark, of stdin
        if not line.strip():
            continue
        where = f"prompts {source}, line {number}"
        prompts.append(
            _parsed(line, number, where, tasks) if json_lines else Prompt(line, str(number))
        )
    if not prompts:
        raise L2PDError(f"prompts {source}: no prompt found")
    return prompts


def _parsed(line: str, number: int, where: str, tasks: Mapping[str, Task] | None) -> Prompt:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise L2PDError(f"{where}: not valid JSON: {one_line(error)}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise L2PDError(
            f'{where}: expected an object with the text "prompt", got {one_line(line[:60])}'
        )
    fields = {"task": (str, "text"), "kind": (str, "text"), "data": (dict, "an object")}
    for key, (expected, called) in fields.items():
        if not isinstance(row.get(key), expected | None):
            raise L2PDError(f"{where}: {key} = {one_line(repr(row[key]))}; expected {called}")
    name, data = row.get("task"), row.get("data")
    known = None if name is None or tasks is None else tasks.get(name)
    if data is not None and tasks is not None:
        if known is None or known.check is None:
            raise L2PDError(
                f"{where}: data, but no checker for task {one_line(repr(name))}; "
                f"expected one of {', '.join(tasks)}"
            )
        try:
            known.check(data, "")
        except (LookupError, TypeError, ValueError, AttributeError, re.error) as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise L2PDError(f"{where}: data does not fit task {name!r} ({reason})") from None
    task = Task(name) if known is None and name is not None else known
    kind = row.get("kind") or (task.kind if task else None)
    return Prompt(row["prompt"], str(row.get("id", number)), task, kind, data)
