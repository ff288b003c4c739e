"""What the options of a command name on the disk is examined before the command begins."""

from __future__ import annotations

import functools
import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from l2pd_plugins import L2PDError
from l2pd_tools.cli.groups import flattened
from l2pd_tools.cli.kinds import Kind, quoted

F = typing.TypeVar("F", bound=Callable[..., Any])


def examined(command: F) -> F:
    """Decorator of a command: before it begins, the kind of every option examines its value, and no
    output may be the same path as another option's. Raises L2PDError. The command's groups of
    options are `flattened`.
    """
    command = flattened(command)
    kinds = dict(_kinds(command))

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        _examine(kinds, given)
        return command(**given)

    return typing.cast(F, run)


def _examine(kinds: dict[str, tuple[str, Kind]], given: dict[str, Any]) -> None:
    seen: dict[str, tuple[str, bool]] = {}
    for name, (called, kind) in kinds.items():
        value = given.get(name)
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is None:
                continue
            kind.examine(each, f"{called} {quoted(each)}")
            if kind.place is None or str(each) == "-" or not _is_plain(Path(each)):
                continue
            path, is_new = os.path.realpath(each), kind.place.startswith("new")
            other, other_is_new = seen.setdefault(path, (called, is_new))
            if other != called and (is_new or other_is_new):
                raise L2PDError(
                    f"{called} {quoted(each)}: {other} names the same; expected another "
                    f"{kind.place.removeprefix('new ')}"
                )


def _is_plain(path: Path) -> bool:
    """Whether the path is, or can become, a regular file or folder; a pipe or /dev/null may be
    named twice.
    """
    return path.is_file() or path.is_dir() or not path.exists()


def _kinds(command: Callable[..., Any]) -> Iterator[tuple[str, tuple[str, Kind]]]:
    """For each parameter of a command: its name on the command line, and its kind."""
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        for declared in typing.get_args(hint)[1:]:
            kind = getattr(declared, "parser", None)
            if isinstance(kind, Kind):
                written = [text for text in declared.param_decls or () if text.startswith("--")]
                dashed = "--" + name.replace("_", "-")
                is_argument = isinstance(declared, typer.models.ArgumentInfo)
                yield name, (name if is_argument else (written or [dashed])[0], kind)
