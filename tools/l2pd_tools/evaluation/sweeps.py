"""Values of a policy's options to try, derived from the options' bounds."""

from __future__ import annotations

import math
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from l2pd_plugins import L2PDError, UnmaskPolicy
from l2pd_plugins.plugins import find_policy, load_factory, option_parameters
from l2pd_plugins.policy_attributes import description_of, name_of, options_of

SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Fractions of the range of an option with two bounds. More of them are near the upper end, where
thresholds lose little.
"""
FACTORS = (0.25, 0.5, 1, 2, 4)
"""Factors on the current value of an option with at most one bound."""


def default_sweep(policy: UnmaskPolicy, fixed: Collection[str] = ()) -> dict[str, list[Any]]:
    """Values of one option of a policy to try: {option: values}.

    The option is ``threshold`` if there is one, else the first number that can be swept. Between
    two bounds, values spread over the range; with one bound or none, multiples of the current
    value. The current value itself is included. Options in `fixed` are not changed.

    Raises L2PDError if no option of the policy can be swept.
    """
    factory = load_factory(find_policy(name_of(policy)))
    hints = _hints(policy)
    names = [parameter.name for parameter in option_parameters(factory) or ()]
    free = [name for name in names if name not in fixed]
    for name in sorted(free, key=lambda name: name != "threshold"):
        values = _values(hints.get(name), options_of(policy).get(name))
        if values:
            return {name: values}
    raise L2PDError(
        f"{description_of(policy)} has no option that can be swept by default; its options are: "
        f"{', '.join(names) or 'none'}; name one with --set OPTION=VALUE,VALUE,..."
    )


def edge(policy: UnmaskPolicy, option: str, value: Any, tried: Sequence[Any]) -> str | None:
    """ "lowest" or "highest" if a number is that of several values that were tried for an option of
    the policy, and the option has no bound there; otherwise None.
    """
    numbers = {each for each in tried if type(each) in (int, float)}
    if value not in numbers or len(numbers) < 2:
        return None
    hint = _hints(policy).get(option)
    if value == min(numbers) and value != _bound(hint, "ge"):
        return "lowest"
    if value == max(numbers) and value != _bound(hint, "le"):
        return "highest"
    return None


def _hints(policy: UnmaskPolicy) -> dict[str, Any]:
    factory = load_factory(find_policy(name_of(policy)))
    return typing.get_type_hints(factory, include_extras=True)


def _values(hint: Any, present: Any) -> list[Any]:
    kinds = {part for part in _parts(hint) if part in (int, float)}
    if len(kinds) != 1:
        return []
    low, high = _bound(hint, "ge", "gt"), _bound(hint, "le", "lt")
    if low is not None and high is not None:
        tried = [low + share * (high - low) for share in SHARES]
    elif present:
        tried = [factor * present for factor in FACTORS]
    else:
        return []
    whole = kinds == {int}
    values = {math.ceil(value) if whole else float(f"{value:.6g}") for value in tried}
    return sorted(v for v in values | ({present} - {None}) if _allowed(hint, v))


def _bound(hint: Any, *names: str) -> float | None:
    """The bound that an annotation sets under one of these names."""
    for note in _parts(hint):
        # pydantic's Field keeps its bounds as annotated_types objects in `metadata`.
        for bound in getattr(note, "metadata", ()):
            for name in names:
                value: float | None = getattr(bound, name, None)
                if value is not None:
                    return value
    return None


def _parts(hint: Any) -> Iterator[Any]:
    """The types and metadata of an annotation."""
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)


def _allowed(hint: Any, value: Any) -> bool:
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError:
        return False
    return True
