"""What blocks looked like in a training, recorded with the training and after it."""

from __future__ import annotations

import pytest

FILE = "familiar.safetensors"


@pytest.mark.parametrize("policy", ["learn2pd", "learn2pd,variant=monotone", "settled"])
@pytest.mark.parametrize("states", ["oracle", "confidence_threshold"])
def test_a_trained_filter_gets_the_same_file_later(l2pd, small_model, tmp_path, policy, states):
    (tmp_path / "prompts.txt").write_text("\n".join(f"Say {'x' * i} twice." for i in range(6)))
    data, out = tmp_path / "data", tmp_path / "filter"
    done = l2pd(
        *("learn2pd", "collect", "--model", small_model, "--prompts", tmp_path / "prompts.txt"),
        *("--policy", states, "--max-new-tokens", "16", "--out", data),
    )
    assert done.returncode == 0, done.stderr
    done = l2pd(
        *("learn2pd", "train", "--policy", policy, "--epochs", "2"),
        *("--data", data, "--out", out),
    )
    assert done.returncode == 0, done.stderr
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / FILE).unlink()
    done = l2pd("learn2pd", "familiar", out, "--data", data, "--policy", policy)
    assert done.returncode == 0, done.stderr
    assert "examples of blocks" in done.stdout
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_without_a_filter_is_named(l2pd, tmp_path):
    done = l2pd("learn2pd", "familiar", tmp_path, "--data", tmp_path)
    assert done.returncode == 2
    assert "config.json and model.safetensors missing" in done.stderr
