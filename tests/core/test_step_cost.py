"""The cost of a step in operators: flat in the number of option values, linear in policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.plugins import bind_policy
from l2pd_plugins.slots import BlockSlots

ROWS, LENGTH, VOCABULARY, MASK = 256, 8, 16, 15
END = EndOfText("block", (14,))
MODEL = ModelContext("test", LENGTH, MASK, VOCABULARY)
OWN = {
    "confidence_threshold": lambda share: {"threshold": share},
    "klass": lambda share: {"threshold": share, "kl_threshold": share},
    "saber": lambda share: {"n": 1 + int(7 * share)},
    "hierarchy": lambda share: {"low_threshold": share},
}
EIGHT = (
    "confidence_threshold",
    "fixed_schedule",
    "fast_dllm_factor",
    "frechet",
    "eb_sampler",
    "klass",
    "saber",
    "hierarchy",
)


class Operators(TorchDispatchMode):
    """Counts the operators that run inside it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def made(name: str, **options: object) -> UnmaskPolicy:
    return bind_policy(create_policy(name, **options), MODEL)


def in_batch(policies: list[UnmaskPolicy]) -> int:
    """A block's first two steps in transformers' batch, and the next block."""
    tokens = torch.full((len(policies), LENGTH), MASK)
    logits = torch.randn(len(policies), LENGTH, VOCABULARY)
    with Operators() as operators:
        batch = BlockBatch.start(tokens, policies, mask_token_id=MASK)
        for _ in range(2):
            denoising_step(batch, logits, end_of_text=END)
        batch.keep(range(1, len(policies)))
        batch.advance([3, 1], tokens[:2])
    return operators.count


def in_slots(policies: list[UnmaskPolicy]) -> int:
    """A step of a server's slots."""
    device = torch.device("cpu")
    slots = BlockSlots(len(policies), LENGTH, mask_token_id=MASK, device=device)
    for slot, policy in enumerate(policies):
        slots.assign(slot, policy, [MASK] * LENGTH, [True] * LENGTH)
    logits = torch.randn(len(policies), LENGTH, VOCABULARY)
    with Operators() as operators:
        batch = slots.take(np.arange(len(policies)))
        denoising_step(batch.block, logits, end_of_text=END)
        full = ~batch.block.masked.any(-1)
        batch.advance(full, batch.block.tokens, batch.block.present)
        slots.put(batch)
    return operators.count


@pytest.mark.parametrize("count", [in_batch, in_slots])
@pytest.mark.parametrize("name", OWN)
def test_rows_with_options_of_their_own_cost_about_as_much_as_rows_with_one(name, count):
    own = [made(name, **OWN[name]((row + 1) / (ROWS + 2))) for row in range(ROWS)]
    assert count(own) <= 1.3 * count([own[0]] * ROWS)


@pytest.mark.parametrize("count", [in_batch, in_slots])
def test_eight_policies_cost_at_most_eight_times_one(count):
    policies = [made(name) for name in EIGHT]
    eight = [policies[row % len(policies)] for row in range(ROWS)]
    assert count(eight) <= 8 * count([policies[0]] * ROWS)
