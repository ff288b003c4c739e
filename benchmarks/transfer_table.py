"""The table of benchmarks/transfer.py: learned policies compared with the swept threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from frontier_worker import REFERENCE

from l2pd_tools.tiny_world import TASKS

LOSSES = (0.5, 1.5)
"""Percentage points of validity that may be lost against one token per step."""
CONTROL = "confidence_threshold"
RESAMPLES = 2000
DETAIL = "| policy | filter | setting | valid | TPF | configuration |"
RULE = "|---|---|---|---:|---:|---|"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Outcomes:
    """One decode, on the prompts of some tasks: (N,) each, in the prompts' order."""

    setting: str
    valid: np.ndarray
    lengths: np.ndarray
    nfe: np.ndarray
    configuration: str

    @classmethod
    def of(cls, row: dict[str, Any], tasks: Iterable[str]) -> Outcomes:
        """The part of a row that is of these tasks."""
        kept = np.isin(row["family_of"], list(tasks))
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        return cls(
            options or "default",
            np.array([int(bit) for bit in row["valid"]])[kept],
            np.array(row["lengths"])[kept],
            np.array(row["nfe"])[kept],
            row["configuration"],
        )

    @property
    def validity(self) -> float:
        """Percent."""
        return 100 * float(self.valid.mean())

    @property
    def tokens_per_forward(self) -> float:
        """All tokens by all forward passes."""
        return float(self.lengths.sum() / self.nfe.sum())


