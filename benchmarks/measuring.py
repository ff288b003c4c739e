"""Shared code of the benchmarks: timing of alternatives in turns, with the spread; the device and
the environment that the figures depend on; results as JSON.
"""

from __future__ import annotations

import argparse
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

from l2pd_adapters.huggingface.models.load import device_here
from l2pd_plugins import L2PDError
from l2pd_plugins.writing import require_place_for_folder, require_writable, write_text
from l2pd_tools.cli.kinds import Kind, Line, Number, Whole, quoted
from l2pd_tools.loading import resolve_device


@dataclass(frozen=True)
class Repeated:
    """A figure of each repetition."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """In the unit of the values."""
        return statistics.median(self.values)

    @property
    def spread(self) -> list[float]:
        """The least and the most."""
        return [min(self.values), max(self.values)]


class Times(Repeated):
    """Seconds of each repetition of one alternative."""

    def over(self, other: Times) -> Ratio:
        """How many times as long as `other`, repetition by repetition."""
        return Ratio(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def __str__(self) -> str:
        low, high = self.spread
        return f"{1e3 * self.median:9.2f} ms [{1e3 * low:.2f}, {1e3 * high:.2f}]"


class Ratio(Repeated):
    """Ratios of repetitions that ran one after the other."""

    def __str__(self) -> str:
        low, high = self.spread
        return f"{self.median:6.2f}x [{low:.2f}, {high:.2f}]"


def timed(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    device: torch.device,
    warm: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Run all alternatives in turns, so that a disturbance affects each; before, with `warm`,
    once without the clock. They run on the device, which is waited for. With `time.process_time`
    as the clock the seconds are those of the processor, which other processes do not lengthen."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(0 if warm else 1, repeats + 1):
        for name, run in ways.items():
            synchronize(device)  # what was queued before is not this one's
            start = clock()
            run()
            synchronize(device)
            if turn:
                found[name].append(clock() - start)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of(name: str) -> torch.device:
    """The device of a --device, as `device_here`. Raises L2PDError if there is none such."""
    try:
        return device_here(resolve_device(name))
    except L2PDError as error:
        raise L2PDError(f"--device {name}: {error}") from error


def positive(text: str) -> int:
    """An argument that is a whole number from 1."""
    return int(_taken(Whole(1, 10**9), text))


def count(text: str) -> int:
    """An argument that is a whole number from 0."""
    return int(_taken(Whole(0, 10**9), text))


def amount(text: str) -> float:
    """An argument that is a number from 0."""
    return float(_taken(Number(0, 1e6), text))


def output(text: str) -> Path:
    """An argument that names a file to be written: refused before the work if it cannot be."""
    path = Path(str(_taken(Line("a file's name"), text)))
    try:
        require_place_for_folder(path.parent, text)
        if path.parent.is_dir():
            require_writable(path, text)
    except L2PDError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def _taken(kind: Kind, text: str) -> Any:
    try:
        return kind.read(text)
    except ValueError as error:
        said = str(error) or f"expected {kind.expected}"
        raise argparse.ArgumentTypeError(f"{quoted(text)}: {said}") from error


def run_script(main: Callable[[], None]) -> None:
    """Run a script; what it refuses is a line on stderr and exit code 2, as in the command line."""
    try:
        main()
    except L2PDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def environment(device: torch.device) -> dict[str, Any]:
    """The environment of the figures, besides the arguments; `device` is the device of the
    measurement.
    """
    on_gpu = device.type == "cuda"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": str(device),
        "machine": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(path: Path | None, results: Any, device: torch.device) -> None:
    """The results and their environment as JSON, if a path is given. To be called after every
    result: what fails later takes none of those before with it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"environment": environment(device), "results": results}
        write_text(path, json.dumps(found, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
