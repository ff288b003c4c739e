"""The paper's protocol: speed-up against one token per step at several lengths, with each cache.

    python benchmarks/protocol.py --policy settled --policy confidence_threshold --out FILE
    python benchmarks/protocol.py --lengths 1024 --limit 4 --checked 60 --out /tmp/protocol

Learn2PD (arXiv 2509.25188) compares with a baseline that decodes every position of the canvas, one
token per step, including the end-of-text padding. Each row here is compared with that baseline, and
with one that stops at the end of text ("aware"); both have one token per step, block 32, no cache.
The timed prompts are the first `--limit`, one at a time. The aware baseline and every policy with
every cache run in turns, `--repeats` times; each turn is compared with the aware baseline of the
same turn, so that a disturbance shows as a spread. The paper's baseline is slow and runs once,
before the others; its prompts take about the same time, so their spread shows disturbances.

The share of valid answers (for prompts with checkers), and the shares that equal the answers at one
token per step and without a cache, are measured on `--checked` prompts, in batches. The answers of
the paper's baseline are scored with the cache that `--score-baseline` names, since without a cache
they would take hours. The script runs on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import Times, device_of, output, positive, run_script, write
from rich.console import Console

from l2pd_adapters.families import CACHES
from l2pd_adapters.huggingface.enabling import configuration_of
from l2pd_adapters.huggingface.models.model_info import family_of, is_masked_lm
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import create_policy
from l2pd_plugins.writing import write_text
from l2pd_tools.evaluation.intervals import validity_difference
from l2pd_tools.evaluation.prompts import Prompt, read_prompts
from l2pd_tools.evaluation.results import Evaluation
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.loading import load_model
from l2pd_tools.policy_text import parse_policy
from l2pd_tools.tiny_world import TASKS

BASELINE = "fixed_schedule"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--prompts", type=Path, default=heldout_prompts())
    parser.add_argument(
        "--limit", type=positive, default=12, help="prompts that are timed, one by one"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="turns of the clock")
    parser.add_argument(
        "--checked", type=positive, default=300, help="prompts whose answers are scored"
    )
    parser.add_argument("--policy", action="append", default=None)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--caches", nargs="+", help="default: all caches of the model")
    parser.add_argument("--score-baseline", metavar="CACHE", help="default: it is not scored")
    parser.add_argument("--out", type=output, required=True, help="path without a suffix")
    arguments = parser.parse_args()

    policies = [create_policy(parse_policy(text)) for text in arguments.policy or ["learn2pd"]]
    timed = read_prompts(arguments.prompts, arguments.limit, tasks=TASKS)
    checked = read_prompts(arguments.prompts, arguments.checked, tasks=TASKS)
    device = device_of(arguments.device)
    model, tokenizer = load_model(arguments.model, str(device))
    choices = ("none",) if is_masked_lm(model) else CACHES[family_of(model).attention]
    caches = arguments.caches or sorted(choices, key=("none", "prefix", "dual", "block").index)
    for cache in {*caches, arguments.score_baseline} - {None, *choices}:
        parser.error(f"{arguments.model} has no cache {cache!r}; choose from {', '.join(choices)}")
    for length, policy in itertools.product(arguments.lengths, [BASELINE, *policies]):
        configuration_of(model, unmask_policy=policy, max_new_tokens=length)  # refused at once
    console = Console(stderr=True, soft_wrap=True)
    rows: list[dict[str, Any]] = []

    def decode(prompts: list[Prompt], policy: Any, batch_size: int, **settings: Any) -> Evaluation:
        found = evaluate(
            model, tokenizer, prompts, policy=policy, batch_size=batch_size, **settings
        )
        console.print(f"{found.seconds:8.1f} s  {found.configuration}")
        return found

    def save() -> None:
        write(arguments.out.with_suffix(".json"), rows, device)
        write_text(arguments.out.with_suffix(".md"), table(rows))

    for length in arguments.lengths:
        off = {"max_new_tokens": length, "cache": "none", "end_of_text": "off"}
        block = {**off, "end_of_text": "block"}
        pairs = list(itertools.product(policies, caches))
        ways = [(BASELINE, block), *((policy, {**block, "cache": c}) for policy, c in pairs)]
        for policy, settings in ways:  # warm up: the first forward passes are slow
            decode(timed[:1], policy, 1, **settings)
        paper = decode(timed, BASELINE, 1, **off)
        turns: list[list[Evaluation]] = [[] for _ in ways]
        aware = turns[0]
        for _ in range(arguments.repeats):
            for (policy, settings), found in zip(ways, turns, strict=True):
                # For a policy that requires a reference, whose decode is not its own time.
                reference = aware[0].answers if aware else None
                found.append(decode(timed, policy, 1, reference_answers=reference, **settings))
        begin = len(rows)
        rows += [clocked(length, found, paper, aware) for found in ([paper], *turns)]
        save()

        slow = decode(checked, BASELINE, 16, **block)
        if arguments.score_baseline:
            cached = {**off, "cache": arguments.score_baseline}
            whole = decode(checked, BASELINE, 16, reference_answers=slow.answers, **cached)
            rows[begin].update(scored(whole, slow))
        rows[begin + 1].update(scored(slow, slow))
        uncached: dict[str, Evaluation] = {}
        for row, (policy, cache) in zip(rows[begin + 2 :], pairs, strict=True):
            given = {**block, "reference_answers": slow.answers}
            name = policy.describe()
            if name not in uncached:
                uncached[name] = decode(checked, policy, 16, **given)
            answers = uncached[name]
            if cache != "none":
                answers = decode(checked, policy, 16, **{**given, "cache": cache})
            row.update(scored(answers, slow, uncached[name]))
            save()
    print(table(rows))


def clocked(
    length: int, turns: Sequence[Evaluation], paper: Evaluation, aware: Sequence[Evaluation]
) -> dict[str, Any]:
    """One row without scores, as plain values: the same prompts in every turn, compared with both
    baselines. A single turn is compared with every turn of the aware baseline."""
    seconds = Times(tuple(found.seconds for found in turns))
    of_each = [answer.seconds for found in turns for answer in found.answers]
    beside = seconds if len(turns) == len(aware) else Times(seconds.values * len(aware))
    wall = Times((paper.seconds,) * len(turns)).over(seconds)
    aware_wall = Times(tuple(found.seconds for found in aware)).over(beside)
    nfe = turns[0].nfe
    return {
        "length": length,
        "nfe": nfe,
        "seconds": seconds.median,
        "seconds_spread": seconds.spread,
        "seconds_of_turns": seconds.values,
        "seconds_per_prompt": {
            "min": min(of_each),
            "median": statistics.median(of_each),
            "max": max(of_each),
        },
        "timed_prompts": len(paper.answers),
        "nfe_speedup": paper.nfe / nfe,
        "wall_speedup": wall.median,
        "wall_speedup_spread": wall.spread,
        "aware_nfe_speedup": aware[0].nfe / nfe,
        "aware_wall_speedup": aware_wall.median,
        "aware_wall_speedup_spread": aware_wall.spread,
        "configuration": turns[0].configuration,
    }


def scored(
    answers: Evaluation, slow: Evaluation, uncached: Evaluation | None = None
) -> dict[str, Any]:
    """The scores of a row's answers, compared with those at one token per step and, if there is a
    cache, with those without it; None for scores that do not apply."""
    difference = validity_difference(answers, slow)
    without = None
    if uncached is not None and answers is not uncached:
        without = replace(answers, reference_answers=uncached.answers).agreement
    return {
        "validity": answers.validity,
        "scored_prompts": len(answers.answers),
        "difference": difference and difference.difference,
        "low": difference and difference.low,
        "high": difference and difference.high,
        "agreement": 1.0 if answers is slow else answers.agreement,
        "agreement_with_no_cache": without,
        "scored_configuration": answers.configuration,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    baselines: list[str] = []
    lines = [
        "| gen | policy | cache | end of text | valid | against one per step "
        "| agrees with one per step | agrees with no cache | NFE | seconds | NFE x | wall x "
        "| aware: NFE x | wall x |",
        "|---:|---|---|---|---:|---|---:|---:|---:|---|---:|---:|---:|---|",
    ]
    for row in rows:
        line = row["configuration"]
        policy = re.sub(r".* policy=(.*?\)) .*", r"\1", line)
        policy = re.sub(r"filter=[^,]+, ", "", policy)
        words = dict(part.split("=", 1) for part in line.split() if "=" in part)
        valid, agrees, same = (
            "" if row.get(key) is None else f"{100 * row[key]:.1f}"
            for key in ("validity", "agreement", "agreement_with_no_cache")
        )
        change = ""
        if row.get("difference") is not None:
            points = [100 * row[end] for end in ("difference", "low", "high")]
            change = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)
        several = len(row["seconds_of_turns"]) > 1
        seconds = "{:.2f}".format(row["seconds"])
        seconds += " [{:.2f}, {:.2f}]".format(*row["seconds_spread"]) if several else ""
        aware = "{:.2f} [{:.2f}, {:.2f}]".format(
            row["aware_wall_speedup"], *row["aware_wall_speedup_spread"]
        )
        lines.append(
            f"| {row['length']} | `{policy}` | {words['cache']} | {words['end_of_text']} "
            f"| {valid} | {change} | {agrees} | {same} "
            f"| {row['nfe']:.1f} | {seconds} "
            f"| {row['nfe_speedup']:.2f} | {row['wall_speedup']:.2f} "
            f"| {row['aware_nfe_speedup']:.2f} | {aware} |"
        )
        if words["end_of_text"] == "off":
            each = "{median:.3g} [{min:.3g}, {max:.3g}]".format(**row["seconds_per_prompt"])
            baselines.append(f"{each} at {row['length']}")
    lines += [
        "",
        f"Seconds and speed-ups are medians of {len(rows[1]['seconds_of_turns'])} turns "
        "[least, most], the last column's taken turn by turn. The paper's baseline ran once, "
        f"before them; its seconds of a prompt: {'; '.join(baselines)}.",
        "",
        f"First row: `{rows[0]['configuration']}`",
    ]
    if "scored_configuration" in rows[0]:
        lines += [
            "",
            "Its answers were scored, and compared with those of the second row, with "
            f"`{rows[0]['scored_configuration']}`",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
