"""The folder of a comparison: what it was made from, and one file for each finished policy.

    FOLDER/run.json                     model, prompts and settings
    FOLDER/settled-0f3a9c1d2b.json      the answers of a policy

A comparison that was stopped, even by kill -9, goes on with the policies that have no file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from l2pd_plugins import L2PDError
from l2pd_plugins.files import is_there, one_line, path_inside, read_object, reason_of
from l2pd_plugins.shown_values import shown
from l2pd_plugins.writing import require_writable, sweep, write_text
from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.results import Answer, Evaluation

RUN = "run.json"
_FIELDS = tuple(field.name for field in fields(Answer) if field.name != "prompt")
_ANSWERS = TypeAdapter(tuple[Answer, ...])


def inputs_of(prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a run before its model is loaded, as plain values."""
    told = [
        [p.text, p.id, p.task and p.task.name, p.kind, p.data, list(p.before), p.raw]
        for p in prompts
    ]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=dict).encode())
    return {"prompts": len(prompts), "prompts_sha256": digest.hexdigest(), **settings}


class RunFolder:
    """A folder of finished policies."""

    def __init__(self, path: Path, inputs: Mapping[str, Any], called: str) -> None:
        """Make the folder, or go on with it. `called`: its name in errors.

        Raises L2PDError, naming the difference, if it was made from other inputs.
        """
        self.path = path
        self.called = called
        require_same(path, inputs, called)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise L2PDError(f"{called} cannot be made: {reason_of(error)}") from error
        sweep(path)
        require_writable(path / RUN, called)
        if not is_there(path / RUN):
            write_text(path / RUN, json.dumps(inputs, indent=2) + "\n", called)

    def answers(self, identity: str, prompts: Sequence[Prompt]) -> Evaluation | None:
        """The evaluation of a policy (see `identity_of`), without reference answers; None if it is
        not finished. Raises L2PDError for a file that cannot be read.
        """
        path = self._file(identity)
        if not is_there(path):
            return None
        content = read_object(path_inside(self.path, path.name), str(path))
        try:
            return Evaluation(_answers(content["answers"], prompts), str(content["configuration"]))
        except (LookupError, TypeError, ValueError) as error:
            raise L2PDError(
                f"{path} is damaged ({_reason(error)}); remove it to decode that policy again"
            ) from error

    def save(self, identity: str, evaluation: Evaluation) -> None:
        """Write the file of a finished policy. Raises L2PDError if it cannot be written."""
        content = {
            "policy": identity,
            "configuration": evaluation.configuration,
            "answers": [
                {"prompt": answer.prompt.id, **{name: getattr(answer, name) for name in _FIELDS}}
                for answer in evaluation.answers
            ],
        }
        write_text(self._file(identity), json.dumps(content) + "\n", self.called)

    def _file(self, identity: str) -> Path:
        name = re.sub(r"\W", "_", identity.partition("(")[0], flags=re.ASCII)[:60]
        digest = hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()
        return self.path / f"{name}-{digest[:10]}.json"


def require_same(path: Path, inputs: Mapping[str, Any], called: str) -> None:
    """Raise L2PDError, naming the difference, if a folder was made from other inputs than these,
    which may be some of them, or has other files. Nothing is made.
    """
    there = _inputs_in(path, called)
    if there is None:
        return
    for name, value in inputs.items():
        if there.get(name) != value:
            raise L2PDError(
                f"{called} has results with {name}={shown(there.get(name))}, this run has "
                f"{shown(value)}; name another folder or remove that one"
            )


def seed_in(path: Path, called: str) -> int | None:
    """The seed with which a folder was made; None if there is none."""
    seed = (_inputs_in(path, called) or {}).get("seed")
    return seed if type(seed) is int else None


def _inputs_in(path: Path, called: str) -> dict[str, Any] | None:
    """What a folder was made from; None if it is new."""
    if is_there(path / RUN):
        return read_object(path_inside(path, RUN), str(path / RUN))
    others = path.is_dir() and any(not each.name.startswith(".") for each in path.iterdir())
    if others:
        raise L2PDError(
            f"{called} has files but no {RUN}; expected a new folder, or one of an earlier run"
        )
    return None


def _answers(told: Any, prompts: Sequence[Prompt]) -> tuple[Answer, ...]:
    """Raises LookupError, TypeError or ValueError if these are not the prompts' answers."""
    if [each["prompt"] for each in told] != [prompt.id for prompt in prompts]:
        raise ValueError("its prompts are others")
    pairs = zip(told, prompts, strict=True)
    return _ANSWERS.validate_python([{**each, "prompt": prompt} for each, prompt in pairs])


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        return one_line(f"answer {where}: {first['msg']}")
    return one_line(f"it has no {error}" if isinstance(error, LookupError) else error)
