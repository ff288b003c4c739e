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
UNTRAINED = "eb_sampler"
"""A rule without a filter, compared with the control on the same prompts as the filters."""
NO_FILTER = "needs none"
RESAMPLES = 2000
DETAIL = "| policy | filter | setting | valid | TPF | configuration |"
RULE = "|---|---|---|---:|---:|---|"
_ROUNDING = 1e-9
_ARRAYS = ("valid", "lengths", "nfe")


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
        told = {name: value for name, value in row["options"].items() if name != "fallback"}
        options = ", ".join(f"{name} {value}" for name, value in told.items())
        return cls(
            options or "default",
            np.array([int(bit) for bit in row["valid"]])[kept],
            np.array(row["lengths"])[kept],
            np.array(row["nfe"])[kept],
            row["configuration"],
        )

    @classmethod
    def joined(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """One setting's outcomes on the prompts of several groups."""
        arrays = [np.concatenate([getattr(one, name) for one in parts]) for name in _ARRAYS]
        return cls(parts[0].setting, *arrays, configuration="")

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
    fallback: str
    """The option that all settings share; empty for the policy's default."""
    settings: list[Outcomes]
    control: list[Outcomes]
    slow: Outcomes

    @property
    def decided(self) -> str:
        """The policy, and who decides, for the table."""
        return f"`{self.policy}`" + (f", fallback {self.fallback}" if self.fallback else "")

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

    def of(
        row: dict[str, Any], policy: str, label: str, tasks: list[str], fallback: str = ""
    ) -> list[Outcomes]:
        return [
            Outcomes.of(one, row["families"])
            for one in found
            if (one["model"], one["gen"], one["policy"], one["filter"], one["families"])
            == (row["model"], row["gen"], policy, label, tasks)
            and one["limit"] == row["limit"]
            and one["options"].get("fallback", "") == fallback
        ]

    made: dict[tuple[Any, ...], Group] = {}
    for row in found:
        if not row["filter"]:
            continue
        slow, control = of(row, REFERENCE, "", every), of(row, CONTROL, "", every)
        labels = [(row["filter"], row["families"])]
        if row["families"] != every:
            labels.insert(0, (f"{row['model']}'s shipped", every))
        fallback = row["options"].get("fallback", "")
        for label, tasks in labels:
            settings = of(row, row["policy"], label, tasks, fallback)
            if slow and control and settings:
                key = (row["model"], row["gen"], tuple(row["families"]), row["policy"], label,
                       fallback)  # fmt: skip
                made[key] = Group(*key, settings, control, slow[0])
        settings = of(row, UNTRAINED, "", every)
        if slow and control and settings:
            key = (row["model"], row["gen"], tuple(row["families"]), UNTRAINED, NO_FILTER, "")
            made[key] = Group(*key, settings, control, slow[0])
    return list(made.values())


def pooled(found: Sequence[Group]) -> list[Group]:
    """For each policy, all splits of one way of leaving tasks out as one comparison: every prompt
    is decoded by a filter that never saw its task."""
    made = []
    splits = [group for group in found if group.filter.startswith("trained without ")]
    kinds = [sorted(n for n, f in TASKS.items() if f.kind == kind) for kind in _kinds()]
    for way, chosen in (
        ("kind", [g for g in splits if sorted(g.tasks) in kinds]),
        ("three tasks", [g for g in splits if sorted(g.tasks) not in kinds]),
    ):
        for model, gen, policy, fallback in dict.fromkeys(
            (g.model, g.gen, g.policy, g.fallback) for g in chosen
        ):
            parts = [
                g
                for g in chosen
                if (g.model, g.gen, g.policy, g.fallback) == (model, gen, policy, fallback)
            ]
            made.append(
                Group(
                    model, gen, tuple(sorted(name for g in parts for name in g.tasks)), policy,
                    f"each prompt's filter never saw its {way}: {len(parts)} filters", fallback,
                    _shared([g.settings for g in parts]), _shared([g.control for g in parts]),
                    Outcomes.joined([g.slow for g in parts]),
                )
            )  # fmt: skip
    return made


def _shared(of_parts: Sequence[Sequence[Outcomes]]) -> list[Outcomes]:
    """The settings that every part has, each on the prompts of all parts."""
    by_name = [{one.setting: one for one in settings} for settings in of_parts]
    return [
        Outcomes.joined([part[name] for part in by_name])
        for name in by_name[0]
        if all(name in part for part in by_name)
    ]


def _kinds() -> list[str]:
    return sorted({task.kind for task in TASKS.values()})


def splits_table(found: Sequence[Group]) -> list[str]:
    """Averages over the splits, one line for each policy."""
    splits = [group for group in found if group.filter.startswith("trained without ")]
    if not splits:
        return []
    lines = [
        "",
        "## Over the splits",
        "",
        "Filters on tasks that they never saw. The ratios' median and least value are over the "
        "splits, of which each has few prompts, so one invalid answer can decide; the rows of "
        'several filters above have all prompts. "Most lost" is the default\'s largest loss of '
        "validity, in points, against one token per step or the threshold 0.9, whichever is lower.",
        "",
        "| policy | splits | "
        + " | ".join(f"ratio at {loss} points: median, least" for loss in LOSSES)
        + " | default: most lost |",
        "|---|---:|" + "---:|" * len(LOSSES) + "---:|",
    ]
    for decided in dict.fromkeys(group.decided for group in splits):
        same = [group for group in splits if group.decided == decided]
        cells = []
        for loss in LOSSES:
            ratios = [ratio_at(loss, g.settings, g.control, g.slow).value for g in same]
            cells.append(f"{np.median(ratios):.2f}, {min(ratios):.2f}")
        lost = [
            min(g.slow.validity, *(c.validity for c in g.control if c.setting == "threshold 0.9"))
            - one.validity
            for g in same
            for one in g.settings
            if one.setting == "default"
        ]
        cells.append(f"{max(lost):.1f}" if lost else "")
        lines.append(f"| {decided} | {len(same)} | {' | '.join(cells)} |")
    return lines


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
    for group in [*found, *pooled(found)]:
        ratios = [ratio_at(loss, group.settings, group.control, group.slow) for loss in LOSSES]
        lines.append(
            f"| {group.tested} | {len(group.slow.valid)} | {group.decided} | {group.trained} | "
            f"{group.slow.validity:.1f} | {cell(group.settings, 'default')} | "
            f"{cell(group.control, 'threshold 0.9')} | {' | '.join(map(str, ratios))} |"
        )
    lines += splits_table(found)
    if unmeasured:
        lines += ["", "Not measured yet, or not with every setting:", ""]
        lines += [f"- {name}" for name in unmeasured]
    lines += ["", "## Every setting"]
    for tested in dict.fromkeys(group.tested for group in found):
        same = [group for group in found if group.tested == tested]
        lines += ["", f"### {tested}", "", DETAIL, RULE]
        parts = [(f"`{REFERENCE}`", "", [same[0].slow]), (f"`{CONTROL}`", "", same[0].control)]
        parts += [(group.decided, group.trained, group.settings) for group in same]
        for policy, trained, settings in parts:
            lines += detail(policy, trained, settings)
    alone = {(row["model"], row["gen"]) for row in rows}
    for model, gen in sorted(alone - {(group.model, group.gen) for group in found}):
        lines += ["", f"### {model}, gen {gen}, all tasks, no filter yet", "", DETAIL, RULE]
        for row in rows:
            if (row["model"], row["gen"]) == (model, gen):
                lines += detail(f"`{row['policy']}`", row["filter"], [Outcomes.of(row, TASKS)])
    return "\n".join(lines) + "\n"


def detail(policy: str, trained: str, settings: Sequence[Outcomes]) -> list[str]:
    """A line for each setting, the slowest first."""
    return [
        f"| {policy} | {trained} | {one.setting} | {one.validity:.1f} | "
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
