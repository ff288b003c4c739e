"""What a policy says of itself, read once and checked. Imports no torch.

A policy is code of somebody else's: what it says of itself may raise, or be anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from l2pd_plugins.errors import ANY_FAILURE, PolicyRuntimeError, describe_error, printable
from l2pd_plugins.policy import PROGRESS_RULES, STATISTICS, RemaskingPolicy
from l2pd_plugins.shown import shown


@dataclass(frozen=True)
class Traits:
    """The attributes of a policy by which a decode runs it.

    A decode reads them when a block begins and never again: an attribute may be a property, which
    may raise or answer something else the next time.
    """

    requires: frozenset[str]
    progress: str
    edits: bool
    remasks: bool
    carries: frozenset[str] = frozenset()
    name: str = ""


class TraitError(Exception):
    """An attribute of a policy cannot be read, or holds a value that means nothing."""

    def __init__(self, attribute: str, problem: str) -> None:
        super().__init__(problem)
        self.attribute = attribute
        self.problem = problem


def read_traits(policy: Any) -> Traits:
    """Raises TraitError, which names the attribute, its value and what is expected."""
    requires = _read(policy, "requires")
    if issubclass(type(requires), str):  # not by isinstance, which asks the value
        said = shown(requires)
        raise TraitError("requires", f"requires = {said} is a text; write frozenset({{{said}}})")
    needed = _guarded("requires", lambda: _set_of(requires))
    if needed is None or not needed <= STATISTICS:
        choices = ", ".join(sorted(STATISTICS))
        raise TraitError("requires", f"requires = {shown(requires)} must be a set out of {choices}")
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
        # The strings of this module, since the policy's may be of a subclass.
        requires=frozenset(name for name in STATISTICS if name in needed),
        progress=read_progress(policy),
        edits=edits,
        remasks=issubclass(type(policy), RemaskingPolicy),
        carries=carried,
        name=name_of(policy),
    )


def read_progress(policy: Any) -> str:
    """Raises TraitError, as `read_traits` does."""
    progress = _read(policy, "progress")
    if type(progress) is not str or progress not in PROGRESS_RULES:
        choices = ", ".join(PROGRESS_RULES)
        raise TraitError("progress", f"progress = {shown(progress)} must be one of {choices}")
    return progress


def _set_of(value: Any) -> frozenset[Any] | None:
    """A plain set of the elements, which are read once; None if the value is no set."""
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
    """The policy's name; its class's where the name cannot be read or is no text."""
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
    """As `name_of`, in one line that can be printed."""
    return printable(name_of(policy))


def description_of(policy: Any) -> str:
    """What the policy `describe`s itself as, in one line of 1000 characters at most; its name where
    it fails, or gives no text."""
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
    """The policy's `options`, in plain values that JSON can hold; others as a message shows them.
    None where it fails, or gives no mapping."""
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
    """The policy's `fingerprint`: what was made with one of its weights is not mixed with what was
    made with others. So one that cannot be read is an error.

    Raises PolicyRuntimeError, with the policy's name, if it fails or gives no text.
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


def _plain(value: Any, deeper: int = 3) -> Any:
    """The value, if JSON can hold it; else a text."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple) and deeper and len(value) <= _LONGEST:
        return [_plain(each, deeper - 1) for each in value]
    if isinstance(value, PurePath):
        return str(value)
    return shown(value)
