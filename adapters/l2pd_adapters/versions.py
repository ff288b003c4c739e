"""Whether an engine's installed version lies in the range that its adapter was tested with."""

from __future__ import annotations

import os
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


def _key(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
