"""The mutants that no test can notice, each with the reason, in equivalent.txt."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("equivalent.txt")


def read_equivalent(module: str) -> dict[str, str]:
    """The reason of each mutant of a module that is listed, by `Mutation.key`.

    The file holds, for each module, a line ``# path``, and below it for each reason a line
    ``= reason`` and the keys that it stands for, one a line.
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
