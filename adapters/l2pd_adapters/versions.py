"""Whether an installed engine is one that its adapter was tested with."""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version


def outside_range(engine: str, supported: tuple[str, str], opt_out: str) -> str:
    """What is wrong with the installed version of the engine, in one line; empty if nothing.

    `supported` is at least the first, below the second version; an environment variable `opt_out`
    that is 1 lets every version pass.
    """
    installed = version(engine)
    low, high = supported
    if _key(low) <= _key(installed) < _key(high) or os.environ.get(opt_out) == "1":
        return ""
    return (
        f"{engine} {installed} is outside the supported range >={low},<{high}; "
        f"{opt_out}=1 tries it all the same"
    )


def changed(
    signatures: Mapping[str, Sequence[str]], dataclass_fields: Mapping[str, Sequence[str]]
) -> list[str]:
    """What of an engine is not as it is expected: the parameters of its functions and classes, and
    the fields of its dataclasses, each by full name."""
    found = []
    for name, wanted in signatures.items():
        try:
            parameters = tuple(inspect.signature(pkgutil.resolve_name(name)).parameters)
        except (ImportError, AttributeError) as error:
            found.append(f"{name} is missing ({error})")
            continue
        if parameters != tuple(wanted):
            found.append(f"{name} takes ({', '.join(parameters)}), not ({', '.join(wanted)})")
    for name, names in dataclass_fields.items():
        try:
            there = getattr(pkgutil.resolve_name(name), "__dataclass_fields__", {})
        except (ImportError, AttributeError) as error:
            found.append(f"{name} is missing ({error})")
            continue
        found += [f"{name} has no field {each}" for each in names if each not in there]
    return found


def _key(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
