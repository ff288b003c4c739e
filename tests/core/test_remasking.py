"""Which positions a step commits, edits and masks again, and where a text ends."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.policy import RemaskingPolicy, UnmaskPolicy
from tests.core.small_blocks import (
    END,
    EOT,
    LENGTH,
    MASK,
    OFF,
    VOCABULARY,
    Noting,
    logits_of,
    masks,
)


@pytest.mark.parametrize("rule", [OFF, END])
def test_absent_positions_are_not_masked_again(rule):
    """Only present positions are masked again, and of the committed ones all but one."""

    class Wavering(RemaskingPolicy):
        def select(self, step, state):
            return step.masked

        def remask(self, step, state):
            return torch.ones_like(step.masked)

    present = torch.tensor([[False, True, True, True], [False, False, True, False]])
    batch = BlockBatch.start(masks(2), [Wavering()] * 2, mask_token_id=MASK, present=present)
    logits = logits_of(2).index_fill(-1, torch.tensor(EOT), -9.0)
    outcome = denoising_step(batch, logits, end_of_text=rule)
    assert outcome.committed.tolist() == present.tolist()
    assert outcome.remasked.sum(-1).tolist() == [2, 0]
    assert not (outcome.remasked & ~present).any()
    # The least confident ones are masked again.
    confidence = outcome.step.confidence[0, 1:]
    assert not outcome.remasked[0, 1 + int(confidence.argmax())]
    assert batch.step_index.tolist() == [1, 1]
    denoising_step(batch, logits, end_of_text=rule)
    assert batch.step_index.tolist() == [2, 1]  # a full block counts no further steps


def test_remasking_sees_the_block_after_the_commits():
    class Looking(RemaskingPolicy):
        def select(self, step, state):
            return step.masked & (torch.arange(LENGTH) < 2)

        def remask(self, step, state):
            seen.append((step.tokens.tolist(), step.masked.tolist()))
            return torch.zeros_like(step.masked)

    seen: list = []
    batch = BlockBatch.start(masks(1), [Looking()], mask_token_id=MASK)
    outcome = denoising_step(batch, logits_of(1), end_of_text=OFF)
    tokens = [*outcome.step.x0[0, :2].tolist(), MASK, MASK]
    assert seen == [([tokens], [[False, False, True, True]])]


@pytest.mark.parametrize("rule", [OFF, END])
def test_rows_of_a_policy_that_fails_to_remask_continue_beside_others(rule):
    class Wavering(RemaskingPolicy):
        fails = False

        def select(self, step, state):
            return step.masked

        def remask(self, step, state):
            if self.fails:
                raise ValueError("not today")
            return torch.ones_like(step.masked)

    bad, good = Wavering(), Wavering()
    bad.fails = True
    for policies in ([bad, good], [good, bad]):
        batch = BlockBatch.start(masks(2), policies, mask_token_id=MASK, on_error="progress")
        logits = logits_of(2)
        logits[..., EOT] = -9.0
        outcome = denoising_step(batch, logits, end_of_text=rule)
        assert outcome.remasked.sum(-1).tolist() == [
            0 if p is bad else LENGTH - 1 for p in policies
        ]


def test_an_ignored_end_of_text_may_be_masked_again():
    class Wavering(RemaskingPolicy):
        def select(self, step, state):
            return step.masked

        def remask(self, step, state):
            return step.tokens == EOT

    logits = torch.zeros(2, LENGTH, VOCABULARY)
    logits[:, :, 3] = 9.0
    logits[:, 1, EOT] = 12.0
    batch = BlockBatch.start(
        masks(2),
        [Wavering()] * 2,
        mask_token_id=MASK,
        ignores_end=torch.tensor([False, True]),
    )
    outcome = denoising_step(batch, logits, end_of_text=END)
    assert outcome.remasked.tolist() == [[False] * LENGTH, [False, True, False, False]]
    for rule in (OFF, EndOfText("off", (EOT,))):
        off = BlockBatch.start(masks(2), [Wavering()] * 2, mask_token_id=MASK)
        outcome = denoising_step(off, logits, end_of_text=rule)
        assert outcome.remasked.tolist() == [[False, True, False, False]] * 2


def test_an_edit_does_not_count_as_a_commit_for_remasking():
    """After one commit and three edits, none may be masked again: the block would never end."""

    class Wavering(RemaskingPolicy):
        edits = True
        requires = frozenset({"confidence", "committed"})

        def select(self, step, state):
            return torch.ones_like(step.masked)

        def remask(self, step, state):
            return torch.ones_like(step.masked)

    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[..., 3] = 5.0
    batch = BlockBatch.start(torch.tensor([[1, MASK, 1, 1]]), [Wavering()], mask_token_id=MASK)
    outcome = denoising_step(batch, logits, end_of_text=OFF)
    assert outcome.committed.all()
    assert not outcome.remasked.any()
    assert batch.tokens.tolist() == [[3] * LENGTH]


def test_absent_positions_are_not_filled_after_the_end():
    present = torch.tensor([[True, True, True, False]])
    batch = BlockBatch.start(masks(1), [Noting(answer=True)], mask_token_id=MASK, present=present)
    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[0, :, 3] = 2.0
    logits[0, 1, EOT] = 9.0
    outcome = denoising_step(batch, logits, end_of_text=END)
    assert outcome.behind.tolist() == [[False, False, True, False]]
    assert outcome.committed.tolist() == [[True, True, False, False]]
    assert batch.present.tolist() == [[True, True, False, False]]
    assert batch.tokens.tolist() == [[3, EOT, EOT, MASK]]


def test_positions_after_the_end_are_not_reported_as_masked_again():
    class Wavering(RemaskingPolicy):
        def select(self, step, state):
            return step.masked

        def remask(self, step, state):
            return torch.arange(LENGTH).expand_as(step.masked) >= 2

    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[0, :, 3] = 2.0
    logits[0, 1, EOT] = 9.0
    batch = BlockBatch.start(masks(1), [Wavering()], mask_token_id=MASK)
    outcome = denoising_step(batch, logits, end_of_text=END)
    assert not outcome.remasked.any()
    assert not batch.masked.any()
    assert batch.tokens.tolist() == [[3, EOT, EOT, EOT]]


def test_a_policy_with_edits_overwrites_the_positions_it_selects():
    class Editing(Noting):
        edits = True

        def select(self, step, state):
            return torch.tensor([[True, False, False, False]])

    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[..., 3] = 5.0
    tokens = torch.tensor([[1, 2, MASK, MASK]])
    batch = BlockBatch.start(tokens, [Editing("committed")], mask_token_id=MASK)
    outcome = denoising_step(batch, logits, end_of_text=OFF)
    assert outcome.committed.tolist() == [[True, False, True, False]]
    assert batch.tokens.tolist() == [[3, 2, 3, MASK]]


def test_a_text_ends_only_at_a_committed_end_of_text():
    batch = BlockBatch.start(
        masks(3),
        [Noting()] * 3,
        mask_token_id=MASK,
        ignores_end=torch.tensor([False, True, False]),
    )
    logits = torch.zeros(3, LENGTH, VOCABULARY)
    logits[:, :, 3] = 2.0
    logits[:2, 1, EOT] = 9.0
    outcome = denoising_step(batch, logits, end_of_text=END)
    assert outcome.ended.tolist() == [True, False, False]
    assert outcome.behind.sum(-1).tolist() == [LENGTH - 2, 0, 0]


@pytest.mark.parametrize("rule", ["argmax_if_empty", "leftmost_if_empty"])
def test_a_rule_for_empty_selections_does_not_change_other_selections(rule):
    class Third(UnmaskPolicy):
        progress = rule

        def select(self, step, state):
            return torch.tensor([[False, False, True, False]]) & step.masked

    batch = BlockBatch.start(masks(1), [Third()], mask_token_id=MASK)
    assert denoising_step(batch, logits_of(1), end_of_text=OFF).committed.tolist() == [
        [False, False, True, False]
    ]
    assert denoising_step(batch, logits_of(1), end_of_text=OFF).committed.sum() == 1
