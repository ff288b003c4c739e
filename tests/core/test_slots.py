"""Blocks in slots: the same commits as in a batch of only these blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2pd_plugins import UnmaskPolicy, create_policy, policy_calls
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.once import Once
from l2pd_plugins.slots import BlockSlots
from tests.engines.policies.l2pd_engine_policies.rules import Persistent

SLOTS, LENGTH, VOCABULARY, MASK, EOT = 6, 5, 11, 10, 9
END = EndOfText("block", (EOT,))


class Unready(UnmaskPolicy):
    def init_state(self, batch_size, block_length, device):
        raise ValueError("not today")

    def select(self, step, state):
        return step.masked


def slots_of() -> BlockSlots:
    return BlockSlots(SLOTS, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))


def logits_of(slot: int, time: int) -> torch.Tensor:
    """The logits of a slot's block at its n-th step, (L, V)."""
    generator = torch.Generator().manual_seed(1000 * slot + time)
    return torch.randn(LENGTH, VOCABULARY, generator=generator) * 2


def alone(
    slot: int, policy: UnmaskPolicy, first: list[int], ignores_end: bool, steps: int
) -> list[list[int]]:
    """The slot's block after each step, decoded alone; a full block is followed by the next."""
    tokens = torch.tensor([first])
    batch, seen, block_index = None, [], 0
    for time in range(steps):
        if batch is None:
            batch = BlockBatch.start(
                tokens,
                [policy],
                mask_token_id=MASK,
                present=tokens == MASK,
                block_index=torch.tensor([block_index]),
                ignores_end=torch.tensor([ignores_end]),
            )
        denoising_step(batch, logits_of(slot, time)[None], end_of_text=END)
        seen.append(batch.tokens[0].tolist())
        if not batch.masked.any():
            batch, tokens, block_index = None, torch.full((1, LENGTH), MASK), block_index + 1
    return seen


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_slot_decodes_as_it_does_alone(data: st.DataObject) -> None:
    policies = [
        create_policy("confidence_threshold", threshold=0.5),
        create_policy("fixed_schedule", tokens_per_step=2),
        Persistent(),
    ]
    slots = slots_of()
    expected, seen = {}, {}
    for slot in range(SLOTS):
        policy = data.draw(st.sampled_from(policies))
        known = data.draw(st.integers(0, LENGTH - 1))
        ignores_end = data.draw(st.booleans())
        first = [*range(known), *[MASK] * (LENGTH - known)]
        slots.assign(
            slot, policy, first, [token == MASK for token in first], ignores_end=ignores_end
        )
        expected[slot] = alone(slot, policy, first, ignores_end, steps=12)
        seen[slot] = []
    for _ in range(12):
        order = data.draw(st.permutations(range(SLOTS)))
        chosen = [
            slot for slot in order[: data.draw(st.integers(1, SLOTS))] if len(seen[slot]) < 12
        ]
        if not chosen:
            continue
        batch = slots.take(np.array(chosen))
        logits = torch.stack([logits_of(slot, len(seen[slot])) for slot in chosen])
        denoising_step(batch.block, logits, end_of_text=END)
        for row, slot in enumerate(chosen):
            seen[slot].append(batch.block.tokens[row].tolist())
        full = ~batch.block.masked.any(-1)
        batch.advance(
            full,
            torch.full_like(batch.block.tokens, MASK),
            torch.ones_like(batch.block.present),
        )
        slots.put(batch)
    for slot in range(SLOTS):
        assert seen[slot] == expected[slot][: len(seen[slot])]


def test_policies_that_no_slot_runs_are_released() -> None:
    slots, policy = slots_of(), Persistent()
    for slot in (2, 4):
        slots.assign(slot, policy, [MASK] * LENGTH, [True] * LENGTH)
    slots.assign(4, create_policy("fixed_schedule"), [MASK] * LENGTH, [True] * LENGTH)
    assert len(slots) == 2
    slots.release(2)
    assert policy not in slots.policies
    slots.release(2)
    slots.release(4)
    assert (len(slots), slots.policies) == (0, [])


def test_a_slot_that_gets_another_policy_releases_the_previous_one() -> None:
    slots, policy = slots_of(), Persistent()
    slots.assign(3, policy, [MASK] * LENGTH, [True] * LENGTH)
    other = create_policy("fixed_schedule")
    slots.assign(3, other, [MASK] * LENGTH, [True] * LENGTH)
    assert (len(slots), slots.policies, slots.policy_of(3)) == (1, [other], other)


