"""Random tests of the whole project: `python -m tests.fuzz --minutes 10 --parts core plugins`.

Each case is generated from one number. A finding is printed with its number, and
`python -m tests.fuzz --parts PART --seed NUMBER --cases 1` runs it again. `make fuzz` runs all
parts; the tests run the first cases of each.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys

import torch

from tests.fuzz.runner import PARTS, run


def main() -> int:
    """Run the requested parts; returns 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of each part")
    parser.add_argument("--cases", type=int, help="of each part, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--findings", type=int, default=5, help="after which a part ends")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = 0
    for part in asked.parts:
        report = run(
            part,
            seed=asked.seed,
            cases=asked.cases,
            seconds=None if asked.cases else asked.minutes * 60,
            findings=asked.findings,
        )
        print(report, flush=True)
        found += len(report.findings)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
