"""The accuracy-speed frontier of every policy on the small models, everything else equal.

    make frontier                                                  # 2,000 prompts, under 30 minutes
    python benchmarks/frontier.py --limit 60 --out /tmp/frontier   # .json and .png, a quick look
    python benchmarks/frontier.py --model tiny-llada --policy cora --policy credit --out FILE
    python benchmarks/frontier.py --setting settled,risk=0.05 --setting settled,risk=0.1 --out FILE

Each setting is a point: validity by the checkers against tokens per forward (TPF), with its paired
95 % interval against one token per step, and agreement with those answers. Settings are taken in
rounds, the first of every policy before the second of any, and the run stops beginning new ones
when `--minutes` are over; what was not measured is in the JSON and is printed, with the reason.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import pickle
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import environment
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from safetensors.torch import save_file

from l2pd_adapters.cli.arguments import parse_policy
from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.evaluation import (
    Evaluation,
    Prompt,
    encode_prompts,
    evaluate,
    read_prompts,
)
from l2pd_adapters.huggingface.frontier import Point, draw, on_frontier
from l2pd_adapters.tiny_models import folder_of, heldout_prompts, training_prompts
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_plugins.plugins import find_policy

MODELS = {"tiny-llada": "dual", "tiny-sdar": "block"}
"""Each model with its cache. tiny-llada gives the same answers without one, and takes longer."""
REFERENCE = "fixed_schedule"


def thresholds(*values: float) -> list[dict[str, Any]]:
    """A setting for each value of the option that most policies have."""
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
    "dream_margin": [{"tokens_per_step": 4}],
    "dream_entropy": [{"tokens_per_step": 4}],
    "pc_sampler": [{"tokens_per_step": 4}],
    "saber": [{}],
}
"""The settings of each policy, the default first. A policy that takes many steps has one: another
would cost as much as several of others."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(MODELS), help="these alone")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--policy", action="append", choices=list(SWEEPS), help="these alone")
    which.add_argument("--setting", action="append", help="NAME,key=value,...: these instead")
    parser.add_argument("--prompts", type=Path, default=heldout_prompts())
    parser.add_argument("--limit", type=int, default=2000, help="only the first prompts")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=26.0, help="begin nothing new after these")
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    arguments = parser.parse_args()

    models = arguments.model or list(MODELS)
    chosen = {name: SWEEPS[name] for name in arguments.policy or SWEEPS}
    if arguments.setting:
        chosen = {}
        for text in arguments.setting:
            options = parse_policy(text)
            chosen.setdefault(find_policy(options.pop("name")).name, []).append(options)
    prompts = read_prompts(arguments.prompts, arguments.limit)
    settings = {"max_new_tokens": arguments.max_new_tokens, "batch_size": arguments.batch_size}
    run = Run(models, chosen, prompts, settings)
    run.measure(arguments.workers, arguments.minutes)
    found = {
        "environment": environment() | {"workers": arguments.workers, "seconds": run.seconds},
        "prompts_file": arguments.prompts.name,
        "prompts": len(prompts),
        "models": run.as_json(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
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
    ) -> None:
        self.models, self.sweeps = models, sweeps
        self.prompts, self.settings = prompts, settings
        self.references: dict[str, Point] = {}
        self.points: dict[str, list[Point]] = {model: [] for model in models}
        self.missing: dict[str, list[dict[str, str]]] = {model: [] for model in models}
        """Settings that were not measured, and why."""
        self.seconds = 0.0

    def measure(self, workers: int, minutes: float) -> None:
        """Decode one token per step on every model, and then everything else."""
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
            job = Job(self.prompts, self.settings, Path(folder), began + 60 * minutes)
            for model, (name, sweep) in itertools.product(self.models, self.sweeps.items()):
                for options in sweep:
                    job.policy(model, name, options)  # a misspelt one ends the run here
            first, *later = self._rounds()
            total = len(self.models) * (1 + sum(map(len, (first, *later))))
            advance = functools.partial(bar.advance, bar.add_task("decoding", total=total))
            futures: dict[Future[Point | str], Setting] = {}

            def submit(settings: list[tuple[str, dict[str, Any]]], models: list[str]) -> None:
                for name, options in settings:
                    for model in models:
                        item = (model, name, options)
                        futures[pool.submit(job.decode, *item)] = item

            slow = {pool.submit(job.decode_slowly, model): model for model in self.models}
            for future in as_completed(slow):  # while one model is slow, the other goes on
                self.references[slow[future]] = future.result()
                submit(first, [slow[future]])
                advance()
            for settings in later:
                submit(settings, self.models)
            for done in as_completed(futures):
                self._take(futures[done], done.result())
                advance()
        self.seconds = time.time() - began

    def as_json(self) -> dict[str, Any]:
        """Everything that was found, by model; points in the order of their policies."""
        order = list(self.sweeps)
        return {
            model: {
                "reference": asdict(self.references[model]),
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

    def _take(self, setting: Setting, answer: Point | str) -> None:
        model, name, options = setting
        if isinstance(answer, Point):
            self.points[model].append(answer)
        else:
            self.missing[model].append({"policy": name, "options": options, "reason": answer})


@dataclass(frozen=True)
class Job:
    """What a process is sent."""

    prompts: list[Prompt]
    settings: dict[str, Any]
    folder: Path
    """Where the references lie, and what policies read from files."""
    deadline: float
    """Seconds of `time.time` after which nothing new is begun."""

    def decode_slowly(self, model: str) -> Point:
        """One token per step; the answers are kept for the others to compare with."""
        policy = create_policy(REFERENCE)
        found = evaluate(*loaded(model), self.prompts, policy=policy, **self._settings(model))
        self._reference(model).write_bytes(pickle.dumps(found))
        return Point.of(policy, found, found)

    def decode(self, model: str, name: str, options: dict[str, Any]) -> Point | str:
        """One setting, or why it could not be measured."""
        if time.time() > self.deadline:
            return "the time was over"
        slow: Evaluation = pickle.loads(self._reference(model).read_bytes())
        policy = self.policy(model, name, options)
        try:
            found = evaluate(
                *loaded(model),
                self.prompts,
                policy=policy,
                reference_answers=slow.answers,
                **self._settings(model),
            )
        except L2PDError as error:  # such as a policy without a filter for this model
            return str(error).replace(str(folder_of(model)), model)
        point = Point.of(policy, found, slow)
        return replace(
            point,
            options={k: v for k, v in point.options.items() if k != "frequencies"},
            configuration=point.configuration.replace(f"{self.folder}/", ""),
        )

    def policy(self, model: str, name: str, options: dict[str, Any]) -> UnmaskPolicy:
        """The policy of a setting. Raises L2PDError if there is no such policy or option."""
        files = {"frequencies": self._frequencies(model)} if name == "pc_sampler" else {}
        return create_policy(name, **{**files, **options})

    def _settings(self, model: str) -> dict[str, Any]:
        return {**self.settings, "cache": MODELS[model]}

    def _reference(self, model: str) -> Path:
        return self.folder / f"{model}.pickle"

    def _frequencies(self, model: str) -> str:
        """A table for pc_sampler: how often each token stands in the training prompts, plus one."""
        file = self.folder / f"{model}.safetensors"
        loaded_model, tokenizer = loaded(model)
        tokens = torch.cat(encode_prompts(tokenizer, read_prompts(training_prompts())))
        counts = torch.bincount(tokens, minlength=loaded_model.config.vocab_size) + 1
        save_file({"frequencies": counts / counts.sum()}, file)
        return str(file)


@functools.cache
def loaded(model: str) -> tuple[Any, Any]:
    """A model and its tokenizer, once in each process."""
    return load(model)


def report(run: Run) -> None:
    """Print the points that no other setting beats, and what is missing."""
    for model in run.models:
        print(f"\n{model}: on the frontier, of {len(run.points[model])} settings")
        for point in on_frontier([p for p in run.points[model] if p.policy != "oracle"]):
            print(
                f"  TPF {point.tokens_per_forward:5.2f}  valid {100 * point.quality:5.1f}  "
                f"{point.configuration}"
            )
        for gap in run.missing[model]:
            print(f"  not measured: {gap['policy']} {gap['options']}: {gap['reason']}")
    print(f"\n{run.seconds:.0f} s")


if __name__ == "__main__":
    main()
