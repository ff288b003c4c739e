"""Collecting and training, from the command line, on a small random model."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import L2PDError, create_policy
from l2pd_plugins.trajectories import read_trajectories
from l2pd_tools.evaluation.prompts import parse_prompts, read_prompts
from l2pd_tools.policy_text import parse_policy
from l2pd_tools.training.collecting import collect, share_of_prompts
from tests.tools.cli.recorded import ONE_THREAD, START, collecting, training
from tests.tools.cli.released_filter import released

ROUNDS = {
    "settled": ["0.98, fallback=none, risk=0.05", "0.9, fallback=none, risk=0.2"],
    "learn2pd,variant=monotone": [f"{t}, fallback=none, variant=monotone" for t in (0.95, 0.85)],
}
"""The states that the rounds of each policy are trained on."""


def collect_into(out, model, tokenizer, prompt_file):
    """What the command of `collecting` does, with a model at hand."""
    return collect(
        model,
        tokenizer,
        read_prompts(prompt_file),
        out,
        source=prompt_file.name,
        max_new_tokens=24,
        batch_size=2,
        prompts_per_shard=3,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_goes_on_and_gives_the_same_data(
    small_model, prompt_file, collected, tmp_path
):
    out = tmp_path / "cut"
    command = [sys.executable, "-c", START, *collecting(small_model, prompt_file, out)]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    while not any(out.glob("shard-00001*")):
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert len(list(out.glob("shard-*"))) < 4
    subprocess.run(command, check=True, capture_output=True, env=ONE_THREAD)
    assert contents(out) == contents(collected)  # and nothing half written


def test_a_broken_shard_is_made_again(loaded, prompt_file, collected, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(collected, out)
    (out / "shard-00001-of-00004.safetensors").write_bytes(b"")
    os.truncate(out / "shard-00003-of-00004.safetensors", 500)
    (out / "reference-00003-of-00004.safetensors").write_bytes(b"")
    kept = (out / "shard-00000-of-00004.safetensors").stat().st_mtime_ns
    collect_into(out, *loaded, prompt_file)
    assert contents(out) == contents(collected)
    assert (out / "shard-00000-of-00004.safetensors").stat().st_mtime_ns == kept


def test_processes_share_the_shards(small_model, prompt_file, collected, tmp_path):
    out = tmp_path / "shared"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = collecting(small_model, prompt_file, out)
    subprocess.run(
        [sys.executable, *launch, "-m", "l2pd_tools.cli", *command],
        check=True,
        capture_output=True,
        env=ONE_THREAD,
    )
    assert contents(out) == contents(collected)


def test_what_is_recorded(collected):
    manifest, data = read_trajectories(collected)
    assert manifest.policies == ["oracle()"]
    assert data.prompt.unique().tolist() == list(range(12))
    first = data.step == 0
    assert data.masked[first].equal(data.present[first])
    assert ((data.confidence > 0) == data.present).all()
    # The oracle commits what is right: nothing right is still masked one step later.
    for prompt in range(12):
        mine = data.take(data.prompt == prompt)
        for now in range(len(mine) - 1):
            if mine.block[now + 1] == mine.block[now]:
                kept = mine.masked[now] & mine.correct[now] & mine.present[now + 1]
                assert not (kept & mine.masked[now + 1]).any()


def test_other_settings_do_not_mix(l2pd, small_model, prompt_file, collected):
    done = l2pd(*collecting(small_model, prompt_file, collected, "--policy", "fixed_schedule"))
    assert done.returncode == 2
    assert "policies=['oracle()'], this run has ['fixed_schedule(tokens_per_step=1)']" in (
        done.stderr.replace("\n", " ")
    )


def test_another_model_of_the_same_name_does_not_mix(loaded, prompt_file, collected):
    model, tokenizer = copy.deepcopy(loaded)
    model.lm_head.weight.data *= 1.01
    with pytest.raises(L2PDError, match="model_fingerprint"):
        collect_into(collected, model, tokenizer, prompt_file)


def test_other_token_ids_do_not_mix(loaded, prompt_file, collected):
    model, tokenizer = copy.deepcopy(loaded)
    tokenizer.chat_template = None
    with pytest.raises(L2PDError, match="prompts_sha256"):
        collect_into(collected, model, tokenizer, prompt_file)


def test_a_filter_is_known_by_its_weights_and_not_by_its_path(small_model, loaded, tmp_path):
    model, tokenizer = loaded
    prompts = parse_prompts(["One.", "Two."], "here")
    settings = {"max_new_tokens": 8, "batch_size": 2}
    folder = tmp_path / "filter"
    shutil.copytree(small_model / "policies" / "learn2pd", folder)

    def run(policy):
        return collect(model, tokenizer, prompts, tmp_path / "d", policies=[policy], **settings)

    own = run("learn2pd")
    assert run({"name": "learn2pd", "filter": str(folder)}) == own
    assert run({"name": "learn2pd", "filter": f"{folder}/"}) == own
    weights = load_file(folder / "model.safetensors")
    save_file({name: -value for name, value in weights.items()}, folder / "model.safetensors")
    with pytest.raises(L2PDError, match="policies="):
        run({"name": "learn2pd", "filter": str(folder)})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policies": ["transformer_sampler"]}, "no filter belongs to the model"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"block_length": 0}, "block_length=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"prompts_per_shard": 0}, "prompts_per_shard=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"labels": "right"}, "labels='right'"),
    ],
)
def test_what_cannot_be_collected_leaves_nothing(loaded, prompt_file, tmp_path, settings, words):
    with pytest.raises(L2PDError, match=words):
        collect(*loaded, read_prompts(prompt_file), tmp_path / "d", **settings)
    assert not (tmp_path / "d").exists()


def test_what_lies_behind_the_canvas_is_no_data(tmp_path):
    """A block-causal model decodes its last block whole; the reference ends before."""
    prompts = read_prompts(heldout_prompts(), 6)
    collect(*load("tiny-sdar"), prompts, tmp_path, max_new_tokens=24, batch_size=6)
    _, data = read_trajectories(tmp_path)
    for prompt in range(6):
        begun = data.take((data.prompt == prompt) & (data.step == 0))
        assert begun.masked.sum() <= 24
    right = data.masked & data.correct
    assert right.sum() > 0.5 * data.masked.sum()


def test_processes_count_their_own_share(monkeypatch):
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        shares.append(share_of_prompts(11, 2))
    assert shares == [4, 4, 3]


def test_training_refuses_what_it_would_not_follow(l2pd, collected, tmp_path, monkeypatch):
    out = tmp_path / "f"
    train = ("learn2pd", "train", "--data", collected, "--out", out)
    done = l2pd(*train, "--model", "tiny-sdar", "--batch-size", "3")
    assert done.returncode == 2
    assert "--model, --batch-size" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = l2pd(*train, "--rounds", "1")
    assert done.returncode == 2
    assert "--rounds runs in one process, but there are 2" in done.stderr
    done = l2pd("learn2pd", "train", "--data", tmp_path / "none", "--out", out)
    assert done.returncode == 2
    assert f"{tmp_path / 'none'} holds no trajectories" in done.stderr
    assert not out.exists()


def card_of(folder):
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("policy", ["learn2pd", *ROUNDS])
def test_training_twice_gives_the_same_weights(l2pd, collected, tmp_path, policy):
    for name in ("a", "b"):
        done = l2pd(
            *("learn2pd", "train", "--data", collected, "--out", tmp_path / name),
            *("--policy", policy, "--epochs", "60", "--false-positive-rate", "0.05"),
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    made = create_policy({**parse_policy(policy), "filter": str(tmp_path / "a")})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert made.threshold == config["threshold"]
    assert config["false_positive_rate"] == 0.05
    assert config["base_model"].endswith("small")
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())["metrics"]
    assert metrics["false_positive_rate"] <= 0.05
    for rate, (part, whole) in {
        "true_positive_rate": ("accepted_right", "right"),
        "false_positive_rate": ("accepted_wrong", "wrong"),
        "precision": ("accepted_right", "accepted"),
    }.items():
        share = metrics[part] / metrics[whole] if metrics[whole] else None
        assert metrics[rate] == share
        assert f"({part} {metrics[part]} of {whole} {metrics[whole]})" in card_of(tmp_path / "a")
    assert metrics["accepted"] == metrics["accepted_right"] + metrics["accepted_wrong"]
    assert metrics["training_prompts"] + metrics["validation_prompts"] == 12
    states = len(read_trajectories(collected)[1])
    assert metrics["training_states"] + metrics["validation_states"] == states
    for name in ("right", "wrong"):
        assert f"{metrics[f'accepted_{name}']} of {metrics[name]} {name} " in done.stdout
    assert done.stderr.splitlines()[-1] == (
        f"next: l2pd compare --model {config['base_model']} --policy fixed_schedule "
        f"--policy confidence_threshold --policy {policy},filter={tmp_path / 'b'}"
    )
    card = (tmp_path / "a" / "README.md").read_text()
    assert "seed" in card and "curves.png" in card
    assert "prompts like those it was trained on" in card
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("out", ["/proc/filter", "file/filter", "file", "full"])
def test_a_folder_that_cannot_be_written_is_said_before_the_work(
    l2pd, collected, tmp_path, monkeypatch, out
):
    from l2pd_policies.learned import training as module

    monkeypatch.setattr(module, "train", lambda *args, **kwargs: pytest.fail("it has trained"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "folder").mkdir(parents=True)
    done = l2pd(*training(collected, tmp_path / out))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --out {tmp_path / out} cannot be ")
    weights = tmp_path / "f.pth"
    torch.save(released(4), weights)
    assert l2pd("learn2pd", "convert", weights, "--out", tmp_path / out).returncode == 2


FULL = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " + (
    "resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000)); "
)


def test_a_full_disk_at_the_end_keeps_the_trained_filter(l2pd, collected, tmp_path):
    """The picture of the curves is larger than what a file may have here; the weights are not."""
    out = tmp_path / "filter"
    assert l2pd(*training(collected, out)).returncode == 0
    before = contents(out)
    done = subprocess.run(
        [sys.executable, "-c", FULL + START, *training(collected, out, "--seed", "5", "--force")],
        capture_output=True,
        text=True,
        env={**ONE_THREAD, "TMPDIR": str(tmp_path), "COLUMNS": "1000"},
    )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "filter cannot be written: " in line
    kept = re.search(r"; the trained filter is in (\S+)$", line)[1]
    assert create_policy("learn2pd", filter=kept).threshold > 0
    assert (
        load_file(out / "model.safetensors")["fc1.weight"]
        .ne(load_file(f"{kept}/model.safetensors")["fc1.weight"])
        .any()
    )
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("policy", ROUNDS)
def test_rounds(l2pd, small_model, prompt_file, tmp_path, policy):
    done = l2pd(
        *("learn2pd", "train", "--policy", policy, "--rounds", "1", "--epochs", "3"),
        *("--model", small_model, "--prompts", prompt_file, "--limit", "6"),
        *("--max-new-tokens", "16", "--data", tmp_path / "d", "--out", tmp_path / "f"),
    )
    assert done.returncode == 0, done.stderr
    manifest, data = read_trajectories(tmp_path / "d" / "round-1")
    assert ((data.confidence > 0) == data.present).all()
    assert data.block.max() == 1
    assert [p.split("threshold=", 1)[1].split(")")[0] for p in manifest.policies] == ROUNDS[policy]
    assert not list((tmp_path / "d" / "round-1").glob("reference-*"))
    made = {**parse_policy(policy), "filter": str(tmp_path / "f")}
    assert create_policy(made).threshold > 0


def test_the_policy_that_cannot_be_trained_is_named(l2pd, collected, tmp_path):
    done = l2pd("learn2pd", "train", "--data", collected, "--out", tmp_path, "--policy", "oracle")
    assert done.returncode == 2
    assert "learn2pd, learn2pd,variant=monotone, settled" in done.stderr.replace("\n", " ")
