"""Everything stays on the device of the tokens, and nothing is read back to the host.

No accelerator is needed: PyTorch's fake tensors track shapes and devices without values. For them,
an operation on tensors of two devices is an error, and so is reading a value.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from l2pd_plugins import create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.policy import RemaskingPolicy
from l2pd_plugins.selection import leftmost, ranks, top_1, top_k
from l2pd_plugins.slots import BlockSlots
from l2pd_plugins.statistics import row_statistics

DEVICE = torch.device("lazy")  # any device that this build of PyTorch knows, except the CPU
MASK, EOT, VOCABULARY, LENGTH = 10, 9, 11, 5
EVERYTHING = frozenset({"confidence", "entropy", "margin"})
RULES = [EndOfText(rule, (EOT,)) for rule in ("block", "predicted", "off")]


class Wavering(RemaskingPolicy):
    """Reads every field, masks tokens again, edits, and has a state."""

    requires = EVERYTHING | {"committed", "logits"}
    edits = True

    def init_state(self, batch_size, block_length, device):
        return {"steps": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def select(self, step, state):
        state["steps"] = state["steps"] + 1
        return (step.confidence > 0.5) & (step.entropy < 1) & (step.logits.amax(-1) > 0)

    def remask(self, step, state):
        return step.margin < 0.1


@pytest.fixture(autouse=True)
def _fake():
    with FakeTensorMode():
        yield


def test_the_check_detects_a_read_and_a_mix_of_devices():
    here, there = torch.empty(3), torch.empty(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="devices"):
        here + there
    with pytest.raises(DataDependentOutputException):
        bool(there.any())


def test_selection():
    score = torch.empty(2, LENGTH, device=DEVICE)
    candidates = score > 0
    limit = torch.ones(2, dtype=torch.int64, device=DEVICE)
    found = (
        ranks(score, candidates),
        top_1(score, candidates),
        top_k(score, candidates, limit),
        top_k(score, candidates, 2),
        leftmost(candidates),
    )
    assert {(each.device, each.shape) for each in found} == {(DEVICE, (2, LENGTH))}


@pytest.mark.parametrize("suppress", [None, 3])
@pytest.mark.parametrize("given", [False, True])
def test_the_statistics_that_run_on_any_device(suppress, given):
    logits = torch.empty(7, 1000, device=DEVICE, dtype=torch.bfloat16)
    index = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    found = row_statistics(
        logits, EVERYTHING, suppress, rows=index, x0=index if given else None, kernel="eager"
    )
    assert {each.device for each in vars(found).values()} == {DEVICE}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
@pytest.mark.parametrize("some", [False, True])
def test_the_step(rule, some):
    tokens = torch.full((4, LENGTH), MASK, device=DEVICE)
    schedule, wavering = create_policy("fixed_schedule"), Wavering()
    batch = BlockBatch.start(tokens, [schedule, wavering, wavering, schedule], mask_token_id=MASK)
    for _ in range(2):
        logits, positions = torch.empty(4, LENGTH, VOCABULARY, device=DEVICE), None
        if some:
            logits = logits.flatten(0, 1)
            positions = torch.zeros(4 * LENGTH, dtype=torch.int64, device=DEVICE)
        outcome = denoising_step(batch, logits, positions, end_of_text=rule)
        assert {batch.tokens.device, outcome.committed.device} == {DEVICE}
    batch.advance([0, 2], torch.full((2, LENGTH), MASK, device=DEVICE))
    other = BlockBatch.start(tokens[:1], [wavering], mask_token_id=MASK)
    joined = BlockBatch.gather([(other, 0), (batch, 2), (batch, 0)])
    denoising_step(joined, torch.empty(3, LENGTH, VOCABULARY, device=DEVICE), end_of_text=rule)
    assert {each.device for state in joined.states for each in state.values()} == {DEVICE}


def test_the_slots():
    slots = BlockSlots(6, LENGTH, mask_token_id=MASK, device=DEVICE)
    for slot, policy in enumerate([create_policy("fixed_schedule"), Wavering(), Wavering()]):
        slots.assign(slot, policy, [MASK] * LENGTH, [True] * LENGTH)
    taken = slots.take(np.array([2, 0, 1]))
    logits = torch.empty(3, LENGTH, VOCABULARY, device=DEVICE)
    denoising_step(taken.block, logits, end_of_text=RULES[0])
    full = ~taken.block.masked.any(-1)
    taken.advance(full, torch.full_like(taken.block.tokens, MASK), taken.block.present)
    slots.put(taken)
    assert slots.tokens.device == DEVICE


@pytest.mark.parametrize("some", [False, True])
def test_a_step_without_suppress_mask_that_looks_ahead(some):
    class Ahead(Wavering):
        requires = Wavering.requires | {"ahead", "reference"}

    tokens = torch.full((2, LENGTH), MASK, device=DEVICE)
    batch = BlockBatch.start(tokens, [Ahead()] * 2, mask_token_id=MASK, reference=tokens)
    batch.look_ahead([0, 1, 1], torch.full((3, LENGTH), MASK, device=DEVICE))
    logits, positions = torch.empty(2, LENGTH, VOCABULARY, device=DEVICE), None
    every = torch.zeros(3 * LENGTH, dtype=torch.int64, device=DEVICE)
    if some:
        logits, positions = logits.flatten(0, 1), every[: 2 * LENGTH]
    outcome = denoising_step(
        batch,
        logits,
        positions,
        end_of_text=RULES[0],
        suppress_mask=False,
        later=(torch.empty(3 * LENGTH, VOCABULARY, device=DEVICE), every),
    )
    batch.advance([1], tokens[:1], reference=tokens[:1])
    assert {outcome.committed.device, batch.masked.device, batch.reference.device} == {DEVICE}
