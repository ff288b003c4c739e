"""Policies that edit: which positions they may overwrite, and which not."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.policy import UnmaskPolicy

VOCABULARY, MASK, EOT = 12, 11, 10


class Everything(UnmaskPolicy):
    requires = frozenset({"confidence", "committed"})
    edits = True

    def select(self, step, state):
        return torch.ones_like(step.masked)


class Edits(Everything):
    """Selects all positions that are not masked."""

    def select(self, step, state):
        return ~step.masked


def step_of(tokens, policy, rule="block", present=None, nan=(), predicted=4):
    """The tokens after one step in which `predicted` is predicted everywhere."""
    tokens = torch.tensor([tokens])
    batch = BlockBatch.start(
        tokens,
        [policy],
        mask_token_id=MASK,
        present=None if present is None else torch.tensor([present]),
    )
    logits = torch.zeros(1, tokens.shape[1], VOCABULARY)
    logits[..., predicted] = 5.0
    logits[0, list(nan)] = torch.nan
    outcome = denoising_step(batch, logits, end_of_text=EndOfText(rule, (EOT, 9)))
    return batch.tokens[0].tolist(), outcome


@pytest.mark.parametrize("rule", ["block", "predicted"])
@pytest.mark.parametrize("end", [EOT, 9])
def test_an_end_of_text_is_not_edited(rule, end):
    assert step_of([3, MASK, end], Everything(), rule)[0] == [4, 4, end]


def test_without_end_of_text_ids_every_token_may_be_edited():
    assert step_of([3, MASK, EOT], Everything(), "off")[0] == [4, 4, 4]


def test_only_present_positions_are_edited():
    tokens, outcome = step_of([3, 3, MASK, 3], Everything(), present=[True, False, True, True])
    assert tokens == [4, 3, 4, 4]
    assert outcome.committed.tolist() == [[True, False, True, True]]


def test_a_prediction_with_nan_edits_nothing():
    assert step_of([3, 3, MASK], Everything(), nan=[1])[0] == [4, 3, 4]


def test_an_edit_to_the_same_token_does_not_count():
    _, outcome = step_of([4, 3, MASK], Everything())
    assert outcome.committed.tolist() == [[False, True, True]]


def test_a_block_without_masks_is_not_edited():
    assert step_of([3, 3], Everything())[0] == [3, 3]


def test_edits_do_not_replace_the_progress():
    tokens, _ = step_of([3, MASK, MASK], Edits())
    assert tokens == [4, 4, MASK]


def test_an_edit_may_end_the_text():
    tokens, outcome = step_of([3, 3, MASK, MASK], Edits(), predicted=EOT)
    assert tokens == [EOT] * 4
    assert outcome.ended.tolist() == [True]
    assert outcome.behind.tolist() == [[False, True, True, True]]
