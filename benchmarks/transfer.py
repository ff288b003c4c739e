"""Measure learned policies on tasks, lengths and models that they were not trained on.

    python benchmarks/transfer.py --work runs/transfer                 # hours on one core
    python benchmarks/transfer.py --work runs/transfer --only coupled  # cases with this word
    python benchmarks/transfer.py --work runs/transfer --minutes 60    # start nothing new after
    python benchmarks/transfer.py --render                             # only write the table

Cases, in the order of `transfer_cases`: a small model's own filters on the tasks that they were
trained on; the other small model's filters; longer canvases than the 128 tokens of the training;
and filters trained without some tasks, measured on just those. Such filters are trained by the
recipe of `make filters`, on the first `--train-prompts` training prompts less those of the tasks
left out.

Each row is a decode of held-out prompts with one setting. It is appended to `--out` (.jsonl) as
soon as it is measured, with its configuration and every prompt's outcome, so that an interrupted
run can be continued. The table (.md) is made only from this file. Filters and their trajectories
are kept in `--work`. The script uses one process and one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frontier_worker import CACHES, REFERENCE
from measuring import amount, output, positive, run_script
from transfer_cases import Case, cases, chosen_cases, slug
from transfer_table import render

from l2pd_adapters.tiny_models import folder_of, heldout_prompts, training_prompts
from l2pd_plugins import L2PDError
from l2pd_plugins.trajectories import (
    load_references,
    read_manifest,
    read_trajectories,
    save_references,
)
from l2pd_tools.evaluation.prompts import Prompt, read_prompts
from l2pd_tools.evaluation.results import Evaluation
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.loading import load_model
from l2pd_tools.policy_text import parse_policy
from l2pd_tools.tiny_world import TASKS
from l2pd_tools.training.collecting import collect
from l2pd_tools.training.rounds import STARTING_POLICIES, train_filter

RESULTS = Path(__file__).parent / "results" / "transfer.jsonl"
SHARD = 64
"""Prompts of a shard of trajectories."""
CONTROL = [{"threshold": t} for t in (0.9, 0.8, 0.7, 0.95, 0.85, 0.75, 0.6, 0.5)]
LEARNED: dict[str, list[dict[str, Any]]] = {
    "settled": [{}, {"risk": 0.03}, {"risk": 0.06}, {"risk": 0.15}, {"risk": 0.01}],
    "learn2pd": [{}, {"threshold": 0.95}, {"threshold": 0.9}, {"threshold": 0.8}],
}
"""The settings of each policy, the default first."""


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


@dataclass(frozen=True)
class Bench:
    """The model and prompts to decode, and the folders of filters and table rows."""

    rows: Rows
    work: Path
    limit: int
    """Held-out prompts of all tasks; a case uses those of its tasks."""
    train_prompts: int
    rounds: int
    batch_size: int
    gen: int | None
    """The canvas length of every case in a quick run; otherwise each case has its own."""
    deadline: float
    epochs: int | None = None

    def measure(self, case: Case, controls: Sequence[dict[str, Any]], learned: Any) -> None:
        """Decode the missing settings of a case, each as a row."""
        prompts = [p for p in read_prompts(heldout_prompts(), self.limit, tasks=TASKS)
                   if p.task and p.task.name in case.tasks]  # fmt: skip
        if not prompts:
            raise L2PDError(f"--limit {self.limit}: no held-out prompt is of {case.name}")
        every = tuple(TASKS)
        # Settings without the split's filter are decoded once for all splits, and restricted later.
        alike = dataclasses.replace(case, tasks=every)
        whole = read_prompts(heldout_prompts(), self.limit, tasks=TASKS)
        self._decode(alike, whole, REFERENCE, {}, None, "")
        for options in controls:
            self._decode(alike, whole, "confidence_threshold", options, None, "")
        for policy, settings in learned.items():
            if case.filters is None:
                folder, label = self.filter_without(case, policy)
                own = folder_of(case.model) / "policies" / policy
                for options in settings:
                    shipped = (own, f"{case.model}'s shipped")
                    self._decode(alike, whole, policy, options, *shipped)
            else:
                folder = folder_of(case.filters) / "policies" / policy
                label = f"{case.filters}'s shipped"
            for options in settings:
                self._decode(case, prompts, policy, options, folder, label)

    def filter_without(self, case: Case, policy: str) -> tuple[Path, str]:
        """A filter trained without a case's tasks, and what rows call it; trained unless it is
        there. Raises TimeOver."""
        label = (
            f"trained without {', '.join(case.tasks)}: {self.train_prompts} prompts less "
            f"theirs, {self.rounds} rounds"
        )
        place = self.work / f"{case.model}-{self.train_prompts}-{self.rounds}" / slug(case)
        folder = place / policy
        if (folder / "config.json").is_file():
            return folder, label
        self.check_time()
        data = self.everything(case)
        lines = training_prompts().read_text(encoding="utf-8").splitlines()[: self.train_prompts]
        kept = [i for i, line in enumerate(lines) if json.loads(line)["task"] not in case.tasks]
        prompts = place / training_prompts().name
        place.mkdir(parents=True, exist_ok=True)
        prompts.write_text("\n".join(lines[i] for i in kept) + "\n", encoding="utf-8")
        common: dict[str, Any] = {"model": case.model, "device": "cpu", "prompts": prompts}
        if policy == "settled":
            part(data, place / "data" / "round-0", kept)
            train_filter(
                folder, place / "data", policy=policy, rounds=self.rounds, labels="consistent",
                max_new_tokens=self.gen or 128, epochs=self.epochs, **common,
            )  # fmt: skip
        else:
            part(data, place / "oracle", kept, references_alone=True)
            collect(
                *loaded(case.model), read_prompts(prompts, tasks=TASKS), place / "oracle",
                policies=["oracle"],
                max_new_tokens=self.gen or 128, prompts_per_shard=SHARD, source=prompts.name,
            )  # fmt: skip
            train_filter(folder, place / "oracle", policy=policy, epochs=self.epochs)
        return folder, label

    def everything(self, case: Case) -> Path:
        """The first round's trajectories of all training prompts; each split has a part."""
        folder = self.work / f"{case.model}-{self.train_prompts}-round-0"
        prompts = read_prompts(training_prompts(), self.train_prompts, tasks=TASKS)
        collect(
            *loaded(case.model), prompts, folder,
            policies=[parse_policy(text) for text in STARTING_POLICIES],
            source=training_prompts().name, max_new_tokens=self.gen or 128,
            prompts_per_shard=SHARD, labels="consistent",
        )  # fmt: skip
        return folder

    def check_time(self) -> None:
        """Raise TimeOver if the time limit is reached."""
        if time.time() > self.deadline:
            raise TimeOver

    def _decode(
        self,
        case: Case,
        prompts: list[Prompt],
        policy: str,
        options: dict[str, Any],
        folder: Path | None,
        label: str,
    ) -> None:
        gen = self.gen or case.gen
        what = {
            "model": case.model,
            "gen": gen,
            "policy": policy,
            "options": options,
            "filter": label,
            "families": sorted(case.tasks),  # the name that the committed rows have
            "limit": self.limit,
        }
        if self.rows.has(what):
            return
        self.check_time()
        given = options if folder is None else {**options, "filter": str(folder)}
        found = evaluate(
            *loaded(case.model), prompts, policy=policy, options=given, max_new_tokens=gen,
            cache=CACHES.get(case.model), batch_size=self.batch_size,
        )  # fmt: skip
        self.rows.append({**what, **outcome(found, label, folder)})


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


