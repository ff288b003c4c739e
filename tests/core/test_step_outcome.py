"""What a step says about who decided: the policy, its progress rule alone, or a stand-in."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.policy import RemaskingPolicy, UnmaskPolicy
from l2pd_plugins.slots import BlockSlots

LENGTH, VOCABULARY, MASK = 4, 9, 8
OFF = EndOfText("off", ())


class Selecting(UnmaskPolicy):
    """Selects these columns, whether they are masked or not."""

    def __init__(self, *columns, progress="argmax_if_empty"):
        self.columns, self.progress = columns, progress

    def select(self, step, state):
        return torch.isin(torch.arange(LENGTH), torch.tensor(self.columns)).expand_as(step.masked)


class Raising(UnmaskPolicy):
    def __init__(self, where="select"):
        self.where = where

    def init_state(self, batch_size, block_length, device):
        if self.where == "init_state":
            raise ValueError("on purpose")
        return {}

    def select(self, step, state):
        raise ValueError("on purpose")


class RaisingLater(RemaskingPolicy):
    def select(self, step, state):
        return step.masked

    def remask(self, step, state):
        raise ValueError("on purpose")


def logits():
    return torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0))


def taken(policies, masks, steps=1):
    """The outcome of the last of these steps; masks: for each row the columns that are masked."""
    tokens = torch.zeros(len(policies), LENGTH, dtype=torch.int64)
    for row, columns in enumerate(masks):
        tokens[row, columns] = MASK
    block = BlockBatch.start(tokens, policies, mask_token_id=MASK, on_error="progress")
    for _ in range(steps):
        outcome = denoising_step(block, logits().repeat(len(policies), 1, 1), end_of_text=OFF)
    return outcome


@pytest.mark.parametrize("progress", ["argmax_if_empty", "always_top1", "leftmost_if_empty"])
def test_forced_are_rows_in_which_nothing_masked_was_selected(progress):
    both, none, committed_one = (
        Selecting(*columns, progress=progress) for columns in ((1, 2), (), (0,))
    )
    outcome = taken([both, none, committed_one, both, none], [[0, 1, 2, 3], [2, 3], [1, 2], [], []])
    # A row without masks is not forced, and its committed positions were not selected.
    assert outcome.forced.tolist() == [False, True, True, False, False]
    wanted = torch.zeros(5, LENGTH, dtype=torch.bool)
    wanted[0, [1, 2]] = True
    assert torch.equal(outcome.selected, wanted)
    assert outcome.failed == frozenset()
    assert outcome.committed.any(-1).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("where", ["select", "init_state"])
def test_failed_are_the_rows_of_a_policy_that_failed_and_only_those(where):
    bad, good = Raising(where), Selecting(1)
    everything = [[0, 1, 2, 3]] * 4
    for steps in (1, 2):
        outcome = taken([good, bad, good, bad], everything, steps)
        assert outcome.failed == {1, 3}
        assert outcome.forced.tolist() == [steps == 2, True, steps == 2, True]


def test_a_failure_to_remask_is_one_too():
    outcome = taken([Selecting(1), RaisingLater()], [[0, 1], [0, 1]])
    assert outcome.failed == {1}
    assert outcome.forced.tolist() == [False, False]


def test_in_slots_a_policy_that_cannot_begin_has_failed_at_every_step():
    slots = BlockSlots(2, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))
    for slot, policy in enumerate([Raising("init_state"), Selecting(0, 1, 2, 3)]):
        slots.assign(slot, policy, [MASK] * LENGTH, [True] * LENGTH)
    for _ in range(2):
        batch = slots.take([0, 1])
        outcome = denoising_step(batch.block, logits().repeat(2, 1, 1), end_of_text=OFF)
        slots.put(batch)
        assert outcome.failed == {0}
    assert outcome.forced.tolist() == [True, False]
