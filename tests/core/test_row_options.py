"""Policies that differ only in their row options form one group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch

from l2pd_plugins import L2PDError, ModelContext, UnmaskPolicy, create_policy, policy_calls
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.errors import PolicyRuntimeError
from l2pd_plugins.once import Once
from l2pd_plugins.plugins import bind_policy
from l2pd_plugins.policy import RemaskingPolicy
from l2pd_plugins.row_options import column_of, columns_of, kind_of
from l2pd_plugins.slots import BlockSlots
from tests.core.small_blocks import LENGTH, MASK, OFF, VOCABULARY, logits_of, masks, started

CPU = torch.device("cpu")


class Threshold(UnmaskPolicy):
    row_options = frozenset({"threshold"})

    def __init__(self, threshold=0.5, **others):
        self.threshold = threshold
        vars(self).update(others)

    def init_state(self, batch_size, block_length, device):
        return {"steps": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def select(self, step, state):
        state["steps"] = state["steps"] + 1
        return step.masked & (step.confidence >= self.threshold)


@dataclass(frozen=True, eq=False)
class Frozen(UnmaskPolicy):
    row_options = frozenset({"threshold"})

    threshold: float = 0.5

    def select(self, step, state):
        return step.masked & (step.confidence >= self.threshold)


class Other(Threshold):
    pass


class Eager(Threshold):
    progress = "always_top1"


class Slotted(Threshold):
    __slots__ = ("extra",)


def groups_of(batch: BlockBatch) -> list[list[int]]:
    return [group.members for group in batch._groups]


THING, ANOTHER = object(), object()


@pytest.mark.parametrize(
    ("left", "right", "together"),
    [
        (Threshold(0.1), Threshold(0.2), True),
        (Frozen(threshold=0.1), Frozen(threshold=0.2), True),
        (Threshold(0.1), Other(0.1), False),
        (Threshold(0.1), Threshold(0.2, extra=3), False),
        (Threshold(0.1, extra=3), Threshold(0.2, extra=3), True),
        (Threshold(0.1, extra=3), Threshold(0.2, extra=3.0), False),
        (Threshold(0.1, extra=1), Threshold(0.2, extra=True), False),
        (Threshold(0.1, extra=0.0), Threshold(0.2, extra=-0.0), False),
        (Threshold(0.1, extra=None), Threshold(0.2, extra="a"), False),
        (Threshold(0.1, extra=THING), Threshold(0.2, extra=THING), True),
        (Threshold(0.1, extra=THING), Threshold(0.2, extra=ANOTHER), False),
        (Threshold(0.1, extra=[1]), Threshold(0.2, extra=[1]), False),
        (Threshold(0.1), Threshold(1), False),  # a number and a whole number
        (Threshold(1), Threshold(2), True),
        (Threshold(True), Threshold(False), True),
        (Threshold(0.1), Threshold(None), False),
        (Threshold(0.1), Threshold(1e39), False),  # infinite as float32
        (Threshold(2**63), Threshold(2**63), False),
        (Threshold(0.1).named("a"), Threshold(0.2).named("b"), False),
        (Threshold(0.1), Threshold(0.1, requires=frozenset({"margin"})), False),
        (Eager(0.1), Eager(0.2), True),
        (Slotted(0.1), Slotted(0.2), False),  # attributes that cannot be compared
    ],
)
def test_which_policies_form_one_group(left, right, together):
    assert (kind_of(left) == kind_of(right)) is together
    assert kind_of(left) == kind_of(left)
    assert groups_of(started([left, right, left], on_error="progress")) == (
        [[0, 1, 2]] if together else [[0, 2], [1]]
    )


def test_a_policy_that_declares_nothing_is_a_group_of_its_own():
    class Undeclared(Threshold):
        row_options = frozenset()

    assert groups_of(started([Undeclared(0.1), Undeclared(0.2)])) == [[0], [1]]


def test_columns_have_one_dtype_for_each_type_and_leave_none_out():
    class Many(UnmaskPolicy):
        row_options = frozenset({"number", "whole", "flag", "nothing", "derived"})
        nothing = None

        def __init__(self, number, whole, flag):
            self.number, self.whole, self.flag = number, whole, flag

        @cached_property
        def derived(self):
            return self.number**0.7

        def select(self, step, state):
            return step.masked

    policies = [Many(0.1, 3, True), Many(0.7, -(2**62), False)]
    columns = columns_of(policies, CPU)
    assert {name: (each.dtype, tuple(each.shape)) for name, each in columns.items()} == {
        "number": (torch.float32, (2, 1)),
        "derived": (torch.float32, (2, 1)),
        "whole": (torch.int64, (2, 1)),
        "flag": (torch.bool, (2, 1)),
    }
    assert columns["whole"].tolist() == [[3], [-(2**62)]]
    assert columns["flag"].tolist() == [[True], [False]]
    expected = np.array([0.1**0.7, 0.7**0.7]).astype(np.float32)
    assert columns["derived"][:, 0].tolist() == expected.tolist()
    assert columns_of([policies[0]] * 3, CPU) == {}
    assert columns_of([Many(0.1, 3, True), Many(0.1, 3, True)], CPU) == {}
    assert column_of(policies[0], CPU)["whole"].tolist() == [[3]]


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ("threshold", "row_options = 'threshold' must be a set of names of options"),
        (frozenset({3}), "must be a set of names"),
        (frozenset({"treshold"}), "names 'treshold', which is no option of the policy"),
        (frozenset({"extra"}), r"names 'extra', which is \[1\]; expected a number, a flag or None"),
        (frozenset({"name"}), "names 'name', which is 'wrong'; expected a number"),
        (frozenset({"doubled"}), "names 'doubled', which is a property"),
    ],
)
def test_a_wrong_declaration_is_named(declared, words):
    class Wrong(Threshold):
        row_options = declared

        @property
        def doubled(self):
            return 2 * self.threshold

    with pytest.raises(PolicyRuntimeError, match=f"policy 'wrong': row_options failed: .*{words}"):
        started([Wrong(0.5, extra=[1])])
    with pytest.raises(L2PDError, match=words):
        bind_policy(Wrong(0.5, extra=[1]), ModelContext("m", LENGTH, MASK, VOCABULARY))


def test_the_rows_keep_their_own_policies():
    policies = [Threshold(each) for each in (0.1, 0.2, 0.3)]
    batch = started(policies)
    denoising_step(batch, logits_of(3), end_of_text=OFF)
    assert batch.policies == policies
    batch.keep([2, 0])
    batch.advance([1], masks(1))
    assert batch.policies == [policies[2], policies[0]]
    assert groups_of(batch) == [[0, 1]]
    other = started([Threshold(0.4), Other(0.4)])
    joined = BlockBatch.gather([(other, 1), (batch, 0), (other, 0)])
    assert groups_of(joined) == [[0], [1, 2]]
    assert joined.policies == [other.policies[1], policies[2], other.policies[0]]
    assert joined._groups[1].columns["threshold"].tolist() == [
        [pytest.approx(0.3)],
        [pytest.approx(0.4)],
    ]


class Branching(Threshold):
    """Fails where its threshold is a tensor, and where it is above 1."""

    def select(self, step, state):
        state["steps"] = state["steps"] + 1
        if self.threshold > 1:
            raise ValueError("too high")
        return step.masked & (step.confidence >= self.threshold)


class Writing(Threshold):
    def select(self, step, state):
        if isinstance(self.threshold, torch.Tensor):
            self.threshold *= 0.5
        return super().select(step, state)


class WritingToItsInput(Threshold):
    def select(self, step, state):
        if isinstance(self.threshold, torch.Tensor):
            step.confidence.fill_(1)
            step.masked.fill_(True)
        return super().select(step, state)


@pytest.mark.parametrize("cls", [Branching, Writing, WritingToItsInput])
def test_a_policy_that_fails_with_columns_is_asked_for_each_value(cls, caplog, monkeypatch):
    monkeypatch.setattr(policy_calls, "_first_failure", Once())
    thresholds = (0.3, 0.6, 0.2, 5.0)
    policies = [cls(each) for each in thresholds]
    batch = started(policies, on_error="progress")
    alone = [started([cls(each)], on_error="progress") for each in thresholds]
    for time in range(3):
        logits = logits_of(4, time)
        denoising_step(batch, logits, end_of_text=OFF)
        for row, each in enumerate(alone):
            denoising_step(each, logits[row : row + 1], end_of_text=OFF)
            assert torch.equal(batch.tokens[row], each.tokens[0])
    assert batch.policies == policies
    first = caplog.records[0].getMessage()
    assert "with one value per row of threshold, which its row_options name" in first
    assert "each value is asked on its own" in first
    with pytest.raises(PolicyRuntimeError, match="which its row_options name"):
        denoising_step(started(policies), logits_of(4), end_of_text=OFF)


def test_slots_of_a_policy_that_fails_with_columns_decode_as_alone():
    slots = BlockSlots(3, LENGTH, mask_token_id=MASK, device=CPU)
    for slot, threshold in enumerate((0.3, 0.6, 0.2)):
        slots.assign(slot, Branching(threshold), [MASK] * LENGTH, [True] * LENGTH)
    alone = started([Branching(each) for each in (0.3, 0.6, 0.2)], on_error="progress")
    for time in range(2):
        taken = slots.take(np.array([2, 0, 1]))
        denoising_step(taken.block, logits_of(3, time)[[2, 0, 1]], end_of_text=OFF)
        full = ~taken.block.masked.any(-1)
        taken.advance(full & False, taken.block.tokens, taken.block.present)
        slots.put(taken)
        denoising_step(alone, logits_of(3, time), end_of_text=OFF)
        assert torch.equal(slots.tokens, alone.tokens)
    states = [slots.take(np.array([slot])).block.states[0]["steps"].item() for slot in range(3)]
    assert states == [2, 2, 2]


def test_a_remask_that_fails_with_columns_is_asked_for_each_value():
    class Remasking(RemaskingPolicy, Threshold):
        requires = frozenset({"committed"})

        def remask(self, step, state):
            if self.threshold > 0.5:
                return ~step.masked
            return torch.zeros_like(step.masked)

    def tokens_of(policies):
        batch = started(policies, on_error="progress")
        logits = logits_of(2).abs()
        denoising_step(batch, logits[: len(policies)], end_of_text=OFF)
        return batch.tokens

    low, high = Remasking(0.01), Remasking(0.02)
    assert torch.equal(tokens_of([low, high])[0], tokens_of([low])[0])


def test_a_kind_of_policy_has_one_state_in_all_slots():
    slots = BlockSlots(8, LENGTH, mask_token_id=MASK, device=CPU)
    model = ModelContext("m", LENGTH, MASK, VOCABULARY)
    policies = [bind_policy(create_policy("klass", threshold=0.1 * n), model) for n in range(8)]
    for slot, policy in enumerate(policies):
        slots.assign(slot, policy, [MASK] * LENGTH, [True] * LENGTH)
    (resident,) = slots._residents.values()
    assert resident.state["log_p"].shape == (8, LENGTH, VOCABULARY)
    assert slots.policies == policies
    assert [slots.policy_of(slot) for slot in range(8)] == policies
    where = {name: column.data_ptr() for name, column in resident.columns.items()}
    slots.release(3)
    slots.assign(3, policies[5], [MASK] * LENGTH, [True] * LENGTH)
    assert {name: column.data_ptr() for name, column in resident.columns.items()} == where
    assert resident.columns["threshold"][3].item() == np.float32(0.5)
    for slot in range(8):
        slots.release(slot)
    assert (slots._residents, slots.policies) == ({}, [])


def test_a_kept_state_reaches_the_next_block_of_its_own_row():
    class Ahead(Threshold):
        requires = frozenset({"ahead"})

        def init_state(self, batch_size, block_length, device):
            return {"best": torch.zeros(batch_size, device=device)}

        def select(self, step, state):
            state["best"] = torch.maximum(state["best"], step.confidence.amax(-1))
            return step.masked & (step.confidence >= self.threshold)

    policies = [Ahead(each) for each in (0.9, 0.8, 0.7)]
    batch = started(policies)
    batch.look_ahead([0, 1, 2], masks(3))
    assert len(batch._later.blocks._groups._each) == 1
    later = logits_of(3, 1).flatten(0, 1), torch.arange(3 * LENGTH)
    denoising_step(batch, logits_of(3), end_of_text=OFF, later=later)
    best = batch._later.blocks.states[0]["best"].clone()
    batch.advance([2, 0], masks(2))
    assert batch.states[0]["best"][[2, 0]].tolist() == best[[2, 0]].tolist()
    assert batch.states[0]["best"][1] != best[1]
