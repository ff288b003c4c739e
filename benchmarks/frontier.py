"""The accuracy-speed frontier: every policy with its threshold swept, everything else equal.

    python benchmarks/frontier.py --out benchmarks/results/FILE      # .json, .md and .png
    python benchmarks/frontier.py --model FOLDER --prompts FILE --limit 200 --max-new-tokens 256

Validity by the checkers against tokens per forward (TPF), each point with its paired difference to
one token per step and a 95 % bootstrap interval, overall and per kind of task; agreement with the
one-token-per-step answers beside it.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.evaluation import (
    Evaluation,
    evaluate,
    read_prompts,
    validity_difference,
)
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import create_policy

SWEEPS: dict[str, list[float]] = {
    "confidence_threshold": [0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99],
    "learn2pd": [0.3, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99],
    "settled": [0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995],
}
LOSSES = (0.005, 0.015)
"""Losses of validity, as shares, at which policies are compared."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--prompts", type=Path, default=heldout_prompts())
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--policy", action="append", choices=list(SWEEPS), help="sweep these alone")
    parser.add_argument("--oracle", action="store_true", help="add the oracle")
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    arguments = parser.parse_args()

    chosen = arguments.policy or list(SWEEPS)
    points = [(name, value) for name in chosen for value in SWEEPS[name]]
    model, tokenizer = load(arguments.model)
    prompts = read_prompts(arguments.prompts, arguments.limit)
    settings: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": arguments.batch_size,
    }
    console = Console(stderr=True)
    with Progress(console=console) as bar:
        task = bar.add_task("decoding", total=len(prompts) * (len(points) + 1 + arguments.oracle))

        def run(policy: Any, reference: Evaluation | None) -> Evaluation:
            return evaluate(
                model,
                tokenizer,
                prompts,
                policy=policy,
                reference_answers=None if reference is None else reference.answers,
                progress=lambda count: bar.advance(task, count),
                **settings,
            )

        slow = run("fixed_schedule", None)
        rows = [describe("fixed_schedule", None, slow, slow)]
        for name, value in points:
            fast = run(create_policy(name, threshold=value), slow)
            rows.append(describe(name, value, fast, slow))
            write(arguments.out, rows, chosen)
        if arguments.oracle:
            rows.append(describe("oracle", None, run("oracle", slow), slow))
    print(write(arguments.out, rows, chosen))
    draw(arguments.out.with_suffix(".png"), rows)


def describe(
    policy: str, threshold: float | None, found: Evaluation, slow: Evaluation
) -> dict[str, Any]:
    """One point of the frontier, as plain values."""
    difference = validity_difference(found, slow)
    return {
        "policy": policy,
        "threshold": threshold,
        "difference": None if difference is None else difference.difference,
        "low": None if difference is None else difference.low,
        "high": None if difference is None else difference.high,
        **found.summary(),
    }


def best_within(rows: list[dict[str, Any]], policy: str, loss: float) -> dict[str, Any] | None:
    """The fastest point of a policy that loses at most so much validity."""
    good = [r for r in rows if r["policy"] == policy and r["difference"] >= -loss - 1e-9]
    return max(good, key=lambda row: row["tokens_per_forward"], default=None)


def validity_at(rows: list[dict[str, Any]], policy: str, tpf: float) -> float | None:
    """Validity of a policy at a speed, between the measured points of its curve."""
    curve = sorted((r["tokens_per_forward"], r["validity"]) for r in rows if r["policy"] == policy)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= tpf <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (tpf - x0) / (x1 - x0)
    return None


def write(out: Path, rows: list[dict[str, Any]], policies: list[str]) -> str:
    """Write JSON and a Markdown table; returns the table."""
    kinds = list(rows[0]["by_kind"])
    lines = [
        f"| policy | threshold | valid | {' | '.join(kinds)} "
        "| vs one a step (95 %) | agree | TPF |",
        "|" + "---|" * (6 + len(kinds)),
    ]
    for row in rows:
        by_kind = " | ".join(f"{row['by_kind'][kind]['validity']:.3f}" for kind in kinds)
        change = (
            f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        )
        agreement = "" if row["agreement"] is None else f"{row['agreement']:.3f}"
        lines.append(
            f"| {row['policy']} | {row['threshold'] or ''} | {row['validity']:.3f} | {by_kind} "
            f"| {change} | {agreement} | {row['tokens_per_forward']:.2f} |"
        )
    lines.append("")
    control = "confidence_threshold"
    for loss in LOSSES:
        base = best_within(rows, control, loss)
        for policy in policies:
            best = best_within(rows, policy, loss)
            if base is None or best is None or policy == control:
                continue
            ratio = best["tokens_per_forward"] / base["tokens_per_forward"]
            lines.append(
                f"- at most {100 * loss:.1f} points lost: {policy} {best['threshold']} has TPF "
                f"{best['tokens_per_forward']:.2f}, {control} {base['threshold']} "
                f"{base['tokens_per_forward']:.2f}: {ratio:.2f} times"
            )
    for policy in policies:
        at = validity_at(rows, policy, 3.0)
        if at is not None:
            lines.append(f"- at 3 tokens per forward, {policy} has a validity of {at:.3f}")
    lines += ["", f"First row: `{rows[0]['configuration']}`"]
    text = "\n".join(lines) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return text


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Two panels: validity and agreement against tokens per forward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("validity", "agreement"), strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            curve = sorted(
                (row["tokens_per_forward"], row[measure])
                for row in rows
                if row["policy"] == policy and row[measure] is not None
            )
            if curve:
                axes.plot(*zip(*curve, strict=True), marker="o", markersize=4, label=policy)
        axes.set(xlabel="tokens per forward", ylabel=measure)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
