"""Prompts: what is decoded, read from a file or from lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2pd_plugins import L2PDError
from l2pd_plugins.files import decoded, one_line, parse_json, read_text, reading
from l2pd_tools.tiny_world import FAMILIES, check

_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Prompt:
    """A user's message, and what is known about it."""

    text: str
    id: str
    family: str | None = None
    kind: str | None = None
    data: Mapping[str, Any] | None = None
    """What the family's checker decides from; None if answers cannot be checked."""

    def valid(self, answer: str) -> bool | None:
        """Whether the checker accepts the answer; None without a checker."""
        if self.family is None or self.data is None:
            return None
        return check(self.family, self.data, answer)


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, the first `limit` of them.

    ``.jsonl`` holds an object per line: ``{"prompt": ..., "id", "family", "kind", "data"}``, all
    but the first optional; an answer is checked if family and data are there. Any other file holds
    one prompt per line. Empty lines are skipped.

    Raises L2PDError, with the line's number, if the file cannot be read or a line is malformed.
    """
    path = Path(path)
    return parse_prompts(
        read_prompt_text(path).split("\n"),
        str(path),
        json_lines=path.suffix in _JSON_LINES,
        limit=limit,
    )


def read_prompt_text(path: Path) -> str:
    """The text of a prompt file, which may be a pipe. Raises L2PDError if it cannot be read."""
    called = f"prompts {path}"
    if path.is_fifo():  # as the shell's <(command) is one
        with reading(called):
            return decoded(path.read_bytes(), called)
    return read_text(path, called)


def parse_prompts(
    lines: Iterable[str], source: str, *, json_lines: bool = False, limit: int | None = None
) -> list[Prompt]:
    """The prompts of some lines; `source` is what errors call them. See `read_prompts`."""
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
        prompts.append(_parsed(line, number, where) if json_lines else Prompt(line, str(number)))
    if not prompts:
        raise L2PDError(f"prompts {source}: there is no prompt")
    return prompts


def _parsed(line: str, number: int, where: str) -> Prompt:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise L2PDError(f"{where}: no JSON: {one_line(error)}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise L2PDError(
            f'{where}: expected an object with the text "prompt", got {one_line(line[:60])}'
        )
    wanted = {"family": (str, "text"), "kind": (str, "text"), "data": (dict, "an object")}
    for key, (expected, called) in wanted.items():
        if not isinstance(row.get(key), expected | None):
            raise L2PDError(f"{where}: {key} = {one_line(repr(row[key]))}; expected {called}")
    family, data = row.get("family"), row.get("data")
    known = FAMILIES.get(family) if family is not None else None
    if data is not None:
        if known is None:
            raise L2PDError(
                f"{where}: data, but no checker for family {one_line(repr(family))}; "
                f"those with one: {', '.join(FAMILIES)}"
            )
        try:
            known.check(data, "")
        except (LookupError, TypeError, ValueError, AttributeError, re.error) as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise L2PDError(f"{where}: data does not fit family {family!r} ({reason})") from None
    kind = row.get("kind") or (known.kind if known else None)
    return Prompt(row["prompt"], str(row.get("id", number)), family, kind, data)