@dataclass(frozen=True)
class Ratio:
    """Tokens per forward of one policy's best setting by those of another's, at equal loss."""

    setting: str
    against: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio_at(
    loss: float,
    policy: Sequence[Outcomes],
    control: Sequence[Outcomes],
    slow: Outcomes,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """How many times as many tokens per forward as the control, where neither loses more than
    `loss` points against one token per step.

    One token per step is a setting of both: it loses nothing. The interval is a paired bootstrap
    over the prompts, in which each resample chooses its own settings: percentiles 2.5 and 97.5.
    """
    ways = ([*policy, slow], [*control, slow])
    count = len(slow.valid)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    weights = np.concatenate([np.ones((1, count), dtype=drawn.dtype), drawn])  # the sample first
    best, chosen = [], []
    for way in ways:
        lost = np.stack([weights @ (slow.valid - one.valid) for one in way], axis=1) / count
        speed = np.stack([weights @ one.lengths / (weights @ one.nfe) for one in way], axis=1)
        allowed = np.where(100 * lost <= loss + _ROUNDING, speed, -np.inf)
        best.append(allowed.max(axis=1))
        chosen.append(way[int(allowed[0].argmax())].setting)
    ratios = best[0] / best[1]
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    return Ratio(chosen[0], chosen[1], float(ratios[0]), float(low), float(high))


@dataclass(frozen=True)
class Group:
    """One policy's settings with one filter, on the prompts of some tasks, and what they are
    compared with."""

    model: str
    gen: int
    tasks: tuple[str, ...]
    policy: str
    filter: str
    settings: list[Outcomes]
    control: list[Outcomes]
    slow: Outcomes

    @property
    def tested(self) -> str:
        """What is decoded."""
        return f"{self.model}, gen {self.gen}, {named(self.tasks)}"

    @property
    def trained(self) -> str:
        """The origin of the filter, for the table."""
        if not self.filter.startswith("trained without "):
            return self.filter
        _, _, how = self.filter.partition(": ")
        return f"never saw them ({how})"


def groups(rows: Sequence[dict[str, Any]]) -> list[Group]:
    """All comparisons, in the order of the rows. A filter's rows are compared with the rows of the
    same model, canvas and held-out prompts that need no filter; if tasks were left out of its
    training, also with those of the shipped filters on the same tasks."""
    every = sorted(TASKS)
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        options = tuple(sorted(row["options"].items()))
        key = (row["model"], row["gen"], row["policy"], options, row["filter"],
               tuple(row["families"]))  # fmt: skip
        if key not in newest or row["limit"] >= newest[key]["limit"]:
            newest[key] = row
    found = list(newest.values())

    def of(row: dict[str, Any], policy: str, label: str, tasks: list[str]) -> list[Outcomes]:
        return [
            Outcomes.of(one, row["families"])
            for one in found
            if (one["model"], one["gen"], one["policy"], one["filter"], one["families"])
            == (row["model"], row["gen"], policy, label, tasks)
            and one["limit"] == row["limit"]
        ]

    made: dict[tuple[Any, ...], Group] = {}
    for row in found:
        if not row["filter"]:
            continue
        slow, control = of(row, REFERENCE, "", every), of(row, CONTROL, "", every)
        labels = [(row["filter"], row["families"])]
        if row["families"] != every:
            labels.insert(0, (f"{row['model']}'s shipped", every))
        for label, tasks in labels:
            settings = of(row, row["policy"], label, tasks)
            if slow and control and settings:
                key = (row["model"], row["gen"], tuple(row["families"]), row["policy"], label)
                made[key] = Group(*key, settings, control, slow[0])
    return list(made.values())


def render(rows: Sequence[dict[str, Any]], unmeasured: Sequence[str] = ()) -> str:
    """The page, as Markdown; `unmeasured` names the cases that lack rows."""
    found = groups(rows)
    lines = [
        "# Does a learned policy carry over?",
        "",
        "Made by `python benchmarks/transfer.py` from the rows in transfer.jsonl; nobody edits it "
        "by hand. Held-out prompts of the small models' tasks, greedy, blocks of 32, one thread "
        "on a CPU. A ratio is the tokens per forward of the policy's fastest setting that loses at "
        "most so many points of validity against one token per step, by those of the fastest "
        "`confidence_threshold` that does. One token per step counts as a setting of both, so a "
        "policy that ruins answers at every setting has about 0.2. Brackets: 95 %, a paired "
        "bootstrap over the prompts in which every resample chooses its settings anew.",
        "",
        "| decoded | prompts | policy | its filter | one per step: valid | default: valid, TPF | "
        "threshold 0.9: valid, TPF | "
        + " | ".join(f"ratio at {loss} points" for loss in LOSSES)
        + " |",
        "|---|---:|---|---|---:|---|---|" + "---:|" * len(LOSSES),
    ]
    for group in found:
        ratios = [ratio_at(loss, group.settings, group.control, group.slow) for loss in LOSSES]
        lines.append(
            f"| {group.tested} | {len(group.slow.valid)} | `{group.policy}` | {group.trained} | "
            f"{group.slow.validity:.1f} | {cell(group.settings, 'default')} | "
            f"{cell(group.control, 'threshold 0.9')} | {' | '.join(map(str, ratios))} |"
        )
    if unmeasured:
        lines += ["", "Not measured yet, or not with every setting:", ""]
        lines += [f"- {name}" for name in unmeasured]
    lines += ["", "## Every setting"]
    for tested in dict.fromkeys(group.tested for group in found):
        same = [group for group in found if group.tested == tested]
        lines += ["", f"### {tested}", "", DETAIL, RULE]
        parts = [(REFERENCE, "", [same[0].slow]), (CONTROL, "", same[0].control)]
        parts += [(group.policy, group.trained, group.settings) for group in same]
        for policy, trained, settings in parts:
            lines += detail(policy, trained, settings)
    alone = {(row["model"], row["gen"]) for row in rows}
    for model, gen in sorted(alone - {(group.model, group.gen) for group in found}):
        lines += ["", f"### {model}, gen {gen}, all tasks, no filter yet", "", DETAIL, RULE]
        for row in rows:
            if (row["model"], row["gen"]) == (model, gen):
                lines += detail(row["policy"], row["filter"], [Outcomes.of(row, TASKS)])
    return "\n".join(lines) + "\n"


def detail(policy: str, trained: str, settings: Sequence[Outcomes]) -> list[str]:
    """A line for each setting, the slowest first."""
    return [
        f"| `{policy}` | {trained} | {one.setting} | {one.validity:.1f} | "
        f"{one.tokens_per_forward:.2f} | `{one.configuration}` |"
        for one in sorted(settings, key=lambda one: one.tokens_per_forward)
    ]


def cell(settings: Sequence[Outcomes], name: str) -> str:
    """One setting's validity and speed, or nothing if it was not measured."""
    for one in settings:
        if one.setting == name:
            return f"{one.validity:.1f}, {one.tokens_per_forward:.2f}"
    return ""


def named(tasks: Sequence[str]) -> str:
    """Tasks for a reader: all, a kind, or their names."""
    if set(tasks) == set(TASKS):
        return "all tasks"
    for kind in {task.kind for task in TASKS.values()}:
        if set(tasks) == {name for name, f in TASKS.items() if f.kind == kind}:
            return f"the {kind.replace('_', ' ')} tasks"
    return ", ".join(tasks)
