"""The cases of `transfer.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from l2pd_plugins import L2PDError
from l2pd_tools.tiny_world import TASKS

LENGTHS = (256, 512)
"""Canvases longer than those of the training."""
KINDS = ("coupled", "mixed", "one_answer")
TRIPLES = (
    ("permutation", "story", "sort"),
    ("latin", "schedule", "addition"),
    ("split", "receipt", "reverse"),
    ("walk", "booking", "dial"),
    ("brackets", "solution", "json"),
)
"""A task of each kind; together they are all tasks, so that each is left out once this way."""


@dataclass(frozen=True)
class Case:
    """Which prompts are decoded on which model, and with whose filters."""

    name: str
    model: str
    gen: int
    tasks: tuple[str, ...]
    filters: str | None
    """The small model whose shipped filters are used; None for filters of `model` that are trained
    without `tasks`."""


def cases() -> list[Case]:
    """All cases; those that need no training come first."""
    every, small = tuple(TASKS), ("tiny-llada", "tiny-sdar")
    found = [Case(f"{m}, gen 128, own filters", m, 128, every, m) for m in small]
    found += [
        Case(f"{m}, gen 128, {other}'s filters", m, 128, every, other)
        for m, other in (small, small[::-1])
    ]
    splits = [tuple(n for n, f in TASKS.items() if f.kind == kind) for kind in KINDS]
    trained = [
        Case(f"tiny-llada, gen 128, trained without {name}", "tiny-llada", 128, tasks, None)
        for name, tasks in [
            *((kind, tasks) for kind, tasks in zip(KINDS, splits, strict=True)),
            *((", ".join(triple), triple) for triple in TRIPLES),
        ]
    ]
    longer = [
        Case(f"tiny-llada, gen {gen}, own filters", "tiny-llada", gen, every, "tiny-llada")
        for gen in LENGTHS
    ]
    # The two splits that were measured first, then the others.
    first = [trained[0], trained[3]]
    return [*found, *longer, *first, *(case for case in trained if case not in first)]


def chosen_cases(only: Sequence[str]) -> Iterator[Case]:
    """The cases whose names hold one of the words. Raises L2PDError for a word of none."""
    every = cases()
    for word in only:
        if not any(word in case.name for case in every):
            names = "\n  ".join(case.name for case in every)
            raise L2PDError(f"--only {word}: no case has it in its name; the cases are\n  {names}")
    return (case for case in every if not only or any(word in case.name for word in only))


def slug(case: Case) -> str:
    """The case's tasks as a name of a folder."""
    return "without-" + "-".join(case.tasks)
