"""The attributes of a policy, read once and checked. Imports no torch.

A policy is third-party code: its attributes may raise, or have any value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from inspect import getattr_static
from pathlib import PurePath
from typing import Any

from l2pd_plugins.errors import ANY_FAILURE, PolicyRuntimeError, describe_error, printable
from l2pd_plugins.policy import PROGRESS_RULES, STATISTICS, RemaskingPolicy
from l2pd_plugins.shown_values import shown

_MISSING = object()


@dataclass(frozen=True)
class Traits:
    """The attributes of a policy that a decode uses.

    A decode reads them when a block begins and never again: an attribute may be a property that
    raises or returns something else the next time.
    """

    requires: frozenset[str]
    progress: str
    edits: bool
    remasks: bool
    carries: frozenset[str] = frozenset()
    name: str = ""
    row_options: frozenset[str] = frozenset()


class TraitError(Exception):
    """An attribute of a policy cannot be read, or has an invalid value."""

    def __init__(self, attribute: str, problem: str) -> None:
        super().__init__(problem)
        self.attribute = attribute
        self.problem = problem


def read_traits(policy: Any) -> Traits:
    """Raises TraitError, which names the attribute, its value and what is expected."""
    requires = _read(policy, "requires")
    needed = _guarded("requires", lambda: _set_of(requires))
    if needed is None or not needed <= STATISTICS:
        raise TraitError("requires", _guarded("requires", lambda: _wrong_requires(requires)))
    edits = _read(policy, "edits")
    if type(edits) is not bool:
        raise TraitError("edits", f"edits = {shown(edits)} must be True or False")
    carries = _read(policy, "carries")
    carried = _guarded("carries", lambda: _set_of(carries))
    if carried is None or not all(type(name) is str for name in carried):
        raise TraitError(
            "carries", f"carries = {shown(carries)} must be a set of names in the state"
        )
    return Traits(
        # Return this module's strings, since the policy's may be of a str subclass.
        requires=frozenset(name for name in STATISTICS if name in needed),
        progress=read_progress(policy),
        edits=edits,
        remasks=issubclass(type(policy), RemaskingPolicy),
        carries=carried,
        name=name_of(policy),
        row_options=_read_row_options(policy),
    )


def _wrong_requires(requires: Any) -> str:
    """What is wrong with this value, and the line to write, if that can be guessed."""
    said = f"requires = {shown(requires)}"
    if issubclass(type(requires), str):  # not isinstance, which reads the value's __class__
        given = re.findall(r"\w+", str.__str__(requires[:_LONGEST]))
        problem = f"{said} is a text, not a set"
    elif issubclass(type(requires), (set, frozenset, list, tuple)):
        given = [name if issubclass(type(name), str) else "" for name in requires]
        unknown = sorted(shown(name) for name in requires if name not in list(STATISTICS))
        problem = (
            f"{said} names {unknown[0]}, which is unknown" if unknown else f"{said} is not a set"
        )
    else:
        given, problem = [], f"{said} is not a set"
    meant = [
        match
        for name in given
        for match in get_close_matches(name[:_LONGEST].lower(), STATISTICS, n=1)
    ]
    if meant and len(meant) == len(given):
        return f"{problem}; write {requires_line(meant)}"
    return f"{problem}; expected a set of names out of {', '.join(sorted(STATISTICS))}"


def requires_line(names: Iterable[str]) -> str:
    """The line of a policy that requires these statistics."""
    return f"requires = frozenset({{{', '.join(json.dumps(name) for name in sorted(set(names)))}}})"


def read_progress(policy: Any) -> str:
    """Raises TraitError, as `read_traits` does."""
    progress = _read(policy, "progress")
    if type(progress) is not str or progress not in PROGRESS_RULES:
        choices = ", ".join(PROGRESS_RULES)
        raise TraitError("progress", f"progress = {shown(progress)} must be one of {choices}")
    return progress


def _read_row_options(policy: Any) -> frozenset[str]:
    declared = _read(policy, "row_options")
    names: frozenset[str] | None = _guarded("row_options", lambda: _set_of(declared))
    if names is None or not all(type(name) is str for name in names):
        said = f"row_options = {shown(declared)} must be a set of names of options"
        raise TraitError("row_options", said)
    for name in sorted(names):
        value = _guarded(name, partial(getattr, policy, name, _MISSING))
        if value is _MISSING:
            raise TraitError(
                "row_options",
                f"row_options names {shown(name)}, which is no option of the policy; its options "
                f"are: {', '.join(options_of(policy)) or 'none'}",
            )
        if value is not None and not issubclass(type(value), (int, float)):
            raise TraitError(
                "row_options",
                f"row_options names {shown(name)}, which is {shown(value)}; expected a number, a "
                "flag or None",
            )
        if hasattr(getattr_static(type(policy), name, None), "__set__"):
            raise TraitError(
                "row_options",
                f"row_options names {shown(name)}, which is a property; expected an attribute that "
                "a copy can set, such as a functools.cached_property",
            )
    return names


def _set_of(value: Any) -> frozenset[Any] | None:
    """The elements as a plain set, read once; None if the value is not a set."""
    return frozenset(value) if isinstance(value, AbstractSet) else None


def _read(policy: Any, attribute: str) -> Any:
    return _guarded(attribute, lambda: getattr(policy, attribute))


def _guarded(attribute: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        raise TraitError(attribute, describe_error(error)) from error


def name_of(policy: Any) -> str:
    """The policy's name, or its class's name if that cannot be read or is not a string."""
    try:
        name = policy.name
        if isinstance(name, str):
            return str.__str__(name)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:
        return type(policy).__name__
    return type(policy).__name__


_LONGEST = 1000
_MOST_OPTIONS = 100


def printable_name_of(policy: Any) -> str:
    """As `name_of`, as one printable line."""
    return printable(name_of(policy))


def description_of(policy: Any) -> str:
    """The result of the policy's `describe`, as one line of at most 1000 characters; its name if
    `describe` fails or does not return a string.
    """
    try:
        text = policy.describe()
        if isinstance(text, str):
            return printable(text, _LONGEST)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:
        pass
    return f"{printable_name_of(policy)}(...)"


def options_of(policy: Any) -> dict[str, Any]:
    """The policy's `options` as plain JSON values; other values as strings, as in messages. Empty
    if `options` fails or does not return a mapping.
    """
    try:
        given = policy.options()
        if not isinstance(given, Mapping):
            return {}
        pairs = [(name, given[name]) for name in list(given)[:_MOST_OPTIONS]]
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:
        return {}
    return {printable(name): _plain(value) for name, value in pairs if isinstance(name, str)}


def fingerprint_of(policy: Any) -> str:
    """The policy's `fingerprint`, which keeps results of different weights apart; if it cannot be
    read, that is an error.

    Raises PolicyRuntimeError, with the policy's name, if it fails or does not return a string.
    """
    what = f"policy {shown(name_of(policy))}: fingerprint failed"
    try:
        given = policy.fingerprint()
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        raise PolicyRuntimeError(f"{what}: {describe_error(error)}") from error
    if not isinstance(given, str):
        raise PolicyRuntimeError(f"{what}: returned {shown(given)}; expected a text")
    return printable(given, _LONGEST)


def identity_of(policy: Any) -> str:
    """The policy as one word, and the fingerprint of its weights if it has any, without the path of
    the weights. Raises PolicyRuntimeError as `fingerprint_of` does.
    """
    weights = fingerprint_of(policy)
    if not weights:
        return description_of(policy)
    options = {k: v for k, v in options_of(policy).items() if k != "filter" and v is not None}
    told = ", ".join(f"{k}={v}" for k, v in options.items())
    return f"{printable_name_of(policy)}({told}) {weights}"


def _plain(value: Any, deeper: int = 3) -> Any:
    """The value if JSON can represent it, otherwise a string."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple) and deeper and len(value) <= _LONGEST:
        return [_plain(each, deeper - 1) for each in value]
    if isinstance(value, PurePath):
        return str(value)
    return shown(value)
