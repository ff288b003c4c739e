"""Reads equivalent.txt: the mutants that no test can detect, each with the reason."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("equivalent.txt")


def read_equivalent(module: str) -> dict[str, str]:
    """The reason of each listed mutant of a module, by `Mutation.key`.

    For each module the file has a line ``# path``, and below it, for each reason, a line
    ``= reason`` followed by the keys to which it applies, one per line.
    """
    found: dict[str, str] = {}
    here, reason = "", ""
    for line in FILE.read_text().splitlines():
        if line.startswith("# "):
            here = line[2:].strip()
        elif line.startswith("= "):
            reason = line[2:].strip()
        elif line.strip() and here == module:
            found[line.strip()] = reason
    return found
