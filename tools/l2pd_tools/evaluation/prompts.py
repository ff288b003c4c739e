"""Prompts, read from files, pipes and data sets, or from lines."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2pd_plugins import L2PDError
from l2pd_plugins.files import one_line, parse_json, whole_number
from l2pd_plugins.shown_values import shown
from l2pd_tools.evaluation.prompt_sources import Row, rows_of, rows_of_text, text_lines
from l2pd_tools.evaluation.tasks import Task

FIELD = "prompt"
"""The field with the prompt, unless another is named."""
MESSAGES = "messages"
"""The field that is read if a row has no `FIELD`."""
ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]
"""A message of a conversation: its "role", one of `ROLES`, and its "content"."""


@dataclass(frozen=True)
class Prompt:
    """A user's message with its task and the data of its checker."""

    text: str
    id: str
    task: Task | None = None
    kind: str | None = None
    data: Mapping[str, Any] | None = None
    """The data for the task's checker; None if answers cannot be checked."""
    before: tuple[Message, ...] = ()
    """The messages before the user's: a system prompt, earlier turns."""
    raw: bool = False
    """Whether the text is the model's whole input, without a chat template."""

    @property
    def messages(self) -> list[Message]:
        """The conversation that the text ends."""
        return [*self.before, {"role": "user", "content": self.text}]

    def valid(self, answer: str) -> bool | None:
        """Whether the checker accepts the answer; None without a checker."""
        if self.task is None or self.task.check is None or self.data is None:
            return None
        return self.task.check(self.data, answer)


@dataclass(frozen=True)
class PromptForm:
    """How prompts are written in a source, and what is added to each."""

    format: str | None = None
    """One of `prompt_sources.FORMATS`; None is that of the file's suffix."""
    field: str = FIELD
    """The field with the prompt, a text or a list of messages."""
    system: str | None = None
    """A system prompt before each prompt."""
    raw: bool = False
    """Whether each text is the model's whole input, without a chat template."""

    @property
    def before(self) -> tuple[Message, ...]:
        """The messages before each prompt."""
        return () if self.system is None else ({"role": "system", "content": self.system},)


_PLAIN = PromptForm()


def read_prompts(
    source: str | Path,
    limit: int | None = None,
    *,
    tasks: Mapping[str, Task] | None = None,
    form: PromptForm = _PLAIN,
) -> list[Prompt]:
    """The prompts of a file, a pipe or a data set, the first `limit` of them.

    - ``.txt``, and names without a suffix: one prompt per line;
    - ``.jsonl``, ``.ndjson``: an object or a text per line; ``.json``: a list of them;
    - ``.csv``, ``.tsv``: a prompt per row, with the names of the fields in the first line;
    - ``.parquet`` (needs pyarrow), a folder that the package `datasets` has saved, and
      ``hf://OWNER/NAME[/CONFIG][:SPLIT]`` (both need `datasets`): a prompt per row.

    An object has the fields ``{"prompt": ..., "id", "task", "kind", "data"}``, all but the first
    optional. The prompt is a text, or a list of messages of which the last is the user's; these may
    also be called "messages". Blank lines are skipped.

    tasks: the tasks that can be checked, by name, as `l2pd_tools.tiny_world.TASKS`. An answer is
    checked if its prompt has data and names one of them. Without tasks, no answer is checked.

    Raises L2PDError, with the line's number, if the source cannot be read, its format is not known,
    a line is malformed, or has data that no task of `tasks` can check.
    """
    rows = rows_of(source, format=form.format, limit=limit)
    return _prompts(rows, str(source), limit, tasks, form)


def parse_prompts(
    lines: str | Iterable[str],
    source: str,
    *,
    limit: int | None = None,
    tasks: Mapping[str, Task] | None = None,
    form: PromptForm = _PLAIN,
) -> list[Prompt]:
    """The prompts of some lines, one each, or of a text in the format of `form`; `source` is their
    name in errors. See `read_prompts`."""
    if isinstance(lines, str):
        rows = rows_of_text(lines, source, form.format)
    else:
        rows = text_lines(lines, f"prompts {source}")
    return _prompts(rows, source, limit, tasks, form)


