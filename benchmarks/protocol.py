"""The paper's protocol: speed-up against one token per step at several lengths, with each cache.

    python benchmarks/protocol.py --policy settled --lengths 128 256 512 1024 --limit 32 --out FILE

Learn2PD (arXiv 2509.25188) compares with a baseline that decodes every position of the canvas, one
token per step, end-of-text padding included. Each row here is compared with that baseline, and with
one that knows about the end of text: both one token per step, block 32, no cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from l2pd_adapters.cli.arguments import parse_policy
from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.evaluation import (
    Evaluation,
    evaluate,
    read_prompts,
    validity_difference,
)
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import create_policy


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--prompts", type=Path, default=heldout_prompts())
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--policy", action="append", default=None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--caches", nargs="+", default=["none", "prefix", "dual"])
    parser.add_argument("--batch-size", type=int, default=1, help="the paper decodes one by one")
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    arguments = parser.parse_args()

    policies = [create_policy(parse_policy(text)) for text in arguments.policy or ["learn2pd"]]
    model, tokenizer = load(arguments.model)
    prompts = read_prompts(arguments.prompts, arguments.limit)
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for length in arguments.lengths:

        def run(policy: Any, length: int = length, **settings: Any) -> Evaluation:
            found = evaluate(
                model,
                tokenizer,
                prompts,
                policy=policy,
                max_new_tokens=length,
                batch_size=arguments.batch_size,
                **settings,
            )
            console.print(f"{found.seconds:8.1f} s  {found.configuration}")
            return found

        run("fixed_schedule", end_of_text="block")  # nobody pays for the first forward passes
        aware = run("fixed_schedule", end_of_text="block")
        paper = run("fixed_schedule", end_of_text="off")
        rows += [describe(length, paper, paper, aware), describe(length, aware, paper, aware)]
        for policy in policies:
            for cache in arguments.caches:
                rows.append(describe(length, run(policy, cache=cache), paper, aware))
        text = table(rows)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
        arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


def describe(
    length: int, found: Evaluation, paper: Evaluation, aware: Evaluation
) -> dict[str, Any]:
    """One row, as plain values."""
    against_paper, against_aware = (validity_difference(found, other) for other in (paper, aware))
    assert against_paper is not None and against_aware is not None
    return {
        "length": length,
        "nfe_speedup": paper.nfe / found.nfe,
        "wall_speedup": paper.seconds / found.seconds,
        "difference": against_paper.difference,
        "low": against_paper.low,
        "high": against_paper.high,
        "aware_nfe_speedup": aware.nfe / found.nfe,
        "aware_wall_speedup": aware.seconds / found.seconds,
        "aware_difference": against_aware.difference,
        **found.summary(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| gen | policy, cache, end of text | valid | vs paper's baseline | NFE | seconds "
        "| NFE x | wall x | aware: NFE x | wall x |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        words = dict(part.split("=", 1) for part in row["configuration"].split() if "=" in part)
        label = f"{words['policy']}, {words['cache']}, {words['end_of_text']}"
        change = (
            f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        )
        lines.append(
            f"| {row['length']} | {label} | {row['validity']:.3f} | {change} | {row['nfe']:.1f} "
            f"| {row['seconds']:.1f} | {row['nfe_speedup']:.2f} | {row['wall_speedup']:.2f} "
            f"| {row['aware_nfe_speedup']:.2f} | {row['aware_wall_speedup']:.2f} |"
        )
    lines += ["", f"First row: `{rows[0]['configuration']}`"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
