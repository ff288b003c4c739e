"""Timing that compares: several ways in one run, taken in turns, with the spread."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition of one way."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def over(self, other: Times) -> Ratio:
        """How many times as long as `other`, repetition by repetition."""
        return Ratio(tuple(a / b for a, b in zip(self.seconds, other.seconds, strict=True)))

    def __str__(self) -> str:
        low, high = (1e3 * end(self.seconds) for end in (min, max))
        return f"{1e3 * self.median:9.2f} ms [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Ratio:
    """Ratios of repetitions that ran one after the other."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The ratio."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:6.2f}x [{min(self.values):.2f}, {max(self.values):.2f}]"


def timed(
    ways: Mapping[str, Callable[[], object]], repeats: int, *, warm: bool = True
) -> dict[str, Times]:
    """Run all ways in turns, so that a noisy minute hits each of them; before that, with `warm`,
    once without the clock."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(0 if warm else 1, repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                found[name].append(time.perf_counter() - start)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def environment() -> dict[str, Any]:
    """What the figures depend on besides the arguments."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(path: Path | None, results: Any) -> None:
    """The results and their environment as JSON, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"environment": environment(), "results": results}
        path.write_text(json.dumps(found, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
