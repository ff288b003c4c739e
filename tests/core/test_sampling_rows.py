"""Rows that draw in a batch and in slots, through the denoising step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from l2pd_plugins import UnmaskPolicy, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.sampling import Sampling, log_probabilities
from l2pd_plugins.slots import BlockSlots

LENGTH, VOCABULARY, MASK = 4, 12, 11
CPU = torch.device("cpu")
OFF = EndOfText("off", ())


class Few(UnmaskPolicy):
    """Commits one position in two."""

    def select(self, step, state):
        return step.masked & (torch.arange(LENGTH) % 2 == step.step_index.unsqueeze(-1) % 2)


def some_logits(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, LENGTH, VOCABULARY, generator=generator) * 2


def test_places_have_to_fit_the_logits():
    batch = BlockBatch.start(
        torch.full((1, LENGTH), MASK), [Few()], mask_token_id=MASK, sampling=[Sampling(1)]
    )
    with pytest.raises(ValueError, match="on the host"):
        denoising_step(batch, some_logits(1)[0], torch.arange(LENGTH), end_of_text=OFF)
    with pytest.raises(ValueError, match="3 places for 4 rows"):
        denoising_step(batch, some_logits(1), places=[0, 1, 2], end_of_text=OFF)


def decode(rows, blocks=2, seed=0):
    """The tokens of each row, (B, blocks * L), and all confidences at the commit."""
    policy, fresh = Few(), torch.full((len(rows), LENGTH), MASK)
    batch = BlockBatch.start(fresh, [policy] * len(rows), mask_token_id=MASK, sampling=rows)
    made = []
    for block in range(blocks):
        step = 0
        while batch.masked.any():
            denoising_step(batch, logits_at(len(rows), block, step, seed), end_of_text=OFF)
            step += 1
        made.append(batch.tokens)
        batch.advance([*range(len(rows))], fresh)
    return torch.cat(made, dim=1)


def logits_at(rows: int, block: int, step: int, seed: int) -> torch.Tensor:
    one = some_logits(1000 * seed + 10 * block + step)
    return one.expand(rows, LENGTH, VOCABULARY)


def test_a_greedy_row_does_not_notice_neighbours_that_draw():
    greedy = decode([None, None])
    mixed_rows = decode([None, Sampling(1, 1.5), None])
    assert torch.equal(mixed_rows[[0, 2]], greedy)
    assert not torch.equal(mixed_rows[1], greedy[0])
    assert torch.equal(decode([Sampling(1, 1.5)])[0], mixed_rows[1])
    assert not torch.equal(decode([Sampling(2, 1.5)])[0], mixed_rows[1])


def test_the_confidence_of_a_drawn_token_is_its_probability_before_the_filters():
    batch = BlockBatch.start(
        torch.full((1, LENGTH), MASK),
        [Few()],
        mask_token_id=MASK,
        sampling=[Sampling(3, 1.5, top_k=4)],
    )
    logits = some_logits(9)
    outcome = denoising_step(batch, logits, end_of_text=OFF)
    exact = logits.double()
    exact[..., MASK] = -torch.inf
    wanted = exact.log_softmax(-1).gather(-1, outcome.step.x0.unsqueeze(-1)).squeeze(-1)
    assert not torch.equal(outcome.step.x0, exact.argmax(-1))
    torch.testing.assert_close(
        log_probabilities(outcome.step.confidence).double(), wanted, rtol=0, atol=1e-5
    )


def test_gathered_kept_and_preempted_rows_continue_with_their_draws():
    rows = [Sampling(5, 1.4), None, Sampling(6, 1.4, top_p=0.9)]
    whole = decode(rows)

    def begin(which, block):
        return BlockBatch.start(
            torch.full((len(which), LENGTH), MASK),
            [Few()] * len(which),
            mask_token_id=MASK,
            sampling=[rows[at] for at in which],
            block_index=torch.full((len(which),), block),
        )

    def step(batch, at):
        denoising_step(batch, logits_at(len(batch.policies), 1, at, 0), end_of_text=OFF)

    apart = [begin([0], 1), begin([1, 2], 1)]
    for batch in apart:
        step(batch, 0)
    joined = BlockBatch.gather([(apart[1], 1), (apart[0], 0), (apart[1], 0)])
    joined.keep([1, 0])
    step(joined, 1)
    assert torch.equal(joined.tokens, whole[[0, 2], LENGTH:])
    alone = BlockBatch.gather([(begin([1, 0], 1), 0)])
    assert alone.sampling is None

    slots = BlockSlots(5, LENGTH, mask_token_id=MASK, device=CPU)
    for slot, row in ((4, 0), (1, 1), (2, 2)):  # begun again after a preemption
        slots.assign(
            slot,
            Few(),
            [MASK] * LENGTH,
            [True] * LENGTH,
            block_index=1,
            sampling=rows[row],
        )
    for at in range(2):
        taken = slots.take(np.array([1, 4, 2]))
        step(taken.block, at)
        slots.put(taken)
    assert torch.equal(slots.tokens[[4, 1, 2]], whole[:, LENGTH:])
    slots.assign(4, Few(), [MASK] * LENGTH, [True] * LENGTH)  # another request in the same slot
    assert slots.take(np.array([4, 1])).block.sampling is None


def test_a_block_that_looks_at_committed_positions_draws_only_masked_ones():
    class Whole(Few):
        requires = frozenset({"committed"})

    seen = []
    for policy in (Few(), Whole()):
        batch = BlockBatch.start(
            torch.full((1, LENGTH), MASK),
            [policy],
            mask_token_id=MASK,
            sampling=[Sampling(5, 1.4)],
        )
        for at in range(2):
            outcome = denoising_step(batch, logits_at(1, 0, at, 0), end_of_text=OFF)
        seen.append((batch.tokens, outcome.step))
    assert torch.equal(seen[0][0], seen[1][0])
    step = seen[1][1]
    best = logits_at(1, 0, 1, 0)[..., :MASK].argmax(-1)
    assert torch.equal(step.x0[~step.masked], best[~step.masked])


def test_nothing_is_read_back():
    with FakeTensorMode():
        device = torch.device("lazy")
        rows = [None, Sampling(1), Sampling(2, top_k=3), Sampling(3, top_p=0.5, min_p=0.1)]
        batch = BlockBatch.start(
            torch.full((4, LENGTH), MASK, device=device),
            [create_policy("fixed_schedule")] * 4,
            mask_token_id=MASK,
            sampling=rows,
        )
        logits = torch.empty(4, LENGTH, 2000, device=device)
        denoising_step(batch, logits, end_of_text=OFF)
        positions = torch.zeros(5, dtype=torch.int64, device=device)
        denoising_step(
            batch, logits.flatten(0, 1)[:5], positions, places=[*range(5)], end_of_text=OFF
        )
        assert batch.tokens.device == device
