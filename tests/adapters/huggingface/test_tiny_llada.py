"""generate on the shipped model: it equals a plain dense loop with the published rules (LLaDA's
low-confidence remasking at one token per step, Fast-dLLM's threshold), and a batch equals its
prompts alone."""

from __future__ import annotations

import pytest
import torch
from transformers import TextDiffusionStreamer, TextIteratorStreamer, TextStreamer

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import create_policy
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.tiny_world import TASKS


@torch.no_grad()
def plain_loop(model, prompt, *, length, block, mask, eot, threshold=None, cut=True):
    """Decode one prompt with dense forwards over everything and a softmax over the vocabulary."""
    x = torch.cat([prompt, torch.full((length,), mask)])
    forwards = 0
    for start in range(len(prompt), len(prompt) + length, block):
        while start < len(x) and (x[start : start + block] == mask).any():
            logits = model(x[None]).logits[0].float()
            forwards += 1
            logits[:, mask] = -torch.inf
            confidence, x0 = logits.softmax(-1).max(-1)
            masked = x == mask
            masked[start + block :] = False
            confidence = torch.where(masked, confidence, -1)
            chosen = torch.zeros_like(masked)
            chosen[confidence.argmax()] = True
            if threshold is not None and (confidence >= threshold).any():
                chosen = confidence >= threshold
            x = torch.where(chosen, x0, x)
            ends = (x[len(prompt) :] == eot).nonzero()
            if cut and len(ends):  # once it is committed, everything after it is end of text
                x = x[: len(prompt) + int(ends[0]) + 1]
        if cut and x[-1] == eot:
            break
    return x[len(prompt) :].tolist(), forwards


@pytest.fixture(scope="module")
def tiny_llada():
    return load("tiny-llada")


RULES = {
    "one token per step": ({"unmask_policy": "fixed_schedule"}, None),
    "threshold 0.9": (
        {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.9}},
        0.9,
    ),
    "threshold 0.7": (
        {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.7}},
        0.7,
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("count", "length", "cut"), [(200, 128, True), (12, 64, False)])
def test_equals_the_plain_loop(tiny_llada, rule, count, length, cut):
    model, tokenizer = tiny_llada
    mask, eot = model.config.mask_token_id, model.generation_config.eos_token_id
    arguments, threshold = RULES[rule]
    if threshold is None:  # forty times as many forward passes
        count = min(count, 50)
    chats = [[{"role": "user", "content": p.text}] for p in read_prompts(heldout_prompts(), count)]
    taken = plainly = 0
    for first in range(0, count, 25):
        batch = tokenizer.apply_chat_template(
            chats[first : first + 25],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = model.generate(
            **batch,
            max_new_tokens=length,
            end_of_text="block" if cut else "off",
            return_dict_in_generate=True,
            **arguments,
        )
        width = batch["input_ids"].shape[1]
        for row, (ids, seen) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ):
            wanted, forwards = plain_loop(
                model,
                ids[seen.bool()],
                length=length,
                block=32,
                mask=mask,
                eot=eot,
                threshold=threshold,
                cut=cut,
            )
            assert out.sequences[row, width : width + len(wanted)].tolist() == wanted
            taken += int(out.nfe[row])
            plainly += forwards
    # Another order of summation may swap two confidences of 1 - 1e-7; then an end of text is
    # committed, and its row is cut, a step earlier or later.
    assert abs(taken - plainly) <= 0.01 * plainly


FOUR = [
    "fixed_schedule",
    {"name": "confidence_threshold", "threshold": 0.6},
    "learn2pd",
    {"name": "fixed_schedule", "tokens_per_step": 4},
]


@pytest.mark.parametrize("choices", [["confidence_threshold"] * 16, FOUR * 4])
def test_a_batch_of_sixteen_equals_each_alone(tiny_llada, choices):
    model, tokenizer = tiny_llada
    chats = [[{"role": "user", "content": p.text}] for p in read_prompts(heldout_prompts(), 16)]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    lengths = batch["attention_mask"].sum(-1)
    assert lengths.unique().numel() > 4
    together = model.generate(**batch, max_new_tokens=128, unmask_policy=choices)
    width = batch["input_ids"].shape[1]
    assert torch.equal(together[:, :width], batch["input_ids"])
    for row, choice in enumerate(choices):
        ids = batch["input_ids"][row : row + 1, width - int(lengths[row]) :]
        alone = model.generate(ids, max_new_tokens=128, unmask_policy=choice)[0, ids.shape[1] :]
        assert together[row, width : width + len(alone)].tolist() == alone.tolist()


