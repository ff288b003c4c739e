"""Golden traces: what every engine commits, and at which denoising step.

`golden.json` beside this file was decoded by the transformers adapter in the environment that it
records; transformers, vLLM and SGLang reproduce it. It is renewed by this command and nothing else:

    .venv/bin/python -m tests.engines.golden --renew
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins.trajectories import fingerprint
from tests.engines.cases import decoded, random_requests

MODEL, PROMPTS, MAX_NEW_TOKENS = "tiny-sdar", 100, 96
POLICIES = (
    {"name": "fixed_schedule"},
    {"name": "fixed_schedule", "steps": 48},
    {"name": "confidence_threshold"},
    {"name": "confidence_threshold", "threshold": 0.7},
)
FILE = Path(__file__).with_name("golden.json")


def golden():
    """(policy, [{"prompt", "tokens", "committed_at"}, ...]) for each policy."""
    return [(run["policy"], run["cases"]) for run in json.loads(FILE.read_text())["runs"]]


def decode(policy):
    """The traces of one policy, by the transformers adapter as it is."""
    prompts = [prompt for prompt, _ in random_requests([policy], PROMPTS, seed=7)]
    cases = decoded(MODEL, [(prompt, policy) for prompt in prompts], MAX_NEW_TOKENS)
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


def renew():
    """Write the file anew."""
    runs = [{"policy": policy, "cases": decode(policy)} for policy in POLICIES]
    lines = [
        '{"environment": ' + json.dumps(environment()) + ',\n "runs": [',
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
