"""The questions of a soak, each with the answer of the transformers adapter."""

import json
import random
from collections import defaultdict
from dataclasses import dataclass

import torch

from l2pd_adapters.tiny_models import heldout_prompts
from tests.engines.cases import Case, decoded

MODEL = "tiny-sdar"
PROMPTS = 40
SERVERS_OWN = {"name": "confidence_threshold"}
"""The policy of both documented commands, for requests that name none."""
SETTINGS = (
    None,
    {"name": "confidence_threshold", "threshold": 0.6},
    {"name": "confidence_threshold", "threshold": 0.8},
    {"name": "confidence_threshold", "threshold": 0.95},
    {"name": "fixed_schedule"},
    {"name": "fixed_schedule", "tokens_per_step": 4},
    {"name": "fixed_schedule", "steps": 8},
    {"name": "learn2pd"},
    {"name": "learn2pd", "threshold": 0.9},
    {"name": "settled"},
    {"name": "settled", "risk": 0.3},
    {"name": "eb_sampler"},
    {"name": "eb_sampler", "gamma": 0.5},
    {"name": "dream_entropy", "tokens_per_step": 2},
    {"name": "klass"},
    {"name": "credit"},
    {"name": "cora"},
    {"name": "saber"},
    {"name": "persistent"},
)
"""Policies with their options; None: the request names none."""
LENGTHS = {16: 25, 24: 20, 32: 20, 48: 12, 64: 12, 128: 8, 600: 3}
"""How many of a hundred questions ask for so many tokens."""


@dataclass(frozen=True)
class Question:
    """A request that has an answer."""

    case: Case
    names_policy: bool
    max_tokens: int
    ignores_end: bool


@dataclass(frozen=True)
class Pool:
    """Questions, and how many were left out."""

    questions: list
    near_ties: int
    """Questions whose answer depends on rounding: transformers answers otherwise in float64."""


def made(count, seed, longest):
    """The pool of so many questions, of which none asks for more than `longest` tokens.

    An engine computes the same numbers as transformers in another order, so its logits differ in
    the last bits. Where two tokens or a threshold are that near to each other, either answer is
    right. Such questions are left out, so every other answer than that of transformers is wrong.
    """
    rng = random.Random(seed)
    lines = heldout_prompts().read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in rng.sample(lines, PROMPTS)]
    pairs = [(prompt, setting) for prompt in prompts for setting in SETTINGS]
    groups = defaultdict(list)
    for prompt, setting in rng.sample(pairs, min(count, len(pairs))):
        (length,) = rng.choices(list(LENGTHS), LENGTHS.values())
        ignores_end = length >= 64 and rng.random() < 0.3
        groups[min(length, longest), ignores_end].append((prompt, setting))
    questions, near_ties = [], 0
    for (length, ignores_end), asked in groups.items():
        requests = [(prompt, setting or SERVERS_OWN) for prompt, setting in asked]
        answers, exact = (
            decoded(MODEL, requests, length, ignores_end=ignores_end, dtype=dtype)
            for dtype in (torch.float32, torch.float64)
        )
        for (_, setting), case, check in zip(asked, answers, exact, strict=True):
            if case == check:
                questions.append(Question(case, setting is not None, length, ignores_end))
            else:
                near_ties += 1
    rng.shuffle(questions)
    return Pool(questions, near_ties)