def part(data: Path, folder: Path, kept: list[int], *, references_alone: bool = False) -> None:
    """Write the shards of some prompts of a folder of trajectories, as if only these had been
    collected; existing shards are kept. `kept` are the prompts, in order."""
    manifest = read_manifest(data)
    stored = [
        load_references(manifest.reference_path_of(data, shard), manifest, shard)
        for shard in range(manifest.shards)
    ]
    tokens = torch.cat([tokens for tokens, _ in stored])[kept]
    several = torch.cat([several for _, several in stored if several is not None])[kept]
    mine = dataclasses.replace(manifest, prompt_count=len(kept))
    folder.mkdir(parents=True, exist_ok=True)
    shards = [s for s in range(mine.shards) if not mine.reference_path_of(folder, s).is_file()]
    for shard in shards:
        rows = slice(shard * SHARD, (shard + 1) * SHARD)
        of_labels = None if references_alone else several[rows]
        save_references(mine.reference_path_of(folder, shard), tokens[rows], of_labels)
    if references_alone or not mine.missing(folder):
        return
    _, steps = read_trajectories(data)
    new = torch.full((manifest.prompt_count,), -1)
    new[kept] = torch.arange(len(kept))
    steps = dataclasses.replace(steps, prompt=new[steps.prompt])
    for shard in mine.missing(folder):
        within = (steps.prompt >= shard * SHARD) & (steps.prompt < (shard + 1) * SHARD)
        steps.take(within).save(mine.path_of(folder, shard))


