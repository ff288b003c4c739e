"""The masked positions follow from tokens and presence after any operation on a block. The two ways
to name the rows that advance, by host indices and by a mask on the device, are equivalent."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.slots import BlockSlots, SlotBatch
from tests.core.small_blocks import EOT, LENGTH, MASK, VOCABULARY, Ahead, Noting, masks
from tests.fuzz.making import Failing, Wild

RULES = [EndOfText("off", ()), EndOfText("block", (EOT,)), EndOfText("predicted", (EOT,))]


def assert_consistent(blocks: BlockBatch | BlockSlots) -> None:
    expected = (blocks.tokens == MASK) & blocks.present
    assert torch.equal(blocks.masked, expected)
    assert blocks.masked.dtype == blocks.present.dtype == torch.bool
    if isinstance(blocks, BlockBatch) and blocks._later is not None:
        assert_consistent(blocks._later.blocks)


class Blocks:
    """Random content for blocks, and random steps."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        made = [Wild(rng), Failing(rng), Ahead(), Noting(answer=True)]
        self.policies = rng.sample(made, rng.randint(1, len(made)))
        self.suppress = rng.random() < 0.7
        self.end_of_text = rng.choice(RULES)

    def tokens(self, rows: int) -> torch.Tensor:
        return torch.tensor(
            [
                [self.rng.choice([MASK, self.rng.randrange(VOCABULARY)]) for _ in range(LENGTH)]
                for _ in range(rows)
            ],
            dtype=torch.int64,
        ).view(rows, LENGTH)

    def present(self, rows: int) -> torch.Tensor:
        return torch.tensor(
            [[self.rng.random() < 0.8 for _ in range(LENGTH)] for _ in range(rows)],
            dtype=torch.bool,
        ).view(rows, LENGTH)

    def some(self, rows: int, least: int = 0) -> list[int]:
        return self.rng.sample(range(rows), self.rng.randint(min(least, rows), rows))

    def start(self, rows: int) -> BlockBatch:
        tokens = self.tokens(rows)
        batch = BlockBatch.start(
            tokens,
            [self.rng.choice(self.policies) for _ in range(rows)],
            mask_token_id=MASK,
            present=self.present(rows) if self.rng.random() < 0.7 else None,
            ignores_end=torch.tensor([self.rng.random() < 0.3 for _ in range(rows)]),
            reference=tokens,
            generators=[torch.Generator().manual_seed(row) for row in range(rows)],
            on_error="progress",
        )
        owners = [row for row in batch.looking_ahead for _ in range(self.rng.randint(0, 2))]
        batch.look_ahead(owners, self.tokens(len(owners)), present=self.present(len(owners)))
        return batch

    def step(self, batch: BlockBatch) -> None:
        """One step with NaN and with sampled tokens, some of which are the mask token."""
        rows = len(batch.tokens)
        logits = torch.randn(rows, LENGTH, VOCABULARY) * 4
        logits[..., MASK] += self.rng.choice([0.0, 9.0])
        if self.rng.random() < 0.3:
            logits[:, self.rng.randrange(LENGTH)] = torch.nan
        drawn = None
        if self.rng.random() < 0.5:
            drawn = torch.randint(-1, VOCABULARY, (rows * LENGTH,))
        later = None
        if batch._later is not None:
            count = len(batch.later_rows) * LENGTH
            later = torch.randn(count, VOCABULARY), torch.arange(count)
        denoising_step(
            batch,
            logits,
            end_of_text=self.end_of_text,
            x0=drawn,
            suppress_mask=self.suppress,
            later=later,
        )


