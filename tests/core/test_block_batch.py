"""A batch of blocks: how it starts, and what its policies get to see."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.errors import PolicyRuntimeError
from l2pd_plugins.policy_calls import prepare
from tests.core.misbehaviour import Steady
from tests.core.small_blocks import (
    LENGTH,
    MASK,
    OFF,
    Failing,
    Noting,
    fields_of,
    logits_of,
    masks,
    started,
)


def test_a_resumed_batch_raises_errors_by_default():
    runner, state = prepare(Failing(), 1, masks(1), "raise")
    batch = BlockBatch.resume([([0], runner, state)], **fields_of(1))
    with pytest.raises(PolicyRuntimeError, match="not today"):
        denoising_step(batch, logits_of(1), end_of_text=OFF)


def test_resumed_rows_keep_their_policies():
    policies = [Noting(), Noting("entropy")]
    groups = []
    for rows, policy in (([2, 0], policies[0]), ([1], policies[1])):
        runner, state = prepare(policy, len(rows), masks(len(rows)), "raise")
        groups.append((rows, runner, state))
    batch = BlockBatch.resume(groups, **fields_of(3))
    assert batch.policies == [policies[0], policies[1], policies[0]]
    assert batch.requires == {"confidence", "entropy"}
    denoising_step(batch, logits_of(3), end_of_text=OFF)
    assert [len(policy.seen[0].masked) for policy in policies] == [2, 1]
    assert BlockBatch.resume([], **fields_of(0)).policies == []


def test_repr_of_a_batch_leaves_out_internal_fields():
    shown = repr(started([Steady()]))
    assert "tokens=" in shown
    assert ", _" not in shown


def test_every_row_has_its_own_step_and_block_index():
    policy = Noting()
    batch = started(
        [policy] * 2,
        block_index=torch.tensor([3, 0]),
        canvas_length=torch.tensor([40, 20]),
    )
    denoising_step(batch, logits_of(2), end_of_text=OFF)
    plain = started([policy] * 2)
    denoising_step(plain, logits_of(2), end_of_text=OFF)
    placed, first = policy.seen
    assert placed.block_index.tolist() == [3, 0]
    assert placed.canvas_length.tolist() == [40, 20]
    assert (first.block_index.tolist(), first.canvas_length.tolist()) == ([0, 0], [LENGTH] * 2)
    assert first.step_index.dtype == first.block_index.dtype == torch.int64
    # Each row has its own count: a row that advances changes no other.
    plain.advance([1], masks(1))
    assert plain.step_index.tolist() == [1, 0]
    assert plain.block_index.tolist() == [0, 1]


def test_a_stand_in_has_the_name_of_the_policy_that_it_replaces():
    class Unready(Steady):
        def init_state(self, batch_size, block_length, device):
            raise ValueError("not today")

    batch = started([Unready()], on_error="progress")
    assert [policy.name for policy in batch.policies] == ["unready"]


@pytest.mark.parametrize("some", [False, True])
def test_a_policy_is_shown_the_logits_of_its_own_rows(some):
    reading, plain = Noting("logits"), Noting()
    batch = started([plain, reading])
    logits = logits_of(2)
    given, positions = logits, None
    if some:
        given, positions = logits.flatten(0, 1), torch.arange(2 * LENGTH)
    denoising_step(batch, given, positions, end_of_text=OFF)
    assert not plain.seen[0].has("logits")
    assert torch.equal(reading.seen[0].logits, logits[1:])


def test_committed_positions_are_certain_for_policies_that_do_not_require_them():
    """This includes entropy and margin, and holds beside a policy that sees committed positions."""
    plain, asking = Noting("entropy", "margin"), Noting("entropy", "margin", "committed")
    batch = started([plain, asking])
    outcome = denoising_step(batch, logits_of(2), end_of_text=OFF)
    denoising_step(batch, logits_of(2, 1), end_of_text=OFF)
    place = int(outcome.committed[0].long().argmax())
    seen = plain.seen[1]
    assert seen.x0[0, place] == seen.tokens[0, place] != MASK
    assert seen.confidence[0, place] == seen.margin[0, place] == 1
    assert seen.entropy[0, place] == 0
    masked = seen.masked[0]
    assert (seen.entropy[0][masked] > 0).all()
    assert (seen.margin[0][masked] < 1).all()
    other = asking.seen[1]
    assert (other.entropy > 0).all()
    assert (other.margin < 1).all()


def test_absent_positions_have_no_statistics():
    policy = Noting("entropy", "margin", "committed")
    present = torch.tensor([[True, True, False, False]])
    batch = started([policy], present=present)
    assert batch.needed().tolist() == present.tolist()
    denoising_step(batch, logits_of(1), end_of_text=OFF)
    for name in ("confidence", "entropy", "margin"):
        assert getattr(policy.seen[0], name)[0, 2:].tolist() == [0, 0], name


def test_full_blocks_need_no_logits():
    policy = Noting("committed")
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, MASK, 4]])
    batch = BlockBatch.start(tokens, [policy] * 2, mask_token_id=MASK)
    assert batch.reads_committed
    assert batch.needed().tolist() == [[False] * LENGTH, [True] * LENGTH]
    assert not BlockBatch.start(tokens, [Noting()] * 2, mask_token_id=MASK).reads_committed


def test_only_required_statistics_are_computed():
    outcome = denoising_step(started([Noting()]), logits_of(1), end_of_text=OFF)
    step = outcome.step
    assert not any(map(step.has, ("entropy", "margin", "logits", "reference")))
    with_entropy = started([Noting("entropy")])
    step = denoising_step(with_entropy, logits_of(1), end_of_text=OFF).step
    assert step.has("entropy")
    assert not step.has("margin")


def test_sampled_tokens_are_the_predictions():
    for some in (False, True):
        batch = started([Noting(answer=True)] * 2)
        logits, positions = logits_of(2), None
        drawn = torch.arange(2 * LENGTH) % 7
        if some:
            logits, positions = logits.flatten(0, 1), torch.arange(2 * LENGTH)
        outcome = denoising_step(batch, logits, positions, end_of_text=OFF, x0=drawn)
        assert batch.tokens.flatten().tolist() == drawn.tolist()
        p = logits_of(2).index_fill(-1, torch.tensor(MASK), -torch.inf).softmax(-1)
        wanted = p.gather(-1, drawn.view(2, LENGTH, 1)).squeeze(-1)
        assert torch.allclose(outcome.step.confidence, wanted, atol=1e-6)


@pytest.mark.parametrize("position", [None, torch.arange(3)])
def test_too_few_logits_are_refused_if_no_positions_are_given(position):
    batch = BlockBatch.start(torch.tensor([[MASK, MASK, MASK, 1]]), [Noting()], mask_token_id=MASK)
    logits = logits_of(1).flatten(0, 1)[:3]
    if position is None:
        with pytest.raises(ValueError, match="logits of 3 rows for 1 blocks of 4 positions"):
            denoising_step(batch, logits, end_of_text=OFF)
    else:
        assert denoising_step(batch, logits, position, end_of_text=OFF).committed.sum() == 1


class Spoiling(Noting):
    """Writes to its step, and fails."""

    def select(self, step, state):
        step.tokens.zero_()
        step.masked.zero_()
        step.confidence.zero_()
        step.block_index.add_(5)
        for name in ("x0", "entropy", "margin", "logits"):
            if step.has(name):
                getattr(step, name).zero_()
        return super().select(step, state)


@pytest.mark.parametrize("requires", [(), ("entropy",), ("logits", "entropy", "margin")])
@pytest.mark.parametrize("beside", [False, True])
def test_writes_of_a_policy_change_neither_the_block_nor_the_step(beside, requires):
    others = [Steady()] * beside
    bad = started([Spoiling(*requires), *others], on_error="progress")
    good = started([Noting(*requires), *others], on_error="progress")
    for seed in range(LENGTH):
        rows = len(bad.tokens)
        spoilt = denoising_step(bad, logits_of(rows, seed), end_of_text=OFF)
        sound = denoising_step(good, logits_of(rows, seed), end_of_text=OFF)
        assert torch.equal(bad.tokens, good.tokens)
        assert torch.equal(bad.block_index, good.block_index)
        # From the second step on, a stand-in runs, which requires nothing.
        shown = ("x0", "confidence", *requires) if not seed else ("x0", "confidence")
        for name in set(shown) - {"logits"}:
            found, wanted = getattr(spoilt.step, name), getattr(sound.step, name)
            assert torch.equal(found, wanted), name
        assert torch.equal(spoilt.committed, sound.committed)
    assert not bad.masked.any()
    # The policy is not called again.
    assert len(bad.policies) == len(good.policies)
    assert bad.policies[0].name == "spoiling"
    assert not isinstance(bad.policies[0], Spoiling)


def test_a_policy_that_raises_is_called_again():
    policy = Failing()
    batch = started([policy], on_error="progress")
    denoising_step(batch, logits_of(1), end_of_text=OFF)
    assert batch.policies == [policy]


@pytest.mark.parametrize("mask", [0, 8])
@pytest.mark.parametrize("some", [False, True])
def test_a_row_predicts_no_mask_from_its_last_step_on(mask, some):
    """This applies to rows that have taken L steps without suppress_mask, for any mask token."""
    policy = Noting("entropy", "margin", "committed", answer=True)
    tokens = torch.full((2, LENGTH), mask)
    batch = BlockBatch.start(tokens, [policy] * 2, mask_token_id=mask)
    batch.step_index = torch.tensor([LENGTH - 1, LENGTH])
    logits = logits_of(2)
    logits[..., mask] = 9.0
    drawn = torch.full((2, LENGTH), 5)
    drawn[:, 1] = mask
    given, positions = logits, None
    if some:
        given, positions = logits.flatten(0, 1), torch.arange(2 * LENGTH)
    outcome = denoising_step(
        batch, given, positions, end_of_text=OFF, x0=drawn.flatten(), suppress_mask=False
    )
    without = logits.index_fill(-1, torch.tensor(mask), -torch.inf)
    highest = int(without[1, 1].argmax())
    assert outcome.step.x0.tolist() == [[5, mask, 5, 5], [5, highest, 5, 5]]
    for row, shown in ((0, logits), (1, without)):
        p = shown[row].double().softmax(-1)
        two = p.topk(2).values
        wanted = {
            "confidence": p.gather(-1, outcome.step.x0[row, :, None]).squeeze(-1),
            "entropy": torch.special.entr(p).sum(-1),
            "margin": two[:, 0] - two[:, 1],
        }
        for name, values in wanted.items():
            found = getattr(outcome.step, name)[row].double()
            assert torch.allclose(found, values, atol=1e-5), name
    assert batch.tokens.tolist() == [[5, mask, 5, 5], [5, highest, 5, 5]]
    assert batch.masked.tolist() == [[False, True, False, False], [False] * LENGTH]


def test_statistics_that_others_require_are_not_shown_with_committed_positions():
    plain, asking = Noting(), Noting("entropy", "margin", "committed")
    batch = started([plain, asking])
    denoising_step(batch, logits_of(2), end_of_text=OFF)
    assert not plain.seen[0].has("entropy")
    assert not plain.seen[0].has("margin")
    assert asking.seen[0].has("entropy")
    assert asking.seen[0].has("margin")


def test_committed_positions_are_needed_only_by_policies_that_require_them():
    tokens = torch.tensor([[1, MASK, MASK, 1]] * 2)
    batch = BlockBatch.start(tokens, [Noting(), Noting("committed")], mask_token_id=MASK)
    assert batch.needed().tolist() == [[False, True, True, False], [True] * LENGTH]
