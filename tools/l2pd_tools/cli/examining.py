"""What the options of a command name on the disk is examined before the command begins."""

from __future__ import annotations

import functools
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    kinds = dict(kinds_of(command))

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        _examine(kinds, given)
        return command(**given)

    return typing.cast(F, run)


def _examine(kinds: Mapping[str, tuple[Sequence[str], Kind]], given: dict[str, Any]) -> None:
    seen: dict[str, tuple[str, bool]] = {}
    # Files first: what a name stands for takes longer to find out.
    for name, (names, kind) in sorted(kinds.items(), key=lambda item: item[1][1].place is None):
        value, called = given.get(name), _as_typed(names)
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


def kinds_of(command: Callable[..., Any]) -> Iterator[tuple[str, tuple[list[str], Kind]]]:
    """For each parameter of a command: its names on the command line, and its kind."""
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        for declared in typing.get_args(hint)[1:]:
            kind = getattr(declared, "parser", None)
            if isinstance(kind, Kind):
                # In an annotation, typer takes the first name as its parameter `default`.
                given = (declared.default, *(declared.param_decls or ()))
                names = [text for text in given if str(text).startswith("--")]
                if isinstance(declared, typer.models.ArgumentInfo):
                    names = [name]
                yield name, (names or ["--" + name.replace("_", "-")], kind)


def _as_typed(names: Sequence[str]) -> str:
    """The one of an option's names that was typed."""
    typed = {word.partition("=")[0] for word in sys.argv}
    return next((name for name in names if name in typed), names[0])
