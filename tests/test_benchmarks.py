"""What the benchmarks compare with does what it says: the same policy, the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.evaluation import read_prompts
from l2pd_adapters.tiny_models import heldout_prompts

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MASK = 97


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plain

    yield plain
    del sys.modules["plain"]


@pytest.mark.parametrize("policy", ["fixed_schedule", "confidence_threshold"])
def test_the_plain_loop_gives_the_tokens_of_generate(plain, policy):
    model, tokenizer = load("tiny-llada")
    chats = [[{"role": "user", "content": p.text}] for p in read_prompts(heldout_prompts(), 3)]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    rules = {
        "fixed_schedule": ({"tokens_per_step": 4}, plain.fixed_number(4)),
        "confidence_threshold": ({"threshold": 0.9}, plain.above_threshold(0.9)),
    }
    options, rule = rules[policy]
    found, forwards = plain.plain_loop(
        model, **inputs, rule=rule, mask_token_id=MASK, max_new_tokens=64, block_length=32
    )
    out = model.generate(
        **inputs,
        max_new_tokens=64,
        unmask_policy=policy,
        unmask_options=options,
        end_of_text="off",
        return_dict_in_generate=True,
    )
    assert torch.equal(found, out.sequences[:, inputs["input_ids"].shape[1] :])
    assert forwards >= int(out.nfe.max())


def test_sglangs_step_takes_what_is_above_the_threshold_else_the_best(plain):
    logits = torch.full((3, 4, 6), -9.0)
    logits[0, 1, 2] = logits[0, 3, 4] = 9.0  # two certain positions
    logits[1, 2, 1] = -8.0  # none, this one is the best
    tokens = torch.tensor([[5, 5, 5, 5], [5, 5, 5, 5], [1, 2, 3, 0]])
    plain.low_confidence_step(logits, tokens, mask=5, threshold=0.9)
    assert tokens.tolist() == [[5, 2, 5, 4], [5, 5, 1, 5], [1, 2, 3, 0]]


@pytest.mark.parametrize(
    "arguments",
    [
        "step.py --rows 32 --vocabularies 9000 --repeats 1 --dtypes bfloat16",
        "loop.py --prompts 2 --batches 2 --lengths 32 --repeats 1",
    ],
)
def test_a_benchmark_runs_and_writes_what_it_depends_on(arguments, tmp_path):
    script, *rest = arguments.split()
    path = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / script), *rest, "--json", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = json.loads(path.read_text())
    assert found["results"]
    assert {"command", "machine", "torch", "threads"} <= found["environment"].keys()
