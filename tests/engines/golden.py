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

MODEL, MAX_NEW_TOKENS = "tiny-sdar", 96
RUNS = (
    ({"name": "fixed_schedule"}, 100),
    ({"name": "fixed_schedule", "steps": 48}, 100),
    ({"name": "confidence_threshold"}, 100),
    ({"name": "confidence_threshold", "threshold": 0.7}, 100),
    # Those that remember earlier steps: distributions, credit, predictions.
    ({"name": "klass"}, 24),
    ({"name": "credit"}, 24),
    ({"name": "cora"}, 24),
    # Those that take back, and overwrite, what was committed.
    ({"name": "saber", "mu": 2}, 24),
    ({"name": "llada2_edit"}, 24),
    # Another distribution's: examples/l2pd-policy-entropy.
    ({"name": "entropy_threshold"}, 24),
)
"""Each policy, and how many prompts it decodes."""
FILE = Path(__file__).with_name("golden.json")


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


def renew():
    """Write the file anew."""
    runs = [{"policy": policy, "cases": decode(policy, prompts)} for policy, prompts in RUNS]
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
