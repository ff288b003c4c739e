"""Corner cases of the step: edits after an ignored end, generators, batches without rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l2pd_plugins import ModelContext, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.plugins import bind_policy
from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.sampling import Sampling
from l2pd_plugins.slots import BlockSlots
from tests.core.misbehaviour import Steady

LENGTH, VOCABULARY, MASK, EOT = 4, 9, 8, 7
END, OFF = EndOfText("block", (EOT,)), EndOfText("off", ())


def logits_of(rows: int, seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    return torch.randn(rows, length, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Overwriting(UnmaskPolicy):
    edits = True
    requires = frozenset({"confidence", "committed"})

    def select(self, step, state):
        return ~step.masked


class Drawing(UnmaskPolicy):
    """Draws random numbers if it has a generator, and records its steps."""

    def __init__(self):
        self.seen = []

    def select(self, step, state):
        self.seen.append(step.generator)
        if step.generator is None:
            return torch.zeros_like(step.masked)
        drawn = [torch.rand(step.masked.shape[1], generator=each) for each in step.generator]
        return step.masked & (torch.stack(drawn) < 0.5)


def test_rows_that_ignore_the_end_may_edit_an_end_of_text_token_and_no_others():
    tokens = torch.tensor([[1, EOT, MASK, MASK]] * 3)
    present = torch.tensor([[True] * 4, [True] * 4, [True, False, True, True]])
    logits = torch.zeros(3, LENGTH, VOCABULARY)
    logits[..., 3] = 5.0
    batch = BlockBatch.start(
        tokens,
        [Overwriting()] * 3,
        mask_token_id=MASK,
        present=present,
        ignores_end=torch.tensor([True, False, True]),
    )
    outcome = denoising_step(batch, logits, end_of_text=END)
    assert outcome.committed[:, :2].tolist() == [[True, True], [True, False], [True, False]]
    assert batch.tokens[:, :2].tolist() == [[3, 3], [3, EOT], [3, EOT]]


def test_rows_that_ignore_the_end_may_edit_it_beside_rows_of_other_policies():
    tokens = torch.tensor([[EOT, MASK, MASK, MASK]] * 4)
    editing = Overwriting()
    logits = torch.zeros(4, LENGTH, VOCABULARY)
    logits[..., 3] = 5.0
    batch = BlockBatch.start(
        tokens,
        [Steady(), editing, Steady(), editing],
        mask_token_id=MASK,
        ignores_end=torch.tensor([True, False, False, True]),
    )
    denoising_step(batch, logits, end_of_text=END)
    assert batch.tokens[1:, 0].tolist() == [EOT, EOT, 3]


def test_a_slot_without_a_generator_does_not_affect_the_others():
    policy = Drawing()
    generators = [generator_of(0), None, generator_of(2), None]

    def slots_with(chosen):
        slots = BlockSlots(4, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))
        for slot in chosen:
            mine = None if generators[slot] is None else generator_of(slot)
            slots.assign(slot, policy, [MASK] * LENGTH, [True] * LENGTH, generator=mine)
        return slots

    slots = slots_with(range(4))
    batch = slots.take(np.array([3, 2, 1, 0]))
    found = batch.block.generators
    assert [each is None for each in found] == [True, False, True, False]
    assert found[1].initial_seed() == 2
    logits = logits_of(4)
    denoising_step(batch.block, logits, end_of_text=OFF)
    slots.put(batch)
    assert sorted(0 if each is None else len(each) for each in policy.seen) == [0, 2]
    for row, slot in enumerate((3, 2, 1, 0)):
        alone = slots_with([slot])
        single = alone.take(np.array([slot]))
        denoising_step(single.block, logits[row : row + 1], end_of_text=OFF)
        assert slots.tokens[slot].tolist() == single.block.tokens[0].tolist()


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 0, 1], [3, 0, 2, 1], [1], [3]])
def test_gathering_in_any_order_keeps_the_generator_of_each_row(order):
    policy, generators = Drawing(), [generator_of(0), generator_of(1)]
    tokens = torch.full((2, LENGTH), MASK)
    first = BlockBatch.start(tokens, [policy] * 2, mask_token_id=MASK, generators=generators)
    second = BlockBatch.start(tokens, [policy] * 2, mask_token_id=MASK)
    rows = [(first, 0), (first, 1), (second, 0), (second, 1)]
    batch = BlockBatch.gather([rows[at] for at in order])
    wanted = [[*generators, None, None][at] for at in order]
    assert batch.generators == (wanted if any(wanted) else None)
    denoising_step(batch, logits_of(len(order)), end_of_text=OFF)
    shown = [each for seen in policy.seen if seen is not None for each in seen]
    assert shown == [each for each in wanted if each is not None]


def test_rows_gathered_twice_draw_as_they_do_alone():
    def alone(seed):
        batch = BlockBatch.start(
            torch.full((1, LENGTH), MASK),
            [Drawing()],
            mask_token_id=MASK,
            generators=[generator_of(seed)],
        )
        for step in range(2):
            denoising_step(batch, logits_of(1, 10 * seed + step), end_of_text=OFF)
        return batch.tokens[0].tolist()

    policy, tokens = Drawing(), torch.full((1, LENGTH), MASK)
    without = BlockBatch.start(tokens, [policy], mask_token_id=MASK)
    batches = [without] + [
        BlockBatch.start(tokens, [policy], mask_token_id=MASK, generators=[generator_of(seed)])
        for seed in (1, 2)
    ]
    batch = BlockBatch.gather([(each, 0) for each in batches])
    for step in range(2):
        logits = torch.cat([logits_of(1, 10 * row + step) for row in range(3)])
        denoising_step(batch, logits, end_of_text=OFF)
        batch = BlockBatch.gather([(batch, row) for row in range(3)])
    assert batch.tokens[1:].tolist() == [alone(1), alone(2)]


@pytest.mark.parametrize("observe", [frozenset(), frozenset({"logits", "committed", "entropy"})])
@pytest.mark.parametrize("positions", [None, torch.empty(0, dtype=torch.int64)])
@pytest.mark.parametrize("rule", ["off", "block", "predicted"])
def test_a_batch_without_rows_can_be_stepped(observe, positions, rule):
    batch = BlockBatch.start(
        torch.full((2, LENGTH), MASK),
        [Steady(), Overwriting()],
        mask_token_id=MASK,
        reference=torch.zeros(2, LENGTH, dtype=torch.int64),
        generators=[None, generator_of(0)],
        observe=observe,
    )
    batch.keep([])
    assert batch.tokens.shape == batch.needed().shape == (0, LENGTH)
    assert (batch.policies, batch.states, batch.generators) == ([], [], None)
    logits = torch.zeros(0, LENGTH, VOCABULARY)
    for suppress in (True, False):
        outcome = denoising_step(
            batch,
            logits if positions is None else logits.flatten(0, 1),
            positions,
            end_of_text=EndOfText(rule, (EOT,)),
            suppress_mask=suppress,
        )
        assert outcome.committed.shape == outcome.behind.shape == (0, LENGTH)
        assert outcome.ended.shape == (0,)
    batch.advance([], torch.zeros(0, LENGTH, dtype=torch.int64))
    batch.keep([])
    assert len(batch.tokens) == 0
    started = BlockBatch.start(torch.zeros(0, LENGTH, dtype=torch.int64), [], mask_token_id=MASK)
    denoising_step(started, logits, end_of_text=OFF)
    assert started.requires == frozenset()


def test_gathering_from_no_batches_is_refused():
    with pytest.raises(ValueError, match="no rows to gather"):
        BlockBatch.gather([])


@pytest.mark.parametrize("empty", [np.array([]), np.array([], dtype=np.int64)])
def test_an_empty_list_of_slots_is_accepted(empty):
    slots = BlockSlots(2, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))
    slots.assign(0, Steady(), [MASK] * LENGTH, [True] * LENGTH)
    batch = slots.take(empty)
    denoising_step(batch.block, torch.zeros(0, LENGTH, VOCABULARY), end_of_text=END)
    batch.advance(
        torch.zeros(0, dtype=torch.bool), batch.block.tokens, torch.ones_like(batch.block.present)
    )
    slots.put(batch)
    assert slots.masked.tolist() == [[True] * LENGTH, [False] * LENGTH]


def test_slots_that_are_not_assigned_are_named():
    slots = BlockSlots(3, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))
    slots.assign(1, Steady(), [MASK] * LENGTH, [True] * LENGTH)
    with pytest.raises(ValueError, match=r"slots \[2, 0\]: not assigned"):
        slots.take(np.array([2, 1, 0]))


class Knowing(UnmaskPolicy):
    requires = frozenset({"confidence", "reference"})

    def select(self, step, state):
        return step.masked & (step.reference == 1)


def test_the_next_block_needs_its_reference():
    batch = BlockBatch.start(
        torch.full((1, LENGTH), MASK),
        [Knowing()],
        mask_token_id=MASK,
        reference=torch.tensor([[1, 0, 0, 0]]),
    )
    more = torch.full((1, LENGTH), MASK)
    with pytest.raises(ValueError, match="reference=None"):
        batch.advance([0], more)
    batch.advance([0], more, reference=torch.tensor([[0, 0, 1, 1]]))
    denoising_step(batch, logits_of(1), end_of_text=OFF)
    assert batch.masked.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("length", [1, 2])
def test_blocks_of_one_position_and_canvases_shorter_than_a_block(length):
    batch = BlockBatch.start(
        torch.full((2, length), MASK),
        [Steady(), Overwriting()],
        mask_token_id=MASK,
        canvas_length=torch.ones(2, dtype=torch.int64),
        present=(torch.arange(length) < 1).expand(2, -1).clone(),
    )
    denoising_step(batch, logits_of(2, length=length), end_of_text=END)
    assert not batch.masked.any()
    assert (batch.tokens[:, 0] != MASK).all()
    assert (batch.tokens[:, 1:] == MASK).all()
    assert not batch.present[:, 1:].any()


@pytest.mark.parametrize("suppress_mask", [True, False])
@pytest.mark.parametrize("name", ["confidence_threshold", "dream_margin", "klass", "eb_sampler"])
@pytest.mark.parametrize("drawn", [False, True])
def test_some_positions_of_all_logits_are_read_in_place(name, suppress_mask, drawn):
    model = ModelContext("m", LENGTH, MASK, VOCABULARY)
    sampling = [Sampling(3, temperature=2.0), None, Sampling(5, top_k=3)] if drawn else None

    def started():
        tokens = torch.tensor([[1, MASK, MASK, MASK], [MASK, 2, MASK, 3], [MASK] * 4])
        policy = bind_policy(create_policy(name), model)
        return BlockBatch.start(tokens, [policy] * 3, mask_token_id=MASK, sampling=sampling)

    copied, in_place = started(), started()
    for step in range(3):
        logits = logits_of(3, step)
        before = logits.clone()
        places = copied.masked.flatten().nonzero().squeeze(-1)
        rows = logits.flatten(0, 1).index_select(0, places)
        for batch, given in ((copied, rows), (in_place, logits)):
            denoising_step(
                batch,
                given,
                places,
                end_of_text=OFF,
                suppress_mask=suppress_mask,
                places=places.tolist(),
            )
        assert torch.equal(copied.tokens, in_place.tokens)
        assert torch.equal(logits, before)