@settings(max_examples=60, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_masks_follow_from_tokens_and_presence_in_batches(rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(1 << 30))
    blocks = Blocks(rng)
    batch = blocks.start(rng.randint(1, 4))
    assert_consistent(batch)
    for _ in range(12):
        rows = len(batch.tokens)
        what = rng.choice("step step set set_present reference advance keep gather forget".split())
        if what == "step" and rows:
            blocks.step(batch)
        elif what == "set":
            batch.set_tokens(blocks.tokens(rows))
        elif what == "set_present":
            batch.set_tokens(blocks.tokens(rows), blocks.present(rows))
        elif what == "reference":
            batch.set_reference(blocks.tokens(rows))
        elif what == "advance":
            moving = blocks.some(rows)
            batch.advance(
                moving,
                blocks.tokens(len(moving)),
                present=rng.choice([None, blocks.present(len(moving))]),
                reference=blocks.tokens(len(moving)),
            )
        elif what == "keep":
            batch.keep(blocks.some(rows, least=1))
        elif what == "gather" and rows:
            more = blocks.start(rng.randint(1, 2))
            assert_consistent(more)
            found = [(batch, row) for row in range(rows)] + [(more, 0)]
            batch = BlockBatch.gather(rng.sample(found, rng.randint(1, len(found))))
        elif what == "forget":
            batch.forget_later(blocks.some(rows))
        assert_consistent(batch)


@settings(max_examples=60, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_masks_follow_from_tokens_and_presence_in_slots(rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(1 << 30))
    blocks, count = Blocks(rng), 4
    slots = BlockSlots(count, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))
    assigned: set[int] = set()
    for _ in range(12):
        what = rng.choice("assign assign release step step set advance".split())
        slot = rng.randrange(count)
        if what == "assign":
            tokens, present = blocks.tokens(1)[0].tolist(), blocks.present(1)[0].tolist()
            slots.assign(slot, rng.choice(blocks.policies), tokens, present)
            assigned.add(slot)
        elif what == "release":
            slots.release(slot)
            assigned.discard(slot)
        elif assigned:
            chosen = rng.sample(sorted(assigned), rng.randint(1, len(assigned)))
            tokens = blocks.tokens(len(chosen))
            batch = slots.take(np.array(chosen), reference=tokens)
            assert_consistent(batch.block)
            if what == "step":
                blocks.step(batch.block)
            elif what == "set":
                batch.block.set_tokens(tokens)
            else:
                where = torch.tensor([rng.random() < 0.5 for _ in chosen])
                batch.advance(where, tokens, blocks.present(len(chosen)))
            assert_consistent(batch.block)
            slots.put(batch)
        assert_consistent(slots)


def taken(slots: BlockSlots, policies: list[Wild], tokens: torch.Tensor) -> SlotBatch:
    for slot, policy in enumerate(policies):
        slots.assign(slot, policy, tokens[slot].tolist(), [True] * LENGTH)
    return slots.take(np.arange(len(policies)), reference=tokens)


@settings(max_examples=40, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_rows_advance_equally_by_host_indices_and_by_device_mask(rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(1 << 30))
    blocks, rows = Blocks(rng), 5
    two = [Wild(rng), Wild(rng)]
    policies = [rng.choice(two) for _ in range(rows)]
    tokens = blocks.tokens(rows)
    slots = BlockSlots(rows, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))
    by_mask = taken(slots, policies, tokens)
    by_index = BlockBatch.start(tokens, policies, mask_token_id=MASK, reference=tokens)
    for _ in range(4):
        logits = torch.randn(rows, LENGTH, VOCABULARY)
        for block in (by_index, by_mask.block):
            denoising_step(block, logits, end_of_text=RULES[1])
        moving = sorted(blocks.some(rows))
        following, present = blocks.tokens(rows), blocks.present(rows)
        by_index.advance(
            moving, following[moving], present=present[moving], reference=tokens[moving]
        )
        where = torch.zeros(rows, dtype=torch.bool)
        where[moving] = True
        by_mask.advance(where, following, present)
        for name in ("tokens", "masked", "present", "step_index", "block_index", "reference"):
            left, right = getattr(by_index, name), getattr(by_mask.block, name)
            assert torch.equal(left, right), name
            assert left.dtype == right.dtype
        places, others = by_index._groups.places(), by_mask.block._groups.places()
        for row in range(rows):
            (group, at), (other, there) = places[row], others[row]
            assert group.state.keys() == other.state.keys()
            for name, value in group.state.items():
                assert torch.equal(value[at], other.state[name][there]), name


def test_a_drawn_mask_token_is_not_committed() -> None:
    batch = BlockBatch.start(masks(1), [Noting(answer=True)], mask_token_id=MASK)
    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[..., 3] = 5.0
    drawn = torch.tensor([MASK, 2, -1, MASK])
    denoising_step(batch, logits, end_of_text=RULES[0], x0=drawn)
    assert batch.tokens.tolist() == [[3, 2, 3, 3]]
    assert not batch.masked.any()


def test_a_batch_refuses_tensors_of_another_shape() -> None:
    batch = BlockBatch.start(masks(2), [Noting()] * 2, mask_token_id=MASK)
    for name, change in (
        ("tokens", lambda: batch.set_tokens(masks(1))),
        ("present", lambda: batch.set_tokens(masks(2), torch.ones(2, 1, dtype=torch.bool))),
        ("reference", lambda: batch.set_reference(masks(3))),
    ):
        with pytest.raises(ValueError, match=rf"{name} \(\d, \d\): expected the blocks' \(2, 4\)"):
            change()
    assert_consistent(batch)
    batch.set_reference(None)
    assert batch.reference is None
