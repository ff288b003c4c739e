"""Measure the accuracy-speed frontier of every policy on any models, everything else being equal.

    make frontier                                                  # 2,000 prompts, under 30 minutes
    python benchmarks/frontier.py --limit 60 --out /tmp/frontier   # .json and .png, a quick look
    python benchmarks/frontier.py --model tiny-llada --policy cora --policy credit --out FILE
    python benchmarks/frontier.py --setting settled,risk=0.05 --setting settled,risk=0.1 --out FILE
    python benchmarks/frontier.py --model GSAI-ML/LLaDA-8B-Instruct --prompts FILE --limit 100 \
        --max-new-tokens 256 --minutes 600 --out FILE

Each setting is a point: tokens per forward (TPF) and validity by the checkers, with a paired 95 %
interval of the loss compared with one token per step, and agreement with the answers at one token
per step. Without checkers, only agreement is measured. Settings are measured in rounds: the first
setting of every policy, then the second ones, and so on. When `--minutes` are over, no new setting
is started; settings that were not measured are in the JSON and are printed, with the reason. The
JSON is written after every point. The script runs on the GPU if there is one.

`pc_sampler` needs the frequencies of tokens in a corpus like the model's. For the small models they
are counted in the training prompts. For other models these counts are useless, since nearly the
whole vocabulary would count as equally rare. There `pc_sampler` is measured only if frequencies are
given: `--setting pc_sampler,frequencies=FILE,tokens_per_step=4`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from frontier_worker import Job
from measuring import amount, device_of, environment, output, positive, run_script
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from l2pd_adapters.checkpoints import resolve_model
from l2pd_adapters.tiny_models import (
    heldout_prompts,
)
from l2pd_plugins import L2PDError, create_policy
from l2pd_plugins.plugins import find_policy
from l2pd_plugins.writing import write_text
from l2pd_tools.evaluation.frontier import Point, draw, on_frontier, require_matplotlib
from l2pd_tools.evaluation.prompts import Prompt, read_prompts
from l2pd_tools.policy_text import parse_policy
from l2pd_tools.tiny_world import TASKS

SMALL = ("tiny-llada", "tiny-sdar")


def thresholds(*values: float) -> list[dict[str, Any]]:
    """One setting for each value of `threshold`, the option that most policies have."""
    return [{"threshold": value} for value in values]


SWEEPS: dict[str, list[dict[str, Any]]] = {
    "confidence_threshold": thresholds(0.9, 0.7, 0.8),
    "fast_dllm_factor": [{}, {"factor": 2.0}],
    "frechet": [{}, {"delta": 0.0}],
    "eb_sampler": [{}, {"gamma": 0.5}],
    "klass": [{}],
    "credit": thresholds(0.9, 0.7),
    "cora": thresholds(0.65, 0.9),
    "local_leap": thresholds(0.75, 0.5),
    "hierarchy": [{}, {"low_threshold": 0.7}],
    "leftmost_threshold": thresholds(0.9, 0.7),
    "ccd": [{}],
    "sched": [{}, {"high": 10.0, "low": 5.0}],
    "llada2_edit": thresholds(0.7, 0.9),
    "learn2pd": [{}, *thresholds(0.9)],
    "settled": [{}, {"risk": 0.2}, {"risk": 0.05}],
    "transformer_sampler": [{}],
    "oracle": [{}],
    "fixed_schedule": [{"tokens_per_step": 4}],
    "random_order": [{"tokens_per_step": 4}],
    "dream_confidence": [{"tokens_per_step": 4}],
    "dream_margin": [{"tokens_per_step": 4}],
    "dream_entropy": [{"tokens_per_step": 4}],
    "pc_sampler": [{"tokens_per_step": 4}],
    "saber": [{}],
}
"""The settings of each policy, the default first. A policy that takes many steps has one setting:
another one would cost as much as several settings of other policies."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="these instead of both small ones")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--policy", action="append", choices=list(SWEEPS), help="only these")
    which.add_argument("--setting", action="append", help="NAME,key=value,...: these instead")
    parser.add_argument("--prompts", type=Path, default=heldout_prompts())
    parser.add_argument("--limit", type=positive, default=2000, help="only the first prompts")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument(
        "--workers",
        type=positive,
        help="processes, each with one thread and its own weights; default: 2 on the CPU, else 1",
    )
    parser.add_argument(
        "--minutes", type=amount, default=26.0, help="start nothing new after these"
    )
    parser.add_argument("--out", type=output, required=True, help="path without a suffix")
    arguments = parser.parse_args()

    require_matplotlib()
    device = device_of(arguments.device)
    workers = arguments.workers or (2 if device.type == "cpu" else 1)
    models = list(dict.fromkeys(arguments.model or SMALL))
    chosen = {name: SWEEPS[name] for name in arguments.policy or SWEEPS}
    if arguments.setting:
        chosen = {}
        for text in arguments.setting:
            options = parse_policy(text)
            chosen.setdefault(find_policy(options.pop("name")).name, []).append(options)
    for model in models:
        resolve_model(model)  # a misspelt one ends the run before any weights load
    for name, sweep in chosen.items():
        for options in sweep:
            if name != "pc_sampler":  # which cannot be made without a model's frequencies
                create_policy(name, **options)  # likewise
    prompts = read_prompts(arguments.prompts, arguments.limit, tasks=TASKS)
    settings = {"max_new_tokens": arguments.max_new_tokens, "batch_size": arguments.batch_size}
    run = Run(models, chosen, prompts, settings, str(device), strict=bool(arguments.setting))

    def save() -> None:
        own = {"threads": 1, "workers": workers, "seconds": run.seconds}  # of the processes
        found = {
            "environment": environment(device) | own,
            "prompts_file": arguments.prompts.name,
            "prompts": len(prompts),
            "models": run.as_json(),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")

    run.measure(workers, arguments.minutes, save)
    draw(
        {model: [run.references[model], *points] for model, points in run.points.items()},
        arguments.out.with_suffix(".png"),
    )
    report(run)


Setting = tuple[str, str, dict[str, Any]]
"""Model, policy, options."""


class Run:
    """Every setting on every model, spread over processes: threads help small models little."""

    def __init__(
        self,
        models: list[str],
        sweeps: dict[str, list[dict[str, Any]]],
        prompts: list[Prompt],
        settings: dict[str, Any],
        device: str,
        *,
        strict: bool,
    ) -> None:
        self.models, self.sweeps = models, sweeps
        self.prompts, self.settings, self.device = prompts, settings, device
        self.strict = strict
        """Whether a setting that a model cannot be decoded with ends the run, and is not just
        missing."""
        self.references: dict[str, Point] = {}
        self.points: dict[str, list[Point]] = {model: [] for model in models}
        self.missing: dict[str, list[dict[str, str]]] = {model: [] for model in models}
        """Settings that were not measured, and why."""
        self.seconds = 0.0

    def measure(self, workers: int, minutes: float, save: Callable[[], None]) -> None:
        """Decode one token per step on every model, and then everything else; `save` is called
        whenever something was found. Raises L2PDError before anything is decoded if there is no
        such model, or nothing to decode on it."""
        began = time.time()
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            workers, context, initializer=torch.set_num_threads, initargs=(1,)
        )
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        with (
            tempfile.TemporaryDirectory() as folder,
            pool,
            Progress(*columns, console=Console(stderr=True)) as bar,
        ):
            job = Job(
                self.prompts,
                self.settings,
                self.device,
                Path(folder),
                deadline=began + 60 * minutes,
            )
            first, *later = self._rounds()
            refused = self._refused(
                pool, job, [item for items in (first, *later) for item in items]
            )
            total = len(self.models) * (1 + sum(map(len, (first, *later)))) - len(refused)
            advance = functools.partial(bar.advance, bar.add_task("decoding", total=total))
            futures: dict[Future[Point | str], Setting] = {}

            def found() -> None:
                self.seconds = time.time() - began
                save()
                advance()

            def submit(settings: list[tuple[str, dict[str, Any]]], models: list[str]) -> None:
                for name, options in settings:
                    for model in models:
                        item = (model, name, options)
                        if item not in refused:
                            futures[pool.submit(job.decode, *item)] = item

            slow = {pool.submit(job.decode_slowly, model): model for model in self.models}
            for future in as_completed(slow):  # while one model is slow, the other continues
                self.references[slow[future]] = future.result()
                submit(first, [slow[future]])
                found()
            for settings in later:
                submit(settings, self.models)
            for done in as_completed(futures):
                self._take(futures[done], done.result())
                found()

    def as_json(self) -> dict[str, Any]:
        """Everything that was found, by model; points in the order of their policies."""
        order = list(self.sweeps)
        return {
            model: {
                "reference": asdict(self.references[model]) if model in self.references else None,
                "points": [
                    asdict(point)
                    for point in sorted(self.points[model], key=lambda p: order.index(p.policy))
                ],
                "not_measured": self.missing[model],
            }
            for model in self.models
        }

    def _rounds(self) -> list[list[tuple[str, dict[str, Any]]]]:
        """The first settings of all policies, then the second ones, and so on."""
        columns = itertools.zip_longest(*self.sweeps.values())
        return [
            [(name, o) for name, o in zip(self.sweeps, column, strict=True) if o is not None]
            for column in columns
        ]

    def _refused(
        self, pool: ProcessPoolExecutor, job: Job, settings: list[tuple[str, dict[str, Any]]]
    ) -> list[Setting]:
        """The settings that some model cannot be decoded with, which are then missing."""
        refused: list[Setting] = []
        checks = {model: pool.submit(job.refusals, model, settings) for model in self.models}
        for model, check in checks.items():
            for (name, options), reason in zip(settings, check.result(), strict=True):
                if reason is None:
                    continue
                if self.strict:
                    raise L2PDError(f"{model}: {name} {options}: {reason}")
                refused.append((model, name, options))
                self._take(refused[-1], reason)
        if len(refused) == len(settings) * len(self.models):
            reasons = {gap["reason"] for gaps in self.missing.values() for gap in gaps}
            raise L2PDError(f"there is nothing to measure: {'; '.join(sorted(reasons))}")
        return refused

    def _take(self, setting: Setting, answer: Point | str) -> None:
        model, name, options = setting
        if isinstance(answer, Point):
            self.points[model].append(answer)
        else:
            self.missing[model].append({"policy": name, "options": options, "reason": answer})


def report(run: Run) -> None:
    """Print the points that no other setting beats, and what is missing."""
    for model in run.models:
        print(f"\n{model}: on the frontier, of {len(run.points[model])} settings")
        for point in on_frontier([p for p in run.points[model] if p.policy != "oracle"]):
            what = "agrees" if point.validity is None else "valid"
            print(
                f"  TPF {point.tokens_per_forward:5.2f}  {what} {100 * point.quality:5.1f}  "
                f"{point.configuration}"
            )
        for gap in run.missing[model]:
            print(f"  not measured: {gap['policy']} {gap['options']}: {gap['reason']}")
    print(f"\n{run.seconds:.0f} s")


if __name__ == "__main__":
    run_script(main)
