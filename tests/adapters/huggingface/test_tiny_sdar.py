"""The shipped block-causal model: its answers, its batches, and its trajectories for filters."""

from __future__ import annotations

import pytest
import torch

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import folder_of, heldout_prompts
from l2pd_plugins.trajectories import read_trajectories
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.evaluation.run import encode_prompts, evaluate
from l2pd_tools.tiny_world import TASKS
from l2pd_tools.training.collecting import collect


@pytest.fixture(scope="module")
def tiny_sdar():
    return load("tiny-sdar")


@pytest.fixture(scope="module")
def prompts():
    return read_prompts(heldout_prompts(), 45, tasks=TASKS)


def test_the_checkpoint(tiny_sdar):
    model, tokenizer = tiny_sdar
    assert model.config.architectures == ["SDARForCausalLM"]
    assert model.config.head_dim >= 32
    assert tokenizer.convert_tokens_to_ids(tokenizer.mask_token) == model.config.mask_token_id
    assert tokenizer.get_vocab() == load("tiny-llada")[1].get_vocab()
    assert (folder_of("tiny-sdar") / "model.safetensors").stat().st_size <= 8e6


def test_answers_are_valid_and_need_no_recompute(tiny_sdar, prompts):
    """Three prompts of each family at one token per step, with the cache and without."""
    cached = evaluate(*tiny_sdar, prompts, policy="fixed_schedule", max_new_tokens=128)
    assert " cache=block " in cached.configuration
    assert cached.validity is not None
    assert cached.validity >= 0.95
    dense = evaluate(*tiny_sdar, prompts, policy="fixed_schedule", max_new_tokens=128, cache="none")
    assert [a.tokens for a in cached.answers] == [a.tokens for a in dense.answers]
    assert [a.committed_at for a in cached.answers] == [a.committed_at for a in dense.answers]
    fast = evaluate(*tiny_sdar, prompts, policy="confidence_threshold", max_new_tokens=128)
    assert fast.tokens_per_forward > 3 * cached.tokens_per_forward


def test_a_batch_equals_each_alone(tiny_sdar, prompts):
    model, tokenizer = tiny_sdar
    choices = ["fixed_schedule", "confidence_threshold", {"name": "fixed_schedule", "steps": 40}]
    choices = (choices * 6)[:16]
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt.text}] for prompt in prompts[:16]],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    lengths = batch["attention_mask"].sum(-1)
    assert (lengths % 32).unique().numel() > 4
    together = model.generate(**batch, max_new_tokens=128, unmask_policy=choices)
    width = batch["input_ids"].shape[1]
    for row, choice in enumerate(choices):
        ids = batch["input_ids"][row : row + 1, width - int(lengths[row]) :]
        alone = model.generate(ids, max_new_tokens=128, unmask_policy=choice)[0, ids.shape[1] :]
        assert together[row, width : width + len(alone)].tolist() == alone.tolist()


def test_collected_labels_match_the_canvas(tiny_sdar, prompts, tmp_path):
    """At one token per step, as for the references, the last prediction of a block is correct."""
    prompts = prompts[:8]
    collect(*tiny_sdar, prompts, tmp_path, policies=["fixed_schedule"], max_new_tokens=128)
    _, data = read_trajectories(tmp_path)
    lengths = torch.tensor([len(ids) for ids in encode_prompts(tiny_sdar[1], prompts)])
    begun = torch.where(data.block == 0, lengths[data.prompt] % 32, 0)
    of_the_prompt = torch.arange(32) < begun.unsqueeze(-1)
    assert of_the_prompt.any()
    assert not data.present[of_the_prompt].any()
    assert not data.correct[of_the_prompt].any()
    last = data.masked.sum(-1) == 1
    assert last.sum() >= 8
    assert data.correct[last][data.masked[last]].all()
