"""Defaults of options from `l2pd.toml`.

The user's own file is in the folder for configurations; the nearest one in the current folder or
above comes before it, and the command line before both. A file names options of the command line
and nothing else, and these run no code of a file. A folder may come from anybody, so what is
written or listened on is never taken from a file, and a file of another user is not used.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from l2pd_plugins import L2PDError
from l2pd_plugins.files import is_there, read_text, reading
from l2pd_tools.cli.examining import kinds_of
from l2pd_tools.cli.kinds import Kind, quoted
from l2pd_tools.progress import say

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "l2pd.toml"
NOT_FROM_A_FILE = ("force", "host", "port")
"""Options that are only taken from the command line, as are files and folders to be written."""
_LARGEST = 2**20
"""Size limit of a file in bytes."""


@dataclass(frozen=True)
class Setting:
    """An option's default from a file."""

    command: str
    """The words that run the command, such as "l2pd generate"."""
    option: str
    """As it is typed, such as "--model"."""
    parameter: str
    """The name by which the command knows it."""
    value: Any
    """As it would be typed: a text, a list of texts, or True or False."""
    file: Path


def users_file() -> Path | None:
    """The user's own file, which need not exist; None for a user without a home folder."""
    folder = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(folder):  # to be ignored, by its specification
        folder = os.path.expanduser("~/.config")
    return Path(folder) / "l2pd" / NAME if os.path.isabs(folder) else None


def nearest_file() -> Path | None:
    """The file in the current folder or in the nearest one above. A file of another user is not
    used, which is said on stderr: in a shared folder, anybody could have put it there.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it has been removed
        return None
    for folder in (here, *here.parents):
        file = folder / NAME
        if is_there(file):
            if _is_own(file):
                return file
            say(f"warning: {file} is not used: it belongs to another user")
    return None


def _is_own(file: Path) -> bool:
    if not hasattr(os, "getuid"):  # Windows
        return True
    owners = {os.lstat(file).st_uid, os.stat(file).st_uid if file.exists() else os.getuid()}
    return owners <= {os.getuid(), 0}


def read_settings(root: Any) -> list[Setting]:
    """The settings of both files, for the commands below `root`; of two for one option only the one
    that counts.

    Raises L2PDError, which names the file, the key and the choices, for a file that cannot be read,
    an unknown command or option, and a value that the option does not take.
    """
    found: dict[tuple[str, str], Setting] = {}
    for file in (users_file(), nearest_file()):
        if file is not None and is_there(file):
            text = read_text(file, str(file), _LARGEST)
            with reading(f"{file} cannot be read"):
                content = tomllib.loads(text)
            for setting in _settings(content, root, "l2pd", file, ""):
                found[setting.command, setting.parameter] = setting
    return list(found.values())


def default_map(settings: list[Setting]) -> dict[str, Any]:
    """The settings as click takes them: nested by the words of the commands."""
    made: dict[str, Any] = {}
    for setting in settings:
        inner = made
        for word in setting.command.split()[1:]:
            inner = inner.setdefault(word, {})
        inner[setting.parameter] = setting.value
    return made


def with_origin(message: str, settings: list[Setting]) -> str:
    """The message of an error, with the file of each value in it that was not typed."""
    typed = {word.partition("=")[0] for word in sys.argv}
    path = " ".join(["l2pd", *sys.argv[1:]])
    for setting in settings:
        begins = path.startswith(f"{setting.command} ") or path == setting.command
        if begins and setting.option not in typed and f"{setting.option} " in message:
            message += f" ({setting.option} is set in {setting.file})"
    return message


def _settings(
    content: dict[str, Any], command: Any, path: str, file: Path, table: str
) -> Iterator[Setting]:
    """The settings of a table, the options of the command itself first."""
    below = getattr(command, "commands", {})
    options = dict(_options(command))
    for key, value in content.items():
        name = f"{table}{key}"
        if isinstance(value, dict):
            if key not in below:
                raise L2PDError(_unknown(file, f"[{name}]", path, "command", key, list(below)))
            continue
        if key not in options:
            raise L2PDError(_unknown(file, name, path, "option for a file", key, list(options)))
        option, parameter, kind = options[key]
        yield Setting(
            path, option, parameter.name, _value(value, parameter, kind, file, name), file
        )
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _settings(value, below[key], f"{path} {key}", file, f"{table}{key}.")


def _options(command: Any) -> Iterator[tuple[str, tuple[str, Any, Kind | None]]]:
    """The options of a command that a file may set, by their key: as typed, the parameter, and its
    kind, None for a flag.
    """
    kinds = {} if command.callback is None else dict(kinds_of(command.callback))
    for parameter in command.params:
        _, kind = kinds.get(parameter.name, ((), None))
        writes = kind is not None and (kind.place or "").startswith("new")
        if parameter.is_eager or writes or (kind is None and not _is_flag(parameter)):
            continue
        for option in parameter.opts:
            key = option.removeprefix("--")
            if key != option and key not in NOT_FROM_A_FILE:
                yield key, (option, parameter, kind)


def _is_flag(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False))


def _unknown(file: Path, name: str, path: str, what: str, key: str, known: list[str]) -> str:
    said = f"{file}: {quoted(name)}: {path} has no {what} {quoted(key)}"
    close = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    if close:
        return f"{said}; did you mean {close[0]}?"
    return f"{said}; expected {'one of ' * bool(known)}{', '.join(known) or 'none'}"


def _value(value: Any, parameter: Any, kind: Kind | None, file: Path, name: str) -> Any:
    """The value as it would be typed."""
    if kind is None:
        if type(value) is not bool:
            raise L2PDError(f"{file}: {name} = {quoted(value)}: expected true or false")
        return value
    if parameter.multiple:
        return [_text(each, kind, file, name) for each in _as_list(value)]
    return _text(value, kind, file, name)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any, kind: Kind, file: Path, name: str) -> str:
    text = value if isinstance(value, str) else repr(value)
    if type(value) not in kind.written:
        raise L2PDError(f"{file}: {name} = {quoted(text)}: expected {kind.expected}")
    try:
        kind(text)
    except typer.BadParameter as error:
        raise L2PDError(f"{file}: {name} = {error.message}") from None
    return text
