"""How collecting and training end: what was made, and how it lies on the disk."""

from __future__ import annotations

import os

import pytest
import torch

from l2pd_plugins import create_policy
from l2pd_plugins.trajectories import read_trajectories
from l2pd_policies.learn2pd import UnmaskFilter
from tests.tools.cli.recorded import collecting, training
from tests.tools.cli.released_filter import released


@pytest.mark.parametrize("command", ["train", "convert"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_filter_is_replaced_only_by_force(l2pd, collected, tmp_path, monkeypatch, command, file):
    from l2pd_policies.learned import training as module

    out, weights = tmp_path / "filter", tmp_path / "f.pth"
    torch.save(released(8), weights)
    out.mkdir()
    (out / file).write_text("mine")
    (out / "notes").write_text("mine")
    lines = {
        "train": training(collected, out),
        "convert": ["learn2pd", "convert", str(weights), "--out", str(out)],
    }
    with monkeypatch.context() as patched:
        patched.setattr(module, "train", lambda *args, **kwargs: pytest.fail("it has trained"))
        done = l2pd(*lines[command])
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --out {out} already holds a filter; name another folder, or replace it with "
        "--force\n"
    )
    assert (out / file).read_text() == "mine"
    done = l2pd(*lines[command], "--force")
    assert done.returncode == 0, done.stderr
    assert create_policy("learn2pd", filter=str(out)).threshold > 0
    assert (out / "notes").read_text() == "mine"


def test_a_filter_is_as_readable_as_the_umask_says(l2pd, collected, tmp_path):
    before = os.umask(0o027)
    try:
        assert l2pd(*training(collected, tmp_path / "filter")).returncode == 0
        UnmaskFilter(block_length=8).save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    for folder in ("filter", "saved"):
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / folder).iterdir()}
        assert set(modes.values()) == {0o640}, modes


def test_collecting_ends_with_what_was_made(l2pd, small_model, prompt_file, tmp_path):
    out = tmp_path / "few"
    settings = ("--limit", "4", "--block-length", "4", "--cache", "dual")
    done = l2pd(*collecting(small_model, prompt_file, out, *settings))
    assert done.returncode == 0, done.stderr
    manifest, data = read_trajectories(out)
    assert (manifest.block_length, manifest.cache) == (4, "dual")
    assert data.masked.shape[1] == 4
    assert done.stdout.startswith(
        f"{out}: {len(data)} states of 4 prompts, blocks of 4 positions, "
    )
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask()}
    following = done.stderr.splitlines()[-1].removeprefix("next: l2pd ")
    training = following.replace("filters/few", str(tmp_path / "filter"))
    assert l2pd(*training.split(), "--epochs", "2").returncode == 0


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_a_cache_changes_the_recorded_states_and_does_not_mix(
    l2pd, small_model, prompt_file, collected, tmp_path
):
    whole = ("--policy", "oracle")
    done = l2pd(*collecting(small_model, prompt_file, tmp_path / "d", *whole, "--cache", "dual"))
    assert done.returncode == 0, done.stderr
    cached, plain = (read_trajectories(folder)[1] for folder in (tmp_path / "d", collected))
    assert len(cached) != len(plain) or not cached.confidence.equal(plain.confidence)
    done = l2pd(*collecting(small_model, prompt_file, collected, *whole, "--cache", "dual"))
    assert done.returncode == 2
    assert "cache='', this run has 'dual'" in done.stderr
    done = l2pd(*collecting(small_model, prompt_file, collected, *whole, "--cache", "none"))
    assert done.returncode == 0, done.stderr
