"""The paper's protocol: speed-up against one token per step at several lengths, with each cache.

    python benchmarks/protocol.py --policy settled --policy confidence_threshold --out FILE
    python benchmarks/protocol.py --lengths 1024 --limit 4 --checked 60 --out /tmp/protocol

Learn2PD (arXiv 2509.25188) compares with a baseline that decodes every position of the canvas, one
token per step, end-of-text padding included. Each row here is compared with that baseline, and with
one that knows about the end of text: both one token per step, block 32, no cache. The paper's
baseline is slow, so the clock runs on `--limit` prompts, one at a time; how many answers are valid,
and how many equal those without a cache, is measured on `--checked` prompts, in batches. The
answers of the paper's baseline are scored with the cache that `--score-baseline` names, since
without one it takes hours.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from measuring import write
from rich.console import Console

from l2pd_adapters.cli.arguments import parse_policy
from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.described import family_of
from l2pd_adapters.huggingface.evaluation import (
    Evaluation,
    Prompt,
    evaluate,
    read_prompts,
    validity_difference,
)
from l2pd_adapters.huggingface.forward import CACHES
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import create_policy

BASELINE = "fixed_schedule"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--prompts", type=Path, default=heldout_prompts())
    parser.add_argument("--limit", type=int, default=12, help="prompts that are timed, one by one")
    parser.add_argument("--checked", type=int, default=300, help="prompts whose answers are scored")
    parser.add_argument("--policy", action="append", default=None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--caches", nargs="+", help="default: all that the model has")
    parser.add_argument("--score-baseline", metavar="CACHE", help="default: it is not scored")
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    arguments = parser.parse_args()

    policies = [create_policy(parse_policy(text)) for text in arguments.policy or ["learn2pd"]]
    model, tokenizer = load(arguments.model)
    choices = CACHES[family_of(model).attention]
    caches = arguments.caches or sorted(choices, key=("none", "prefix", "dual", "block").index)
    for cache in {*caches, arguments.score_baseline} - {None, *choices}:
        parser.error(f"{arguments.model} has no cache {cache!r}; choose from {', '.join(choices)}")
    timed = read_prompts(arguments.prompts, arguments.limit)
    checked = read_prompts(arguments.prompts, arguments.checked)
    console = Console(stderr=True, soft_wrap=True)
    rows: list[dict[str, Any]] = []

    def run(prompts: list[Prompt], policy: Any, batch_size: int, **settings: Any) -> Evaluation:
        found = evaluate(
            model, tokenizer, prompts, policy=policy, batch_size=batch_size, **settings
        )
        console.print(f"{found.seconds:8.1f} s  {found.configuration}")
        return found

    for length in arguments.lengths:
        off = {"max_new_tokens": length, "cache": "none", "end_of_text": "off"}
        block = {**off, "end_of_text": "block"}
        run(timed[:1], BASELINE, 1, **block)  # nobody pays for the first forward passes
        paper = run(timed, BASELINE, 1, **off)
        aware = run(timed, BASELINE, 1, **block)
        slow = run(checked, BASELINE, 16, **block)
        whole = None
        if arguments.score_baseline:
            cached = {**off, "cache": arguments.score_baseline}
            whole = run(checked, BASELINE, 16, reference_answers=slow.answers, **cached)
        rows.append(describe(length, paper, paper, aware, whole, slow))
        rows.append(describe(length, aware, paper, aware, slow, slow))
        for policy in policies:
            uncached = run(checked, policy, 16, **block)
            for cache in caches:
                settings = {**block, "cache": cache}
                clock = run(timed, policy, 1, **settings)
                answers = uncached
                if cache != "none":
                    reference = uncached.answers
                    answers = run(checked, policy, 16, reference_answers=reference, **settings)
                rows.append(describe(length, clock, paper, aware, answers, slow))
        text = table(rows)
        write(arguments.out.with_suffix(".json"), rows)
        arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def describe(
    length: int,
    clock: Evaluation,
    paper: Evaluation,
    aware: Evaluation,
    answers: Evaluation | None,
    slow: Evaluation,
) -> dict[str, Any]:
    """One row, as plain values: `clock`, `paper` and `aware` on the timed prompts, `answers` (None
    if they were not scored) and `slow` on those that are scored."""
    scores = {}
    if answers is not None:
        difference = validity_difference(answers, slow)
        assert difference is not None  # the prompts have checkers
        scores = {
            "validity": answers.validity,
            "scored_prompts": len(answers.answers),
            "difference": difference.difference,
            "low": difference.low,
            "high": difference.high,
            "agreement_with_no_cache": answers.agreement,
            "scored_configuration": answers.configuration,
        }
    return {
        "length": length,
        "nfe": clock.nfe,
        "seconds": clock.seconds,
        "timed_prompts": len(clock.answers),
        "nfe_speedup": paper.nfe / clock.nfe,
        "wall_speedup": paper.seconds / clock.seconds,
        "aware_nfe_speedup": aware.nfe / clock.nfe,
        "aware_wall_speedup": aware.seconds / clock.seconds,
        **scores,
        "configuration": clock.configuration,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| gen | policy | cache | end of text | valid | against one per step "
        "| agrees with no cache | NFE | seconds | NFE x | wall x | aware: NFE x | wall x |",
        "|---:|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        line = row["configuration"]
        policy = re.sub(r".* policy=(.*?\)) .*", r"\1", line)
        policy = re.sub(r"filter=[^,]+, ", "", policy)
        words = dict(part.split("=", 1) for part in line.split() if "=" in part)
        valid = change = agreement = ""
        if "validity" in row:
            valid = f"{100 * row['validity']:.1f}"
            points = [100 * row[end] for end in ("difference", "low", "high")]
            change = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)
        if row.get("agreement_with_no_cache") is not None:
            agreement = f"{100 * row['agreement_with_no_cache']:.1f}"
        lines.append(
            f"| {row['length']} | `{policy}` | {words['cache']} | {words['end_of_text']} "
            f"| {valid} | {change} | {agreement} "
            f"| {row['nfe']:.1f} | {row['seconds']:.1f} "
            f"| {row['nfe_speedup']:.2f} | {row['wall_speedup']:.2f} "
            f"| {row['aware_nfe_speedup']:.2f} | {row['aware_wall_speedup']:.2f} |"
        )
    lines += ["", f"First row: `{rows[0]['configuration']}`"]
    if "scored_configuration" in rows[0]:
        lines += [
            "",
            "Its answers were scored, and compared with those of the second row, with "
            f"`{rows[0]['scored_configuration']}`",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