def test_a_slot_ends_at_the_end_of_text_by_default() -> None:
    slots, policy = slots_of(), create_policy("fixed_schedule", tokens_per_step=1)
    slots.assign(0, policy, [MASK] * LENGTH, [True] * LENGTH)
    slots.assign(1, policy, [MASK] * LENGTH, [True] * LENGTH, ignores_end=True)
    batch = slots.take(np.array([0, 1]))
    logits = torch.zeros(2, LENGTH, VOCABULARY)
    logits[:, 1, EOT] = 9.0
    outcome = denoising_step(batch.block, logits, end_of_text=END)
    assert outcome.ended.tolist() == [True, False]


def test_the_canvas_of_a_slot_is_its_own_block_by_default() -> None:
    slots, policy = slots_of(), Persistent()
    slots.assign(0, policy, [MASK] * LENGTH, [True] * LENGTH)
    slots.assign(1, policy, [MASK] * LENGTH, [True] * LENGTH, canvas_length=3 * LENGTH)
    batch = slots.take(np.array([1, 0]))
    assert batch.block.canvas_length.tolist() == [3 * LENGTH, LENGTH]


class Knowing(UnmaskPolicy):
    requires = frozenset({"confidence", "reference"})

    def select(self, step, state):
        return step.masked & (step.reference == 1)


def test_the_reference_reaches_the_policy() -> None:
    slots = slots_of()
    slots.assign(2, Knowing(), [MASK] * LENGTH, [True] * LENGTH)
    batch = slots.take(np.array([2]), reference=torch.tensor([[0, 1, 0, 1, 1]]))
    denoising_step(batch.block, logits_of(2, 0)[None], end_of_text=EndOfText("off", ()))
    assert batch.block.masked.tolist() == [[True, False, True, False, False]]


def test_a_batch_has_generators_only_if_one_of_its_slots_has_one() -> None:
    slots = slots_of()
    for slot in range(4):  # four policies
        generator = torch.Generator().manual_seed(slot) if slot == 1 else None
        slots.assign(slot, Persistent(), [MASK] * LENGTH, [True] * LENGTH, generator=generator)
    assert slots.take(np.array([0, 2, 3])).block.generators is None
    alone, both = (slots.take(np.array(chosen)).block.generators for chosen in ([1], [2, 1]))
    assert alone is not None and [each.initial_seed() for each in alone if each] == [1]
    assert both is not None and [each is None for each in both] == [True, False]


def test_a_policy_that_fails_leaves_its_slot_to_the_progress_rule() -> None:
    slots = slots_of()
    slots.assign(0, Persistent(), [MASK] * LENGTH, [True] * LENGTH)
    assert slots.take(np.array([0])).block.on_error == "progress"


class Vast(UnmaskPolicy):
    """Its state is too large for any memory, but is created without allocating it."""

    def init_state(self, batch_size, block_length, device):
        return {"vast": torch.zeros(batch_size, 1).expand(batch_size, 2**58)}

    def select(self, step, state):
        return step.masked


@pytest.mark.parametrize(("policy", "name"), [(Vast(), "vast"), (Unready(), "unready")])
def test_a_policy_whose_init_state_fails_leaves_its_slots_to_the_progress_rule(
    policy: UnmaskPolicy,
    name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy_calls, "_first_failure", Once())
    slots = slots_of()
    slots.assign(0, policy, [MASK] * LENGTH, [True] * LENGTH)
    batch = slots.take(np.array([0]))
    denoising_step(batch.block, logits_of(0, 0)[None], end_of_text=EndOfText("off", ()))
    assert batch.block.masked.sum() == LENGTH - 1
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"policy '{name}': init_state failed"
    ]
    assert ("not today" in caplog.text) == isinstance(policy, Unready)


class Counting(UnmaskPolicy):
    """Counts its steps, in states of one, two and three dimensions."""

    def init_state(self, batch_size, block_length, device):
        return {
            "plain": torch.full((batch_size,), 10),
            "wide": torch.full((batch_size, block_length), 20),
            "cube": torch.full((batch_size, 2, 3), 30),
        }

    def select(self, step, state):
        state.update({name: value + 1 for name, value in state.items()})
        return torch.zeros_like(step.masked)


