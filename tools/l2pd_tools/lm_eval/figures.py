"""The cost of a run of the harness, summed over its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Figures:
    """Counts of one process."""

    answers: int = 0
    tokens: int = 0
    """Tokens up to and including the end of text, without the padding after it."""
    forwards: int = 0
    """Forward passes of all answers."""
    seconds: float = 0.0
    """Seconds of all calls of `generate`."""
    configurations: list[str] = field(default_factory=list)
    """Everything that the answers depend on: one line for each configuration that was used."""

    def add(self, lengths: Sequence[int], nfe: Sequence[int], seconds: float) -> None:
        """Count a batch: tokens and forward passes of each answer, and seconds of all."""
        self.answers += len(lengths)
        self.tokens += sum(lengths)
        self.forwards += sum(nfe)
        self.seconds += seconds


def summary(processes: Sequence[Figures]) -> dict[str, Any]:
    """The figures of a run as plain values. Processes run in parallel, so the run's seconds are
    those of the slowest.
    """
    answers, tokens, forwards = (
        sum(getattr(figures, name) for figures in processes)
        for name in ("answers", "tokens", "forwards")
    )
    seconds = max(figures.seconds for figures in processes)
    lines = [line for figures in processes for line in figures.configurations]
    return {
        "configurations": list(dict.fromkeys(lines)),
        "processes": len(processes),
        "answers": answers,
        "tokens": tokens,
        "nfe": forwards / answers if answers else None,
        "tokens_per_forward": tokens / forwards if forwards else None,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
    }