def test_the_streamers_of_transformers(tiny_llada, capsys):
    model, tokenizer = tiny_llada
    prompt = read_prompts(heldout_prompts(), 1)[0].text
    batch = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    width = batch["input_ids"].shape[1]
    answer = tokenizer.decode(
        model.generate(**batch, max_new_tokens=64)[0, width:], skip_special_tokens=True
    )
    for kind in (TextStreamer, TextIteratorStreamer, TextDiffusionStreamer):
        streamer = kind(tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**batch, max_new_tokens=64, streamer=streamer)
        printed = capsys.readouterr().out
        if kind is TextIteratorStreamer:
            printed = "".join(streamer)
        assert answer in printed
        # Drafts are shown in yellow and overwritten.
        assert ("\033[33m" in printed) == (kind is TextDiffusionStreamer)


def test_policies_differ_on_the_small_world(tiny_llada):
    prompts = read_prompts(heldout_prompts(), 60, tasks=TASKS)
    sure, bold = (
        evaluate(
            *tiny_llada,
            prompts,
            policy=create_policy("confidence_threshold", threshold=threshold),
            max_new_tokens=128,
        )
        for threshold in (0.9, 0.3)
    )
    assert sure.validity >= 0.9
    assert bold.validity <= 0.8
    assert bold.tokens_per_forward >= 1.7 * sure.tokens_per_forward


@pytest.mark.parametrize(
    "policy", ["fixed_schedule", "confidence_threshold", "learn2pd", "settled"]
)
def test_a_cache_changes_no_answer(tiny_llada, policy):
    """The model is trained not to attend to positions that are stale in a cache."""
    prompts = read_prompts(heldout_prompts(), 60, tasks=TASKS)
    answers = {
        cache: evaluate(
            *tiny_llada, prompts, policy=create_policy(policy), max_new_tokens=128, cache=cache
        ).answers
        for cache in ("none", "prefix", "dual")
    }
    for cache in ("prefix", "dual"):
        pairs = zip(answers["none"], answers[cache], strict=True)
        assert sum(plain.tokens == cached.tokens for plain, cached in pairs) >= 59


def test_prompts_unlike_those_trained_on_are_left_to_the_fallback(tiny_llada, caplog):
    """One batch: a task of the training, and texts of which the filters have seen nothing."""
    model, tokenizer = tiny_llada
    texts = ["Plan: Eva, Leo, Max, Ben, Ann; 1 3 4 5 8", "Why?", "abc 123 xyz"]
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": text}] for text in texts],
        add_generation_prompt=True, return_dict=True, return_tensors="pt",
        padding=True, padding_side="left",
    )  # fmt: skip

    def decoded(policy, **options):
        return model.generate(
            **inputs, max_new_tokens=64, unmask_policy=policy, unmask_options=options or None,
            return_dict_in_generate=True,
        )  # fmt: skip

    careful, bold = decoded("settled"), decoded("settled", fallback="none")
    bound = decoded("eb_sampler", gamma=0.02)
    threshold = decoded("confidence_threshold")
    plain = decoded("settled", fallback="confidence_threshold")
    assert careful.trace.fallback_share.tolist() == [0.0, 1.0, 1.0]
    assert bold.trace.fallback is None and threshold.trace.fallback is None
    assert careful.trace.committed_at[0].equal(bold.trace.committed_at[0])
    for row in (1, 2):
        assert careful.trace.committed_at[row].equal(bound.trace.committed_at[row])
        assert plain.trace.committed_at[row].equal(threshold.trace.committed_at[row])
        assert careful.nfe[row] > bold.nfe[row]
    decoded("settled")
    warnings = [each for each in caplog.records if "its fallback decided" in each.message]
    assert len(warnings) <= 1  # once per process