@functools.cache
def loaded(model: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    return load_model(model, "cpu")


def unmeasured(rows: Rows) -> list[str]:
    """The names of the cases that lack a learned policy's row, in their order."""
    settings = [(policy, options) for policy, sweep in LEARNED.items() for options in sweep]
    return [
        case.name
        for case in cases()
        if not all(any(_is_of(row, case, *one) for row in rows.rows) for one in settings)
    ]


def _is_of(row: dict[str, Any], case: Case, policy: str, options: dict[str, Any]) -> bool:
    own = f"trained without {', '.join(case.tasks)}:"
    if case.filters is not None:
        own = f"{case.filters}'s shipped"
    return (
        (row["model"], row["gen"], row["policy"]) == (case.model, case.gen, policy)
        and row["options"] == options
        and row["families"] == sorted(case.tasks)
        and row["filter"].startswith(own)
    )


class TimeOver(Exception):
    """The time limit is reached: nothing new is started."""


def main() -> None:
    """Measure, train and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the filters and their trajectories")
    parser.add_argument(
        "--out", type=output, default=RESULTS, help="the rows; the table is written next to them"
    )
    parser.add_argument("--only", action="append", default=[], help="cases with this in the name")
    parser.add_argument("--limit", type=positive, default=600, help="held-out prompts of all tasks")
    parser.add_argument("--train-prompts", type=positive, default=1000)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument(
        "--minutes", type=amount, default=600.0, help="start nothing new after these"
    )
    parser.add_argument("--render", action="store_true", help="only make the table")
    parser.add_argument("--quick", action="store_true", help="few settings, 32 tokens, few epochs")
    arguments = parser.parse_args()
    rows = Rows(arguments.out)
    table = arguments.out.with_suffix(".md")
    if arguments.render:
        table.write_text(render(rows.rows, unmeasured(rows)), encoding="utf-8")
        return
    if arguments.work is None:
        raise L2PDError("--work: missing; expected the folder of filters and trajectories")
    if arguments.limit < 1 or arguments.train_prompts < 2 or arguments.rounds < 1:
        raise L2PDError(
            "--limit, --train-prompts, --rounds: expected whole numbers from 1, 2 and 1"
        )
    chosen = list(chosen_cases(arguments.only))
    torch.set_num_threads(1)
    quick = arguments.quick
    bench = Bench(
        rows, arguments.work, arguments.limit, arguments.train_prompts, arguments.rounds,
        arguments.batch_size, 32 if quick else None, time.time() + 60 * arguments.minutes,
        3 if quick else None,
    )  # fmt: skip
    learned = {name: sweep[: 1 if quick else None] for name, sweep in LEARNED.items()}
    with contextlib.suppress(TimeOver):
        for case in chosen:
            bench.measure(case, CONTROL[: 1 if quick else None], learned)
            table.write_text(render(rows.rows, unmeasured(rows)), encoding="utf-8")
    table.write_text(render(rows.rows, unmeasured(rows)), encoding="utf-8")
    print(table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
