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


def incompatibility(
    engine: str,
    supported: tuple[str, str],
    opt_out: str,
    signatures: Mapping[str, Sequence[str]],
    dataclass_fields: Mapping[str, Sequence[str]],
) -> str:
    """Why an adapter cannot run on the installed engine, in one line; empty if it can.

    Besides the version (see `outside_range`), it is asked whether the parameters of functions and
    classes, and the fields of dataclasses, each by full name, are what the adapter stands on.
    """
    problem = outside_range(engine, supported, opt_out)
    if problem:
        return problem
    found = _changed(signatures, dataclass_fields)
    if not found:
        return ""
    low, high = supported
    return (
        f"{engine} {version(engine)} is not as l2pd-plugins knows >={low},<{high}: "
        f"{'; '.join(found)}"
    )


def _changed(
    signatures: Mapping[str, Sequence[str]], dataclass_fields: Mapping[str, Sequence[str]]
) -> list[str]:
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
