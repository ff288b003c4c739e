"""Golden traces: what every engine commits, and at which denoising step.

`golden.json` beside this file was decoded by the transformers adapter in the environment that it
records; transformers, vLLM and SGLang reproduce it. It is renewed by this command and nothing else,
which prints what has changed:

    .venv/bin/python -m tests.engines.golden --renew
"""

import argparse
import itertools
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins.trajectories import fingerprint
from tests.engines.cases import decoded, random_requests

MODEL, MAX_NEW_TOKENS = "tiny-sdar", 96
RUNS = (
    ({"name": "fixed_schedule"}, 100),
    ({"name": "fixed_schedule", "steps": 48}, 100),
    ({"name": "confidence_threshold"}, 100),
    ({"name": "confidence_threshold", "threshold": 0.7}, 100),
    # Policies that remember earlier steps: distributions, credit, predictions.
    ({"name": "klass"}, 24),
    ({"name": "credit"}, 24),
    ({"name": "cora"}, 24),
    # Policies that mask or overwrite committed tokens again.
    ({"name": "saber", "mu": 2}, 24),
    ({"name": "llada2_edit"}, 24),
    # The policy of another distribution: examples/l2pd-policy-entropy.
    ({"name": "entropy_threshold"}, 24),
)
"""Each policy, and how many prompts it decodes."""
FILE = Path(__file__).with_name("golden.json")
SHOWN = 8
"""Tokens of a difference that are printed."""


def golden():
    """(policy, [{"prompt", "tokens", "committed_at"}, ...]) for each policy."""
    return [(run["policy"], run["cases"]) for run in json.loads(FILE.read_text())["runs"]]


def decode(policy, prompts):
    """The traces of one policy on so many prompts, by the transformers adapter as it is."""
    cases = decoded(MODEL, random_requests([policy], prompts, seed=7), MAX_NEW_TOKENS)
    return [
        {"prompt": case.prompt, "tokens": case.tokens, "committed_at": case.committed_at}
        for case in cases
    ]


def environment():
    """What a trace may depend on."""
    from safetensors.torch import load_file

    return {
        "model": MODEL,
        "weights": fingerprint(load_file(folder_of(MODEL) / "model.safetensors")),
        "max_new_tokens": MAX_NEW_TOKENS,
        "dtype": "float32",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "l2pd-plugins")},
    }


def changes(before, after):
    """The differences between two contents of the file, one line each; none if they are equal."""
    for name in sorted(before["environment"].keys() | after["environment"].keys()):
        old, new = (content["environment"].get(name) for content in (before, after))
        if old != new:
            yield f"environment: {name} {old} -> {new}"
    old_runs, new_runs = (
        {
            json.dumps(run["policy"], sort_keys=True): {c["prompt"]: c for c in run["cases"]}
            for run in content["runs"]
        }
        for content in (before, after)
    )
    for policy in [*new_runs, *(gone for gone in old_runs if gone not in new_runs)]:
        old, new = old_runs.get(policy, {}), new_runs.get(policy, {})
        differing = [(old[p], new[p]) for p in new if p in old and old[p] != new[p]]
        answers = sum(a["tokens"] != b["tokens"] for a, b in differing)
        counts = {
            "new": sum(p not in old for p in new),
            "gone": sum(p not in new for p in old),
            "with other tokens": answers,
            "with the same tokens at other steps": len(differing) - answers,
        }
        if any(counts.values()):
            told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            yield f"{policy}: of {max(len(old), len(new))} prompts, {told}"
        if differing:
            yield from first_difference(*differing[0])


def first_difference(old, new):
    """The first position at which the traces of one prompt differ, and both traces from there."""
    pairs = [list(zip(c["tokens"], c["committed_at"], strict=True)) for c in (old, new)]
    same = itertools.takewhile(lambda both: both[0] == both[1], zip(*pairs, strict=False))
    at = sum(1 for _ in same)
    yield f"  {old['prompt']!r} differs from position {at} on (token@step):"
    for sign, pair in zip("-+", pairs, strict=True):
        shown = " ".join(f"{token}@{step}" for token, step in pair[at : at + SHOWN])
        cut = " ..." if len(pair) > at + SHOWN else ""
        yield f"  {sign} {shown or '(ends)'}{cut}"


def renew():
    """Write the file anew, and print what has changed."""
    before = json.loads(FILE.read_text())
    runs = [{"policy": policy, "cases": decode(policy, prompts)} for policy, prompts in RUNS]
    after = {"environment": environment(), "runs": runs}
    print("\n".join(changes(before, after)) or "nothing has changed")
    lines = [
        '{"environment": ' + json.dumps(after["environment"]) + ',\n "runs": [',
        ",\n".join(
            '  {"policy": '
            + json.dumps(run["policy"])
            + ', "cases": [\n'
            + ",\n".join("   " + json.dumps(case) for case in run["cases"])
            + "]}"
            for run in runs
        ),
        "]}",
    ]
    FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renew", action="store_true", required=True)
    parser.parse_args()
    renew()
