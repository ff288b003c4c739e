"""A soak of a live engine: `python -m tests.engines.soak --engine sglang --minutes 20`.

Runs in the environment of that engine. `make soak` runs it for both.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from tests.engines.soak.run import Options, faults, run


def main():
    """Run the soak; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines.soak", description=__doc__)
    parser.add_argument("--engine", choices=("sglang", "vllm"), required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--requests", type=int, default=100_000, help="after which it ends")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=680)
    parser.add_argument("--folder", help="keeps the server's log")
    parser.add_argument("--grown", type=float, default=100.0, help="MiB that the server may grow")
    parser.add_argument("--live-grown", type=float, default=10.0, help="the same of what is in use")
    asked = parser.parse_args()
    engine = importlib.import_module(f"tests.engines.soak.on_{asked.engine}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with it
    options = Options(asked.minutes, asked.requests, asked.seed, asked.questions)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(asked.folder or folder)
        folder.mkdir(parents=True, exist_ok=True)
        summary = run(engine, options, folder, out=lambda line: print(line, flush=True))
    summary["faults"] = faults(summary)
    if summary["memory_mib"]["grown"] > asked.grown:
        summary["faults"].append("memory")
    if summary["live_mib"]["grown"] > asked.live_grown:
        summary["faults"].append("live")
    print(json.dumps(summary), flush=True)
    return int(bool(summary["faults"]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
