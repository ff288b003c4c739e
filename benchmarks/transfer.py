"""Measure learned policies on tasks, lengths and models that they were not trained on.

    python benchmarks/transfer.py --work runs/transfer                 # hours on one core
    python benchmarks/transfer.py --work runs/transfer --only coupled  # cases with this word
    python benchmarks/transfer.py --work runs/transfer --minutes 60    # start nothing new after
    python benchmarks/transfer.py --render                             # only write the table

Cases, in the order of `transfer_cases`: a small model's own filters on the tasks that they were
trained on; the other small model's filters; longer canvases than the 128 tokens of the training;
and filters trained without some tasks, measured on just those. Such filters are trained by the
recipe of `make filters`, on the first `--train-prompts` training prompts less those of the tasks
left out. With `--rounds 0` they are trained once, on states that all splits share: those of the
starting policies and of the shipped `settled` filter's decisions, which cost one collection. The
committed table was made so, with `--limit 300 --train-prompts 320 --rounds 0 --epochs 20`, and with
`--limit 150` for tiny-sdar.

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
from measuring import amount, count, output, positive, run_script
from transfer_cases import Case, cases, chosen_cases, slug
from transfer_rows import Rows, outcome
from transfer_table import CONTROL, UNTRAINED, render

from l2pd_adapters.tiny_models import folder_of, heldout_prompts, training_prompts
from l2pd_plugins import L2PDError
from l2pd_plugins.trajectories import (
    Manifest,
    load_references,
    read_manifest,
    read_trajectories,
    save_references,
    write_manifest,
)
from l2pd_tools.evaluation.prompts import Prompt, read_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.loading import load_model
from l2pd_tools.policy_text import parse_policy
from l2pd_tools.tiny_world import TASKS
from l2pd_tools.training.collecting import collect
from l2pd_tools.training.rounds import STARTING_POLICIES, recipes, train_filter

RESULTS = Path(__file__).parent / "results" / "transfer.jsonl"
SHARD = 64
"""Prompts of a shard of trajectories."""
THRESHOLDS = [{"threshold": t} for t in (0.9, 0.8, 0.7, 0.95, 0.6)]
GAMMAS = [{"gamma": gamma} for gamma in (0.05, 0.1, 0.02, 0.2)]
"""Settings of `eb_sampler`, which needs no filter."""
ALONE = {"fallback": "none"}
THRESHOLD = {"fallback": "confidence_threshold"}
LEARNED: dict[str, list[dict[str, Any]]] = {
    "settled": [
        {},
        ALONE,
        {"risk": 0.06, **ALONE},
        {"risk": 0.15, **ALONE},
        {"risk": 0.03, **ALONE},
        THRESHOLD,
        {"risk": 0.06},
        {"risk": 0.15},
        {"fallback_gamma": 0.05},
    ],
    "learn2pd": [{}, {"threshold": 0.95}],
}
"""The settings of each policy, the default first."""
FEW = {"settled": 3, "learn2pd": 1}
"""How many of them are decoded with canvases longer than 128 tokens."""


def settings_of(case: Case) -> dict[str, list[dict[str, Any]]]:
    """The settings of the learned policies that a case needs."""
    return {
        policy: sweep[: FEW[policy] if case.gen > 128 else None]
        for policy, sweep in LEARNED.items()
    }


@dataclass(frozen=True)
class Bench:
    """The model and prompts to decode, and the folders of filters and table rows."""

    rows: Rows
    work: Path
    limit: int
    """Held-out prompts of all tasks; a case uses those of its tasks."""
    train_prompts: int
    rounds: int
    """Rounds of each split's own; 0 trains it once, on states that all splits share."""
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
            self._decode(alike, whole, CONTROL, options, None, "")
        for options in GAMMAS[: len(controls)]:
            self._decode(alike, whole, UNTRAINED, options, None, "")
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
        rounds = f"{self.rounds} rounds" if self.rounds else "shared states"
        # The paper's filter has updates of all its states at once, and needs thousands of them.
        epochs = self.epochs if self.rounds or policy == "settled" else None
        label = (
            f"trained without {', '.join(case.tasks)}: {self.train_prompts} prompts less "
            f"theirs, {rounds}" + (f", {epochs} epochs" if epochs else "")
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
        common: dict[str, Any] = {
            "load": lambda: loaded(case.model),
            "prompts": read_prompts(prompts),
            "source": prompts.name,
        }
        if not self.rounds:
            states = place / f"states-{policy}"
            mine = part(data, states, kept, oracle_alone=policy == "learn2pd")
            write_manifest(states, mine)
            train_filter(folder, states, policy=policy, epochs=epochs)
        elif policy == "settled":
            part(data, place / "data" / "round-0", kept)
            train_filter(
                folder, place / "data", policy=policy, rounds=self.rounds, labels="consistent",
                max_new_tokens=self.gen or 128, epochs=epochs, **common,
            )  # fmt: skip
        else:
            part(data, place / "oracle", kept, references_alone=True)
            collect(
                *loaded(case.model), read_prompts(prompts, tasks=TASKS), place / "oracle",
                policies=["oracle"],
                max_new_tokens=self.gen or 128, prompts_per_shard=SHARD, source=prompts.name,
            )  # fmt: skip
            train_filter(folder, place / "oracle", policy=policy, epochs=epochs)
        return folder, label

    def everything(self, case: Case) -> Path:
        """The first round's trajectories of all training prompts; each split has a part. Without
        further rounds, they include states that the shipped filter's decisions reach."""
        folder = self.work / f"{case.model}-{self.train_prompts}-round-0"
        policies: list[Any] = [parse_policy(text) for text in STARTING_POLICIES]
        if not self.rounds:
            folder = folder.with_name(f"{case.model}-{self.train_prompts}-shared")
            policies += [{"name": "settled", **options} for options in recipes()["settled"][2]]
        prompts = read_prompts(training_prompts(), self.train_prompts, tasks=TASKS)
        collect(
            *loaded(case.model), prompts, folder,
            policies=policies,
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


def part(
    data: Path,
    folder: Path,
    kept: list[int],
    *,
    references_alone: bool = False,
    oracle_alone: bool = False,
) -> Manifest:
    """Write the shards of some prompts of a folder of trajectories, as if only these had been
    collected; existing shards are kept. `kept` are the prompts, in order. Returns the manifest,
    which is not written.

    oracle_alone: only the first policy's states, which is the oracle, labelled by the reference.
    The blocks have to begin where the prompt ends.
    """
    manifest = read_manifest(data)
    stored = [
        load_references(manifest.reference_path_of(data, shard), manifest, shard)
        for shard in range(manifest.shards)
    ]
    tokens = torch.cat([tokens for tokens, _ in stored])[kept]
    several = torch.cat([several for _, several in stored if several is not None])[kept]
    mine = dataclasses.replace(manifest, prompt_count=len(kept))
    if oracle_alone:
        mine = dataclasses.replace(mine, policies=mine.policies[:1], labels="reference")
    folder.mkdir(parents=True, exist_ok=True)
    shards = [s for s in range(mine.shards) if not mine.reference_path_of(folder, s).is_file()]
    for shard in shards:
        rows = slice(shard * SHARD, (shard + 1) * SHARD)
        of_labels = None if references_alone else several[rows]
        save_references(mine.reference_path_of(folder, shard), tokens[rows], of_labels)
    if references_alone or not mine.missing(folder):
        return mine
    _, steps = read_trajectories(data)
    new = torch.full((manifest.prompt_count,), -1)
    new[kept] = torch.arange(len(kept))
    if oracle_alone:
        steps = steps.take((steps.policy == 0).nonzero().flatten())
    steps = dataclasses.replace(steps, prompt=new[steps.prompt])
    if oracle_alone:
        steps = steps.take((steps.prompt >= 0).nonzero().flatten())
        length = manifest.block_length
        columns = steps.block.unsqueeze(-1) * length + torch.arange(length)
        wanted = torch.nn.functional.pad(tokens, (0, length), value=-1)
        correct = steps.x0 == wanted[steps.prompt.unsqueeze(-1), columns]
        steps = dataclasses.replace(steps, correct=correct)
    for shard in mine.missing(folder):
        within = (steps.prompt >= shard * SHARD) & (steps.prompt < (shard + 1) * SHARD)
        steps.take(within).save(mine.path_of(folder, shard))
    return mine


@functools.cache
def loaded(model: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    return load_model(model, "cpu")


def unmeasured(rows: Rows) -> list[str]:
    """The names of the cases that lack a learned policy's row, in their order."""
    return [
        case.name
        for case in cases()
        if not all(
            any(_is_of(row, case, policy, options) for row in rows.rows)
            for policy, sweep in settings_of(case).items()
            for options in sweep
        )
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
    parser.add_argument(
        "--rounds",
        type=count,
        default=3,
        help="of each split; 0: train once, on states that all splits share",
    )
    parser.add_argument("--epochs", type=positive, help="of each training (default: the recipe's)")
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
    if arguments.limit < 1 or arguments.train_prompts < 2:
        raise L2PDError("--limit, --train-prompts: expected whole numbers from 1 and 2")
    chosen = list(chosen_cases(arguments.only))
    torch.set_num_threads(1)
    quick = arguments.quick
    bench = Bench(
        rows, arguments.work, arguments.limit, arguments.train_prompts, arguments.rounds,
        arguments.batch_size, 32 if quick else None, time.time() + 60 * arguments.minutes,
        3 if quick else arguments.epochs,
    )  # fmt: skip
    most = 1 if quick else None
    with contextlib.suppress(TimeOver):
        for case in chosen:
            learned = {name: sweep[:most] for name, sweep in settings_of(case).items()}
            bench.measure(case, THRESHOLDS[: 2 if case.gen > 128 else None][:most], learned)
            table.write_text(render(rows.rows, unmeasured(rows)), encoding="utf-8")
    table.write_text(render(rows.rows, unmeasured(rows)), encoding="utf-8")
    print(table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
