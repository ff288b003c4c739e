"""Commands that record trajectories of a small model and train on them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

START = "from l2pd_tools.cli import main; main()"
# Sums over another number of threads may differ in their last bits; torchrun sets 1 by itself.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"Say {'x' * (i % 7)} number {i}." for i in range(12)) + "\n")
    return path


def collecting(small_model, prompt_file, out, *more):
    return [
        *("learn2pd", "collect", "--model", str(small_model), "--prompts", str(prompt_file)),
        *("--out", str(out), "--max-new-tokens", "24", "--batch-size", "2"),
        *("--prompts-per-shard", "3", *more),
    ]


@pytest.fixture(scope="session")
def collected(small_model, prompt_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "whole"
    command = collecting(small_model, prompt_file, out, "--policy", "oracle")
    subprocess.run(
        [sys.executable, "-c", START, *command], check=True, capture_output=True, env=ONE_THREAD
    )
    return out


def training(collected, out, *more):
    places = ["--data", str(collected), "--out", str(out)]
    return ["learn2pd", "train", *places, "--epochs", "3", *more]
