"""Runs the cases of a part and counts them."""

from __future__ import annotations

import importlib
import itertools
import random
import time
import traceback
from dataclasses import dataclass, field

PARTS = ("core", "adapter", "files", "plugins")
"""Each is a module of this folder with ``try_one(random.Random) -> int | None``, which runs one
case and returns its number of steps, if it counts them. A finding is any error that it raises."""


@dataclass
class Report:
    """The result of the cases of one part."""

    part: str
    cases: int = 0
    steps: int = 0
    seconds: float = 0.0
    findings: list[tuple[int, str]] = field(default_factory=list)
    """The number of each case that failed, and its traceback."""

    def __str__(self) -> str:
        steps = f", {self.steps} steps" if self.steps else ""
        rate = self.cases / max(self.seconds, 1e-9)
        lines = [
            f"{self.part}: {self.cases} cases{steps} in {self.seconds:.0f} s ({rate:.1f} cases a "
            f"second), {len(self.findings)} findings"
        ]
        for number, text in self.findings:
            lines += [
                text,
                f"again: python -m tests.fuzz --parts {self.part} --seed {number} --cases 1",
            ]
        return "\n".join(lines)


def run(
    part: str,
    *,
    seed: int = 0,
    cases: int | None = None,
    seconds: float | None = None,
    findings: int = 1,
) -> Report:
    """Run cases from number `seed` on, up to a number of cases, a time, or a number of findings."""
    try_one = importlib.import_module(f"tests.fuzz.{part}").try_one
    report = Report(part)
    began = time.monotonic()
    for number in itertools.count(seed):
        report.seconds = time.monotonic() - began
        if report.cases == cases or (seconds is not None and report.seconds >= seconds):
            break
        report.cases += 1
        try:
            report.steps += try_one(random.Random(number)) or 0
        except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
            report.findings.append((number, traceback.format_exc()))
            if len(report.findings) >= findings:
                report.seconds = time.monotonic() - began
                break
    return report