def test_the_next_block_begins_only_in_the_given_rows() -> None:
    slots, policy = slots_of(), Counting()
    present = [True] * 4 + [False]
    for slot in (0, 3, 5):
        slots.assign(slot, policy, [1, *[MASK] * 4], present)
    assert slots.masked[[0, 3, 5]].tolist() == [[False, True, True, True, False]] * 3
    assert slots.block_index.tolist() == [0] * SLOTS
    batch = slots.take(np.array([3, 0, 5]))
    logits = torch.stack([logits_of(slot, 0) for slot in (3, 0, 5)])
    denoising_step(batch.block, logits, end_of_text=EndOfText("off", ()))
    before = batch.block.tokens.clone(), batch.block.masked.clone()
    tokens = torch.tensor([[MASK, 7, MASK, MASK, MASK]]).expand(3, -1)
    there = torch.tensor([[True, True, True, False, True]]).expand(3, -1)
    batch.advance(torch.tensor([False, True, False]), tokens, there)
    slots.put(batch)
    assert slots.tokens[0].tolist() == [MASK, 7, MASK, MASK, MASK]
    assert slots.masked[0].tolist() == [True, False, True, False, True]
    assert slots.present[0].tolist() == there[0].tolist()
    for slot, row in ((3, 0), (5, 2)):
        assert slots.tokens[slot].tolist() == before[0][row].tolist()
        assert slots.masked[slot].tolist() == before[1][row].tolist()
        assert slots.present[slot].tolist() == present
    assert slots.step_index.tolist() == [0, 0, 0, 1, 0, 1]
    assert slots.block_index.tolist() == [1, 0, 0, 0, 0, 0]
    (state,) = slots.take(np.array([0, 3, 5])).block.states
    assert state["plain"].tolist() == [10, 11, 11]
    assert state["wide"].tolist() == [[20] * LENGTH, [21] * LENGTH, [21] * LENGTH]
    assert state["cube"].flatten(1).tolist() == [[30] * 6, [31] * 6, [31] * 6]


def test_many_policies_in_many_slots_are_kept_apart() -> None:
    slots, policies = slots_of(), [Counting() for _ in range(SLOTS)]
    for slot, policy in enumerate(policies):
        generator = torch.Generator() if slot % 2 else None
        slots.assign(slot, policy, [MASK] * LENGTH, [True] * LENGTH, generator=generator)
    batch = slots.take(np.array([4, 1, 5, 0, 3, 2]))
    assert batch.block.policies == [policies[slot] for slot in (4, 1, 5, 0, 3, 2)]
    assert [slots.policy_of(slot) for slot in range(SLOTS)] == policies


def test_a_policy_may_keep_and_change_the_state_that_it_gave() -> None:
    class Keeping(Counting):
        def init_state(self, batch_size, block_length, device):
            self.kept = super().init_state(batch_size, block_length, device)
            return self.kept

    slots, policy = slots_of(), Keeping()
    slots.assign(0, policy, [MASK] * LENGTH, [True] * LENGTH)
    for value in policy.kept.values():
        value.zero_()
    slots.assign(1, policy, [MASK] * LENGTH, [True] * LENGTH)
    (state,) = slots.take(np.array([0, 1])).block.states
    assert state["plain"].tolist() == [10, 10]


def test_a_reused_slot_begins_with_a_fresh_state() -> None:
    slots, policy = slots_of(), Persistent()
    results = []
    for _ in range(2):
        slots.assign(1, policy, [MASK] * LENGTH, [True] * LENGTH, block_index=3)
        batch = slots.take(np.array([1]))
        assert batch.block.step_index.tolist() == [0]
        assert batch.block.block_index.tolist() == [3]
        for _ in range(2):
            denoising_step(batch.block, logits_of(1, 0)[None], end_of_text=END)
        slots.put(batch)
        results.append(slots.tokens[1].tolist())
        slots.assign(0, policy, [MASK] * LENGTH, [True] * LENGTH)  # keeps the policy's state alive
    assert results[0] == results[1]


def test_the_buffers_stay_where_they_are() -> None:
    slots = slots_of()
    names = ("tokens", "masked", "present", "step_index", "block_index")
    before = {name: getattr(slots, name).data_ptr() for name in names}
    slots.assign(0, Persistent(), [MASK] * LENGTH, [True] * LENGTH)
    batch = slots.take(np.array([0]))
    denoising_step(batch.block, logits_of(0, 0)[None], end_of_text=END)
    slots.put(batch)
    assert {name: getattr(slots, name).data_ptr() for name in names} == before
    assert slots.tokens[0].tolist() == batch.block.tokens[0].tolist()
