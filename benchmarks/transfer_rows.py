"""The rows of `transfer.py`: what one decode gave, and the file that they are kept in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l2pd_tools.evaluation.results import Evaluation


class Rows:
    """The file of rows: one JSON object a line, each decode once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            self.rows = [json.loads(line) for line in lines]

    def has(self, wanted: dict[str, Any]) -> bool:
        """Whether there is a row with these values, of at least as many prompts."""
        return any(
            row["limit"] >= wanted["limit"]
            and all(row[name] == value for name, value in wanted.items() if name != "limit")
            for row in self.rows
        )

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, to the file too."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def outcome(found: Evaluation, label: str, folder: Path | None) -> dict[str, Any]:
    """The figures of a decode, and of each of its prompts."""
    configuration = found.configuration
    if folder is not None:  # its path depends on the machine
        configuration = configuration.replace(str(folder), f"<{label}>")
    return {
        "prompts": len(found.answers),
        "validity": found.validity,
        "tokens_per_forward": found.tokens_per_forward,
        "seconds": round(found.seconds, 1),
        "family_of": [a.prompt.task.name for a in found.answers],
        "valid": "".join("01"[bool(a.valid)] for a in found.answers),
        "lengths": [a.length for a in found.answers],
        "nfe": [a.nfe for a in found.answers],
        "configuration": configuration,
    }
