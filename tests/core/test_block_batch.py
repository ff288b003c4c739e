"""A batch of blocks: its defaults, its fields, and what its rows keep when they move."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins.denoising import BlockBatch, denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import PolicyRuntimeError
from l2pd_plugins.policy import DenoisingStep, RemaskingPolicy, UnmaskPolicy
from l2pd_plugins.policy_calls import prepare
from tests.core.misbehaviour import Steady

LENGTH, VOCABULARY, MASK, EOT = 4, 9, 8, 7
OFF, END = EndOfText("off", ()), EndOfText("block", (EOT,))


class Failing(UnmaskPolicy):
    def select(self, step, state):
        raise ValueError("not today")


class Noting(UnmaskPolicy):
    """Notes the steps it is shown and selects nothing."""

    def __init__(self, *requires: str, answer: bool = False) -> None:
        self.requires = frozenset({"confidence", *requires})
        self.answer = answer
        self.seen: list[DenoisingStep] = []

    def select(self, step, state):
        self.seen.append(step)
        return torch.full_like(step.masked, self.answer)


def masks(rows: int) -> torch.Tensor:
    return torch.full((rows, LENGTH), MASK)


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, LENGTH, VOCABULARY, generator=generator) * 2


def fields_of(rows: int) -> dict[str, torch.Tensor | int]:
    """The fields of a batch at its first step, for `BlockBatch.resume`."""
    zeros = torch.zeros(rows, dtype=torch.int64)
    return {
        "tokens": masks(rows),
        "masked": torch.ones(rows, LENGTH, dtype=torch.bool),
        "present": torch.ones(rows, LENGTH, dtype=torch.bool),
        "step_index": zeros,
        "block_index": zeros,
        "canvas_length": zeros + LENGTH,
        "mask_token_id": MASK,
        "ignores_end": zeros.bool(),
    }


def test_a_batch_that_is_resumed_raises_unless_told_otherwise():
    runner, state = prepare(Failing(), 1, masks(1), "raise")
    batch = BlockBatch.resume([([0], runner, state)], **fields_of(1))
    with pytest.raises(PolicyRuntimeError, match="not today"):
        denoising_step(batch, logits_of(1), end_of_text=OFF)


def test_rows_are_resumed_under_the_policies_that_ran_them():
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


def test_a_batch_is_printed_without_its_bookkeeping():
    shown = repr(BlockBatch.start(masks(1), [Steady()], mask_token_id=MASK))
    assert "tokens=" in shown
    assert ", _" not in shown


def test_every_row_knows_its_place_from_the_start():
    policy = Noting()
    batch = BlockBatch.start(
        masks(2),
        [policy] * 2,
        mask_token_id=MASK,
        block_index=torch.tensor([3, 0]),
        canvas_length=torch.tensor([40, 20]),
    )
    denoising_step(batch, logits_of(2), end_of_text=OFF)
    plain = BlockBatch.start(masks(2), [policy] * 2, mask_token_id=MASK)
    denoising_step(plain, logits_of(2), end_of_text=OFF)
    placed, first = policy.seen
    assert placed.block_index.tolist() == [3, 0]
    assert placed.canvas_length.tolist() == [40, 20]
    assert (first.block_index.tolist(), first.canvas_length.tolist()) == ([0, 0], [LENGTH] * 2)
    assert first.step_index.dtype == first.block_index.dtype == torch.int64
    # One count for each: a row that moves on changes no other.
    plain.advance([1], masks(1))
    assert plain.step_index.tolist() == [1, 0]
    assert plain.block_index.tolist() == [0, 1]


def test_what_is_observed_and_how_errors_end_is_kept_when_rows_move():
    policy = Noting()
    batch = BlockBatch.start(
        masks(3),
        [policy] * 3,
        mask_token_id=MASK,
        observe=frozenset({"margin"}),
        on_error="progress",
    )
    batch.keep([2, 0])
    assert (batch.observe, batch.on_error) == ({"margin"}, "progress")
    outcome = denoising_step(batch, logits_of(2), end_of_text=OFF)
    assert outcome.step.margin is not None
    assert policy.seen[-1].margin is None


def test_a_stand_in_bears_the_name_of_what_it_stands_in_for():
    class Unready(Steady):
        def init_state(self, batch_size, block_length, device):
            raise ValueError("not today")

    batch = BlockBatch.start(masks(1), [Unready()], mask_token_id=MASK, on_error="progress")
    assert [policy.name for policy in batch.policies] == ["unready"]


def test_rows_that_the_text_has_left_take_nothing_back():
    """Remasking keeps to what is present; of what was committed it takes back all but one."""

    class Wavering(RemaskingPolicy):
        def select(self, step, state):
            return step.masked

        def remask(self, step, state):
            return torch.ones_like(step.masked)

    present = torch.tensor([[False, True, True, True], [False, False, True, False]])
    batch = BlockBatch.start(masks(2), [Wavering()] * 2, mask_token_id=MASK, present=present)
    outcome = denoising_step(batch, logits_of(2), end_of_text=OFF)
    assert outcome.committed.tolist() == present.tolist()
    assert outcome.remasked.sum(-1).tolist() == [2, 0]
    assert not (outcome.remasked & ~present).any()
    # The least confident go back.
    confidence = outcome.step.confidence[0, 1:]
    assert not outcome.remasked[0, 1 + int(confidence.argmax())]
    assert batch.step_index.tolist() == [1, 1]
    denoising_step(batch, logits_of(2), end_of_text=OFF)
    assert batch.step_index.tolist() == [2, 1]  # a full block takes no more steps


def test_remasking_sees_the_block_as_it_stands_then():
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
def test_rows_of_a_policy_that_fails_to_remask_go_on_beside_others(rule):
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


def test_an_end_of_text_that_is_no_end_may_be_masked_again():
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
    off = BlockBatch.start(masks(2), [Wavering()] * 2, mask_token_id=MASK)
    outcome = denoising_step(off, logits, end_of_text=OFF)
    assert outcome.remasked.tolist() == [[False, True, False, False]] * 2


@pytest.mark.parametrize("some", [False, True])
def test_a_policy_is_shown_the_logits_of_its_own_rows(some):
    reading, plain = Noting("logits"), Noting()
    batch = BlockBatch.start(masks(2), [plain, reading], mask_token_id=MASK)
    logits = logits_of(2)
    given, positions = logits, None
    if some:
        given, positions = logits.flatten(0, 1), torch.arange(2 * LENGTH)
    denoising_step(batch, given, positions, end_of_text=OFF)
    assert plain.seen[0].logits is None
    assert torch.equal(reading.seen[0].logits, logits[1:])


def test_committed_positions_have_no_doubt_for_whoever_does_not_ask():
    """Beside a policy that sees committed positions too, entropy and margin as well."""
    plain, asking = Noting("entropy", "margin"), Noting("entropy", "margin", "committed")
    batch = BlockBatch.start(masks(2), [plain, asking], mask_token_id=MASK)
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


def test_absent_positions_are_nothing_for_anyone():
    policy = Noting("entropy", "margin", "committed")
    present = torch.tensor([[True, True, False, False]])
    batch = BlockBatch.start(masks(1), [policy], mask_token_id=MASK, present=present)
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