def _prompts(
    rows: Iterable[Row],
    source: str,
    limit: int | None,
    tasks: Mapping[str, Task] | None,
    form: PromptForm,
) -> list[Prompt]:
    if limit is not None and not whole_number(limit, 1, sys.maxsize):
        raise L2PDError(f"limit={shown(limit)}: expected a whole number from 1")
    if form.raw and form.system is not None:
        raise L2PDError("a raw prompt has no system prompt; expected --raw or --system, not both")
    prompts = [_prompt(row, tasks, form) for row in itertools.islice(rows, limit)]
    if not prompts:
        raise L2PDError(f"prompts {source}: no prompt found")
    return prompts


def _prompt(row: Row, tasks: Mapping[str, Task] | None, form: PromptForm) -> Prompt:
    """The prompt of a row."""
    fields = row.value if isinstance(row.value, Mapping) else {form.field: row.value}
    name = form.field
    if name not in fields and name == FIELD and MESSAGES in fields:
        name = MESSAGES
    if name not in fields:
        names = ", ".join(map(str, fields)) or "none"
        raise L2PDError(
            f"{row.where}: it has no field {one_line(repr(name))}, its fields are "
            f"{one_line(names)}; expected the name of one of them (--prompt-field)"
        )
    before, text = _conversation(fields[name], name, row.where)
    if form.raw and before:
        raise L2PDError(f"{row.where}: it has messages, which a raw prompt cannot have")
    if form.system is not None and before and before[0]["role"] == "system":
        raise L2PDError(f"{row.where}: it has a system message already; leave out --system")
    before, number = (*form.before, *before), str(row.number)
    if not isinstance(row.value, Mapping):
        return Prompt(text, number, before=before, raw=form.raw)
    task, kind, data = _checker(fields, row.where, tasks)
    return Prompt(text, str(fields.get("id", number)), task, kind, data, before, form.raw)


def _conversation(value: Any, name: str, where: str) -> tuple[tuple[Message, ...], str]:
    """The messages before the last, and the last one's text."""
    if isinstance(value, str):
        if not value.strip():
            raise L2PDError(f"{where}: {name!r} is empty; expected a text")
        return (), value
    if not isinstance(value, list) or not value:
        raise L2PDError(
            f"{where}: {name} = {one_line(repr(value)[:60])}; expected a text, or a list of "
            "messages"
        )
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise L2PDError(
                f"{where}: message {number} is {one_line(repr(message)[:60])}; expected an object "
                'with the texts "role" and "content"'
            )
        if message["role"] not in ROLES:
            raise L2PDError(
                f"{where}: message {number} has the role {one_line(repr(message['role'])[:60])}; "
                f"expected one of {', '.join(ROLES)}"
            )
    *before, last = [{"role": each["role"], "content": each["content"]} for each in value]
    if last["role"] != "user":
        raise L2PDError(
            f"{where}: the last message is the {last['role']}'s; expected the user's, which is "
            "answered"
        )
    if not last["content"].strip():
        raise L2PDError(f"{where}: the last message is empty; expected a text")
    return tuple(before), last["content"]


def _checker(
    fields: Mapping[str, Any], where: str, tasks: Mapping[str, Task] | None
) -> tuple[Task | None, str | None, Mapping[str, Any] | None]:
    """The task, its kind, and the data for its checker."""
    data = fields.get("data")
    if isinstance(data, str):  # a table's cell
        try:
            data = parse_json(data)
        except ValueError:
            data = fields["data"]
    known_kinds = {"task": (str, "text"), "kind": (str, "text"), "data": (Mapping, "an object")}
    for key, (expected, called) in known_kinds.items():
        value = data if key == "data" else fields.get(key)
        if not isinstance(value, expected | None):
            raise L2PDError(f"{where}: {key} = {one_line(repr(value))}; expected {called}")
    name = fields.get("task")
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
    return task, fields.get("kind") or (task.kind if task else None), data
