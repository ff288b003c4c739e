"""Mutation tests: change one thing in a module, and see whether a test fails.

    python -m tests.mutants --modules slots selection --out runs/mutants

It prints a score for each module and writes the mutants that no test detected, as diffs, into the
folder; `--again` runs only those. Mutants without any observable effect are listed, with the
reason, in `equivalent.txt`. `make mutants` runs all modules, about an hour on two cores.
"""

from __future__ import annotations

import os

# Set before torch and Triton are imported: one thread, since forked children have no other, and
# Triton's interpreter, which runs on the CPU.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TRITON_INTERPRET="1")

import argparse
import difflib
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.equivalent import read_equivalent
from tests.mutants.forks import Tree, count
from tests.mutants.mutations import Mutation, mutations_of
from tests.mutants.targets import TARGETS

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the mutants of the requested modules; returns 1 if a score is below --least."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--modules", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants")
    parser.add_argument("--least", type=float, default=0.9, help="least score of a module")
    parser.add_argument(
        "--seconds",
        type=float,
        default=12,
        help="for each mutant, only tests that take so long together: the score is a lower bound",
    )
    parser.add_argument("--tests", nargs="*", help="only these files of tests")
    parser.add_argument("--again", action="store_true", help="only what survived the last time")
    parser.add_argument("--lines", help="only mutants of these lines, such as 120-180")
    parser.add_argument("--share", type=float, default=1.0, help="a random share of the mutants")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    worst = 1.0
    with tempfile.TemporaryDirectory(prefix="l2pd-mutants-") as folder:
        tree = Tree(ROOT, Path(folder))
        for name in asked.modules:
            worst = min(worst, score(tree, name, asked))
    return int(worst < asked.least)


def score(tree: Tree, name: str, asked: argparse.Namespace) -> float:
    """Run the mutants of one module and report on them."""
    target = TARGETS[name]
    source = (tree.copy / target.module).read_text()
    began = time.perf_counter()
    tests_of_it = asked.tests or target.tests
    learned = tree.learn([each.module for each in TARGETS.values()], tests_of_it)
    if learned.failed:
        raise SystemExit(f"{name}: tests fail without a mutation: {', '.join(learned.failed)}")
    known = read_equivalent(target.module)
    mutants = list(mutations_of(source))
    if asked.lines:
        first, last = map(int, asked.lines.split("-"))
        mutants = [m for m in mutants if first <= m.line <= last]
    survived = asked.out / f"{name}.survived"
    if asked.again:
        keys = survived.read_text().splitlines()
        mutants = [m for m in mutants if m.key(source) in keys]
    if asked.share < 1:
        mutants = random.Random(0).sample(mutants, round(len(mutants) * asked.share))
    outcomes, survivors, unused = [], [], set(known)
    for mutant in mutants:
        key = mutant.key(source)
        if key in known:
            unused.discard(key)
            outcomes.append("equivalent")
            continue
        tests = learned.tests_of(
            target.module,
            None if mutant.imported else mutant.lines,
            target.unseen,
            target.also,
        )
        tests = learned.within(tests, asked.seconds)
        limit = 15 + 8 * sum(learned.seconds[test] for test in tests)
        outcome, noticed = tree.survives(target.module, mutant.source, tests, limit)
        if noticed is not None:
            learned.killers[noticed] += 1
        outcomes.append(outcome)
        if outcome == "survived":
            survivors.append(mutant)
            print(
                f"  {target.module}:{mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True
            )
    found = count(outcomes)
    tested = len(outcomes) - found["equivalent"]
    rate = 1 - found["survived"] / max(1, tested)
    print(
        f"{name}: {rate:.1%} of {tested} mutants noticed ({found['killed']} by a failing test, "
        f"{found['timeout']} by the time limit), {found['survived']} survived, "
        f"{found['equivalent']} equivalent; {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    whole = not (asked.lines or asked.again or asked.share < 1)
    if whole:
        for key in sorted(unused):
            print(f"  equivalent.txt: {target.module}: no such mutant any more: {key}")
    survived.write_text("".join(f"{m.key(source)}\n" for m in survivors))
    (asked.out / f"{name}.diff").write_text(
        "".join(diff(target.module, source, m) for m in survivors)
    )
    return rate


def diff(module: str, source: str, mutant: Mutation) -> str:
    """A mutant as a unified diff."""
    old, new = source.splitlines(keepends=True), mutant.source.splitlines(keepends=True)
    return "".join(difflib.unified_diff(old, new, f"a/{module}", f"b/{module}", n=1))


if __name__ == "__main__":
    sys.exit(main())
