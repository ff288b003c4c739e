"""Untrusted values in messages: short, in one line, whatever their type."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any

from l2pd_plugins.errors import ANY_FAILURE, printable

LONGEST = 200
"""Greatest number of characters of a value in a message."""
_MOST_ITEMS = 8
_DEEPEST = 3
_LONGEST_CLASS = 80
_LONGEST_NUMBER = 4 * LONGEST
"""Bits."""
_SHORT = (type(None), type(...), type(NotImplemented), complex, FunctionType, BuiltinFunctionType)
"""Built-in types whose repr is short."""
_OF_LIBRARIES = {
    "torch": ("dtype", "device", "layout"),
    "numpy": ("bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "float16", "float32"),
}
"""Types of libraries whose repr is short."""


def shown(value: object) -> str:
    """The value for a message: at most 200 characters, with the middle or the end left out.

    The cost does not grow with the value: of a long list only the first few elements are read, of a
    long string or bytes only the beginning and the end. No code of the value itself is run:
    numbers, strings, collections and paths (including subclasses) are formatted like the built-in
    types, and any other value by the name of its type.
    """
    try:
        text = _shown(value, _DEEPEST)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:  # it was changed during the call, or is broken
        text = _named(value)
    text = printable(text, LONGEST)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _named(value: object) -> str:
    return f"<{_type_name(value)}>"


def remark(value: object) -> str:
    """What a message about a wrong value says of it before "expected": that it is NaN, infinite, or
    a class instead of an object; empty for other values. As in `shown`, no code of it is run.
    """
    found = type(value)
    if issubclass(found, type):
        name = printable(_class_name(value), _LONGEST_CLASS)
        return f"it is a class, not an object such as {name}(...); "
    plain: Any = value
    if issubclass(found, float):
        number = float.__float__(plain)
    elif found.__module__ == "numpy" and _type_name(value) in ("float16", "float32"):
        number = float(plain)
    else:
        return ""
    if math.isnan(number):
        return "it is NaN; "
    return "it is infinite; " if math.isinf(number) else ""


def _type_name(value: object) -> str:
    """The type's own name, ignoring its metaclass."""
    return _class_name(type(value))[:LONGEST]


def _class_name(kind: object) -> str:
    """The name of a class, ignoring its metaclass."""
    name: str = type.__dict__["__name__"].__get__(kind)
    return name


def _shown(value: object, deeper: int) -> str:
    for kind, show in _KINDS:
        if issubclass(type(value), kind):
            text: str = show(value, deeper)
            return text
    found = type(value)
    names = _OF_LIBRARIES.get(found.__module__, ()) if type(found) is type else ()
    if found in _SHORT or _type_name(value) in names:
        return repr(value)
    if issubclass(found, type):
        return f"<class {_text(_class_name(value))}>"
    return _named(value)


def _text(value: Any) -> str:
    """A str or bytes; only the part that is shown is read."""
    kind: Any = str if isinstance(value, str) else bytes if isinstance(value, bytes) else bytearray
    if kind.__len__(value) <= LONGEST:
        return str(kind.__repr__(kind.__getitem__(value, slice(None))))
    half = LONGEST // 2 - 4
    begin, end = (kind.__getitem__(value, s) for s in (slice(half), slice(-half, None)))
    return f"{kind.__repr__(begin)[:half]}...{kind.__repr__(end)[-half:]}"


def _whole(value: Any) -> str:
    bits = int.bit_length(value)
    return int.__repr__(value) if bits <= _LONGEST_NUMBER else f"<a whole number of {bits} bits>"


def _items(begin: str, parts: Iterable[str], count: int, end: str) -> str:
    """Join the parts, which are already limited to those that are shown."""
    return f"{begin}{', '.join([*parts, *['...'] * (count > _MOST_ITEMS)])}{end}"


def _few(each: Iterator[Any], deeper: int) -> list[str]:
    return [_shown(item, deeper - 1) for item in islice(each, _MOST_ITEMS)]


def _list(value: Any, deeper: int) -> str:
    if not deeper and list.__len__(value):
        return "[...]"
    return _items("[", _few(list.__iter__(value), deeper), list.__len__(value), "]")


def _tuple(value: Any, deeper: int) -> str:
    count = tuple.__len__(value)
    if not deeper and count:
        return "(...)"
    return _items("(", _few(tuple.__iter__(value), deeper), count, ",)" if count == 1 else ")")


def _set(value: Any, deeper: int) -> str:
    kind: Any = set if isinstance(value, set) else frozenset
    count = kind.__len__(value)
    begin, end = ("{", "}") if kind is set else ("frozenset({", "})")
    if not count:
        return f"{kind.__name__}()"
    if not deeper:
        return f"{begin}...{end}"
    return _items(begin, sorted(_few(kind.__iter__(value), deeper)), count, end)


def _dict(value: Any, deeper: int) -> str:
    count = dict.__len__(value)
    if not deeper and count:
        return "{...}"
    some = islice(iter(dict.items(value)), _MOST_ITEMS)
    parts = (f"{_shown(key, deeper - 1)}: {_shown(item, deeper - 1)}" for key, item in some)
    return _items("{", parts, count, "}")


def _path(value: Any, deeper: int) -> str:
    if not type(value).__module__.startswith("pathlib"):
        return _named(value)
    return f"{_type_name(value)}({_text(str(value))})"


def _range(value: Any, deeper: int) -> str:
    step = (value.step,) * (value.step != 1)
    return f"range({', '.join(map(_whole, (value.start, value.stop, *step)))})"


_KINDS: tuple[tuple[Any, Any], ...] = (
    ((str, bytes, bytearray), lambda value, deeper: _text(value)),
    (bool, lambda value, deeper: repr(value)),
    (int, lambda value, deeper: _whole(value)),
    (float, lambda value, deeper: float.__repr__(value)),
    (list, _list),
    (tuple, _tuple),
    ((set, frozenset), _set),
    (dict, _dict),
    (range, _range),
    (PurePath, _path),
)
"""The formatter of each type."""
