"""`suppress_mask=False`: a predicted mask leaves its position masked, as in LLaDA's code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins import create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.policy import UnmaskPolicy

VOCABULARY, EOT = 9, 7
OFF = EndOfText("off", ())


def logits_of(row: int, time: int, length: int, mask: int, share: float) -> torch.Tensor:
    """Logits (L, V) that predict the mask token at about `share` of the positions."""
    generator = torch.Generator().manual_seed(1000 * row + time)
    logits = torch.randn(length, VOCABULARY, generator=generator) * 2
    logits[torch.rand(length, generator=generator) < share, mask] = 9.0
    return logits


def start(length: int, policies, mask: int) -> BlockBatch:
    tokens = torch.full((len(policies), length), mask)
    return BlockBatch.start(tokens, policies, mask_token_id=mask)


def as_llada(logits, tokens: list[int], count: int, mask: int) -> list[int]:
    """One step of LLaDA's `generate`: the `count` most confident masked positions get their
    predictions; a position is masked afterwards if its token is the mask token."""
    p = logits.double().softmax(-1)
    x0 = logits.argmax(-1).tolist()
    ranked = sorted(
        (at for at, token in enumerate(tokens) if token == mask),
        key=lambda at: -p[at, x0[at]].item(),
    )
    return [x0[at] if at in ranked[:count] else token for at, token in enumerate(tokens)]


@given(
    length=st.integers(1, 8),
    count=st.integers(1, 3),
    mask=st.sampled_from([0, 3, 8]),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(0, 999),
)
def test_the_first_steps_are_those_of_llada(length, count, mask, share, seed):
    batch = start(length, [create_policy("fixed_schedule", tokens_per_step=count)], mask)
    wanted = [mask] * length
    for step in range(length):
        logits = logits_of(seed, step, length, mask, share)
        wanted = as_llada(logits, wanted, count, mask)
        outcome = denoising_step(batch, logits[None], end_of_text=OFF, suppress_mask=False)
        assert batch.tokens[0].tolist() == wanted
        assert batch.masked[0].tolist() == [token == mask for token in wanted]
        assert not outcome.committed[0][batch.masked[0]].any()


@given(
    length=st.integers(1, 7),
    mask=st.sampled_from([0, 8]),
    name=st.sampled_from(["fixed_schedule", "confidence_threshold", "cora", "saber"]),
    late=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_a_block_ends_within_two_steps_per_position(length, mask, name, late, seed):
    """The model predicts only masks here; a row that began later has its own count."""
    policy = create_policy(name)
    batch, other = start(length, [policy], mask), start(length, [policy], mask)
    alone = start(length, [policy], mask)
    steps = [0, 0]
    for time in range(late + 2 * length):
        logits = logits_of(seed, time, length, mask, 1.0)[None]
        if time == late:
            batch = BlockBatch.gather([(batch, 0), (other, 0)])
        if time >= late:
            logits = torch.cat([logits, logits_of(seed + 1, time, length, mask, 1.0)[None]])
            denoising_step(alone, logits[1:], end_of_text=OFF, suppress_mask=False)
        before = batch.masked.sum(-1)
        denoising_step(batch, logits, end_of_text=OFF, suppress_mask=False)
        for row, fewer in enumerate((batch.masked.sum(-1) < before).tolist()):
            assert fewer == (length <= steps[row] < 2 * length and before[row] > 0)
            steps[row] += 1
        if time >= late:
            assert batch.tokens[1].tolist() == alone.tokens[0].tolist()
    assert not batch.masked.any()
    assert (batch.tokens != mask).all()


def test_the_next_block_of_a_row_counts_from_zero():
    batch = start(2, [create_policy("fixed_schedule")], 8)
    masks = torch.zeros(1, 2, VOCABULARY)
    masks[..., 8] = 5.0
    for _ in range(4):
        denoising_step(batch, masks, end_of_text=OFF, suppress_mask=False)
    assert not batch.masked.any()
    batch.advance([0], torch.full((1, 2), 8))
    for _ in range(2):
        denoising_step(batch, masks, end_of_text=OFF, suppress_mask=False)
        assert batch.masked.all()


@pytest.mark.parametrize("given_positions", [False, True])
def test_sampled_masks_stay_masked_until_the_argmax_replaces_them(given_positions):
    batch = start(3, [create_policy("fixed_schedule", tokens_per_step=3)], 8)
    logits = torch.zeros(1, 3, VOCABULARY)
    logits[0, :, 8] = 5.0
    logits[0, 0, 2] = 4.0
    logits[0, 1, 4] = 3.0
    drawn = torch.tensor([8, 8, 5])
    positions = torch.tensor([0, 1, 2]) if given_positions else None
    said = logits[0] if given_positions else logits

    def step():
        denoising_step(batch, said, positions, end_of_text=OFF, x0=drawn, suppress_mask=False)
        return batch.tokens[0].tolist()

    assert [step() for _ in range(3)] == [[8, 8, 5]] * 3
    assert step() == [2, 4, 5]


class Overwriting(UnmaskPolicy):
    edits = True
    requires = frozenset({"confidence", "committed"})

    def select(self, step, state):
        return ~step.masked


def test_an_edit_never_writes_a_mask():
    batch = BlockBatch.start(torch.tensor([[1, 2, 8]]), [Overwriting()], mask_token_id=8)
    logits = torch.zeros(1, 3, VOCABULARY)
    logits[0, 0, 8], logits[0, 1, 5], logits[0, 2, 6] = 9.0, 9.0, 9.0
    outcome = denoising_step(batch, logits, end_of_text=OFF, suppress_mask=False)
    assert batch.tokens.tolist() == [[1, 5, 6]]
    assert outcome.committed.tolist() == [[False, True, True]]


@pytest.mark.parametrize("statistic", ["entropy", "margin"])
def test_statistics_are_those_without_the_mask_token_once_it_is_suppressed(statistic):
    class Reading(UnmaskPolicy):
        requires = frozenset({"confidence", statistic})
        seen: torch.Tensor

        def select(self, step, state):
            self.seen = getattr(step, statistic).clone()
            return torch.zeros_like(step.masked)

    logits = logits_of(0, 0, 2, 8, 1.0)[None]
    plain, late = Reading(), Reading()
    denoising_step(start(2, [plain], 8), logits, end_of_text=OFF)
    batch = start(2, [late], 8)
    for _ in range(3):
        denoising_step(batch, logits, end_of_text=OFF, suppress_mask=False)
    assert torch.equal(late.seen, plain.seen)
