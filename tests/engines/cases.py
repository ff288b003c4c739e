"""Requests for a server, and what the transformers adapter answers."""

import json
import random
from dataclasses import dataclass

import torch

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import folder_of, heldout_prompts


@dataclass(frozen=True)
class Case:
    """A request, and what the transformers adapter answers."""

    prompt: str
    templated: str
    policy: dict
    tokens: list
    """Up to and including the end of text."""
    text: str
    committed_at: list

    @property
    def options(self):
        return {name: value for name, value in self.policy.items() if name != "name"}


LEARNED = {
    "learn2pd": {"name": "learn2pd"},
    "learn2pd_monotone": {"name": "learn2pd", "variant": "monotone"},
    "settled": {"name": "settled"},
}
"""The policy of each folder of filters."""


def learned_policies(model):
    """The policies for which the model has a filter."""
    return [LEARNED[folder.name] for folder in sorted(folder_of(model).glob("policies/*"))]


def random_requests(policies, count, seed=0):
    """(prompt, policy) of held-out prompts, each with one of the policies."""
    rng = random.Random(seed)
    lines = heldout_prompts().read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in rng.sample(lines, count)]
    return [(prompt, rng.choice(policies)) for prompt in prompts]


def some_cancelled(cases):
    """Five hundred cases, each with whether its client closes the connection early; 100 do."""
    rng = random.Random(2)
    cancelled = set(rng.sample(range(500), 100))
    return [(rng.choice(cases), i in cancelled) for i in range(500)]


def decoded(
    model_name, requests, max_new_tokens, *, dtype=torch.float32, ignores_end=False, cache=None
):
    """The cases of these (prompt, policy), decoded by transformers. ignores_end: the answers
    continue after the end of text, and have max_new_tokens tokens each."""
    model, tokenizer = load(model_name, dtype=dtype)
    made = []
    for start in range(0, len(requests), 25):
        batch = requests[start : start + 25]
        templated = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt, _ in batch
        ]
        inputs = tokenizer(templated, padding=True, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            unmask_policy=[policy for _, policy in batch],
            end_of_text="off" if ignores_end else "block",
            cache=cache,
            return_dict_in_generate=True,
        )
        answers = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        for row, length in enumerate(out.trace.length.tolist()):
            prompt, policy = batch[row]
            length = max_new_tokens if ignores_end else length
            tokens = answers[row][:length]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            committed_at = out.trace.committed_at[row, :length].tolist()
            made.append(Case(prompt, templated[row], policy, tokens, text, committed_at))
    return made
