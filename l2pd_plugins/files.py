"""Bounded reading of untrusted files.

A checkpoint, a filter, a folder of trajectories or a prompt file may come from anybody. A fault in
one raises an `L2PDError` of one line that names the file. Reading never blocks on a FIFO, and
nothing outside the folder is read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l2pd_plugins.errors import L2PDError

LARGEST_JSON = 256 * 2**20
"""Size limit of a JSON file in bytes; the largest known tokenizers and weight indices have a tenth
of this.
"""
DEEPEST_JSON = 64
"""Nesting limit of objects and lists in JSON."""
_LONGEST_REASON = 400
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def one_line(text: object) -> str:
    """The text without line breaks and control characters, cut off if it is too long."""
    words = " ".join(str(text).split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
    return shown if len(shown) <= _LONGEST_REASON else f"{shown[:_LONGEST_REASON]} ..."


def reason_of(error: BaseException) -> str:
    """The error as one line."""
    plain = type(error).__name__ in ("Exception", "SafetensorError")
    if plain or isinstance(error, L2PDError | ValueError | RuntimeError):
        return one_line(error) or type(error).__name__
    if isinstance(error, OSError):
        return one_line(error.strerror or error)
    return one_line(f"{type(error).__name__}: {error}")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Context manager for library calls that read an untrusted file: any exception becomes an
    L2PDError of one line that begins with `what`.

    Libraries raise almost anything on malformed input: TypeError, KeyError, a plain Exception
    (tokenizers), or a panic of their Rust code, which is not an Exception. Wrap only the library's
    calls: a bug in our own code must not be hidden.
    """
    try:
        yield
    except L2PDError:
        raise
    except Exception as error:
        raise L2PDError(f"{what}: {reason_of(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise L2PDError(f"{what}: {one_line(error)}") from error


def path_inside(folder: Path, name: object) -> Path:
    """The path of a file that another file of the folder names.

    A link may lead to another file of the folder, or of the same repository in the hub's cache,
    whose snapshots are links into its blobs.

    Raises L2PDError if the name is not a relative path or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise L2PDError(f"{one_line(repr(name))} is not a file name")
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise L2PDError(f"{one_line(repr(name))} leads out of the folder; expected a file in it")
    path = folder / relative
    try:
        root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise L2PDError(f"{one_line(repr(name))}: {reason_of(error)}") from error
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not target.is_relative_to(root):
        raise L2PDError(
            f"{one_line(repr(name))} is a link that leads out of the folder; put the file itself "
            "there"
        )
    return path


def is_there(path: Path) -> bool:
    """Whether the path exists: a file, a folder, or a broken link."""
    return os.path.lexists(path)


def require_file(path: Path, called: str | None = None, largest: int | None = None) -> None:
    """Raise L2PDError if the path is not a regular file, cannot be examined, or has more than
    `largest` bytes. `called` is its name in the message.
    """
    called = str(path) if called is None else called
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise L2PDError(f"{called} cannot be read: {reason_of(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS.items() if test(found.st_mode)), "no file")
        raise L2PDError(f"{called} cannot be read: it is {kind}, expected a file")
    if largest is not None and found.st_size > largest:
        raise L2PDError(
            f"{called} cannot be read: it has {found.st_size} bytes, expected at most {largest}"
        )


def read_text(path: Path, called: str | None = None, largest: int | None = None) -> str:
    """The content of a UTF-8 text file, without a byte order mark.

    Raises L2PDError if it is not a regular file, too large, or not UTF-8.
    """
    called = str(path) if called is None else called
    require_file(path, called, largest)
    try:
        return decoded(path.read_bytes(), called)
    except (OSError, MemoryError) as error:
        raise L2PDError(f"{called} cannot be read: {reason_of(error)}") from error


def decoded(content: bytes, called: str) -> str:
    """Decode UTF-8 bytes, without a byte order mark. Raises L2PDError, with the line, if they are
    not UTF-8.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise L2PDError(f"{called} cannot be read: it is UTF-16, expected UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise L2PDError(
            f"{called} cannot be read: it is not UTF-8: the byte 0x{content[error.start]:02x} in "
            f"line {line}"
        ) from error


def read_object(path: Path, called: str | None = None) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises L2PDError if the file cannot be read, holds something else, is nested deeper than
    `DEEPEST_JSON`, or gives a key twice with two values.
    """
    called = str(path) if called is None else called
    text = read_text(path, called, LARGEST_JSON)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise L2PDError(f"{called} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        kind = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
        raise L2PDError(f"{called} holds {kind.get(type(values), 'a number')}; expected an object")
    return values


def parse_json(text: str) -> Any:
    """Parse a JSON text. Raises ValueError, also if it is nested too deeply, gives a key twice with
    different values, or contains half of a surrogate pair.
    """
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST_JSON}") from None
    level = [values]
    for _ in range(DEEPEST_JSON):
        level = [inner for value in level for inner in _within(value)]
    if level:
        raise ValueError(f"it is nested deeper than {DEEPEST_JSON}")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return values


def _within(value: Any) -> list[Any]:
    """The objects and lists in an object or list."""
    if not isinstance(value, dict | list):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [each for each in inner if isinstance(each, dict | list)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {key!r} is given twice, with two values")
    return found


def whole_number(value: object, least: int, greatest: int) -> bool:
    """Whether the value is a whole number (not a bool) within the bounds."""
    return type(value) is int and least <= value <= greatest
