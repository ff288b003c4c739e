"""What the rows of a batch keep when they move, and their later blocks."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins import policy_calls
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.errors import PolicyRuntimeError
from tests.core.small_blocks import (
    LENGTH,
    MASK,
    OFF,
    Ahead,
    BeginsOnce,
    Counting,
    Noting,
    logits_of,
    masks,
    started,
)


def test_observed_statistics_and_on_error_are_kept_when_rows_move():
    policy = Noting()
    batch = started(
        [policy] * 3,
        observe=frozenset({"margin"}),
        on_error="progress",
    )
    batch.keep([2, 0])
    assert (batch.observe, batch.on_error) == ({"margin"}, "progress")
    outcome = denoising_step(batch, logits_of(2), end_of_text=OFF)
    assert outcome.step.has("margin")
    assert not policy.seen[-1].has("margin")


def test_later_blocks_have_the_fields_of_their_rows():
    policy = Ahead("reference")
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    batch = started(
        [policy] * 2,
        block_index=torch.tensor([5, 1]),
        canvas_length=torch.tensor([40, 20]),
        reference=torch.zeros(2, LENGTH, dtype=torch.int64),
        generators=generators,
    )
    assert batch.looking_ahead == [0, 1]
    present = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    reference = torch.arange(3 * LENGTH).view(3, LENGTH)
    batch.look_ahead([1, 1, 0], masks(3), present=present, reference=reference)
    assert batch.later_rows == [1, 1, 0]
    later = (logits_of(3, 1).flatten(0, 1), torch.arange(3 * LENGTH))
    denoising_step(batch, logits_of(2), end_of_text=OFF, later=later)
    seen = next(step for step in policy.seen if len(step.masked) == 3)
    assert seen.block_index.tolist() == [2, 3, 6]
    assert seen.canvas_length.tolist() == [20, 20, 40]
    assert seen.present.tolist() == seen.masked.tolist() == present.tolist()
    assert torch.equal(seen.reference, reference)
    assert seen.generator == (generators[1], generators[1], generators[0])
    # The next block of row 1 begins with the state that was kept for it.
    batch.advance([1], masks(1), reference=reference[:1])
    assert batch.states[0]["calls"].tolist() == [1, 1]
    assert batch.later_rows == [1, 0]
    batch.forget_later([1])
    assert batch.later_rows == [0]


def test_an_empty_list_of_later_blocks_is_accepted():
    batch = started([Ahead()])
    batch.look_ahead([], masks(0))
    assert batch.later_rows == []
    denoising_step(batch, logits_of(1), end_of_text=OFF)


@pytest.mark.parametrize(
    ("of_batch", "of_blocks", "raises"),
    [("raise", None, True), ("progress", None, False), ("raise", "progress", False)],
)
def test_later_blocks_begin_with_the_on_error_of_the_batch_by_default(of_batch, of_blocks, raises):
    class Unready(BeginsOnce, Ahead):
        pass

    batch = started([Unready()], on_error=of_batch)
    if raises:
        with pytest.raises(PolicyRuntimeError, match="not again"):
            batch.look_ahead([0], masks(1), on_error=of_blocks)
        return
    batch.look_ahead([0], masks(1), on_error=of_blocks)
    assert batch.later_rows == [0]


def test_the_next_block_has_the_given_fields():
    policies = [Noting("reference"), Noting()]
    batch = started(policies)
    present = torch.tensor([[True, True, False, True]])
    tokens = torch.tensor([[1, MASK, MASK, MASK]])
    batch.advance([0], tokens, present=present, reference=torch.tensor([[4, 5, 6, 7]]))
    assert batch.masked.tolist() == [[False, True, False, True], [True] * LENGTH]
    assert batch.present.tolist() == [present[0].tolist(), [True] * LENGTH]
    assert batch.reference is not None
    assert batch.reference[0].tolist() == [4, 5, 6, 7]
    denoising_step(batch, logits_of(2), end_of_text=OFF)
    assert policies[0].seen[0].reference.tolist() == [[4, 5, 6, 7]]
    assert not policies[1].seen[0].has("reference")
    batch.advance([0], masks(1), reference=torch.tensor([[3, 3, 3, 3]]))
    assert batch.reference[0].tolist() == [3, 3, 3, 3]
    assert batch.present[0].all()
    assert batch.masked[0].all()


def test_a_reference_that_no_policy_reads_may_be_left_out():
    reference = torch.zeros(1, LENGTH, dtype=torch.int64)
    batch = started([Noting()], reference=reference)
    batch.advance([0], masks(1))
    assert batch.block_index.tolist() == [1]
    without = started([Noting("reference")])
    without.advance([0], masks(1))
    assert without.reference is None


@pytest.mark.parametrize(
    ("moving", "wanted"),
    [
        ([3], [[1, 1], [1, 0]]),
        ([0, 2], [[0, 0], [1, 1]]),
        ([0, 1, 2], [[0, 0], [0, 1]]),
        ([2, 3], [[1, 0], [1, 0]]),
        ([0, 1, 2, 3], [[0, 0], [0, 0]]),
        ([], [[1, 1], [1, 1]]),
    ],
)
def test_only_the_advanced_rows_begin_a_new_block(moving, wanted):
    first, second, plain = Counting(), Counting(), Noting()
    for policies in ([first, second, first, second], [first, second, first, second, plain]):
        batch = started(policies)
        denoising_step(batch, logits_of(len(policies)), end_of_text=OFF)
        batch.advance(moving, masks(len(moving)))
        states = [state["calls"].tolist() for state in batch.states if state]
        assert states == wanted


def test_each_row_passes_on_the_carried_state_of_its_own_policy():
    class Carrying(Counting):
        carries = frozenset({"calls"})

        def init_state(self, batch_size, block_length, device):
            return {"calls": torch.arange(batch_size) * 10}

    plain, first, second = Counting(), Carrying(), Carrying()
    batch = started([plain, first, second, first, second])
    carried = [batch.carried(row) for row in range(5)]
    assert [{name: each.tolist() for name, each in row.items()} for row in carried] == [
        {},
        {"calls": [0]},
        {"calls": [0]},
        {"calls": [10]},
        {"calls": [10]},
    ]
    denoising_step(batch, logits_of(5), end_of_text=OFF)
    assert carried[3]["calls"].tolist() == [10]
    batch.carry([{}, {"calls": torch.tensor([7])}, {}, {}, {"calls": torch.tensor([9])}])
    assert [state["calls"].tolist() for state in batch.states] == [[1], [7, 11], [1, 9]]


def test_gathered_rows_keep_their_later_blocks():
    policy = Ahead()
    batches = []
    for rows in (2, 1):
        batch = started([policy] * rows)
        batch.look_ahead([0, 0, *range(1, rows)], masks(rows + 1))
        batches.append(batch)
    first, second = batches
    joined = BlockBatch.gather([(second, 0), (first, 1), (first, 0)])
    assert joined.later_rows == [0, 0, 1, 2, 2]
    assert joined.policies == [policy] * 3
    first.keep([1])
    assert first.later_rows == [0]
    later = (logits_of(1, 3).flatten(0, 1), torch.arange(LENGTH))
    denoising_step(first, logits_of(1), end_of_text=OFF, later=later)
    first.keep([])
    assert first.later_rows == []


def test_a_policy_without_a_state_is_not_asked_for_one_again():
    class Stateless(Noting):
        asked = 0

        def init_state(self, batch_size, block_length, device):
            self.asked += 1
            return {}

    policy = Stateless()
    batch = started([policy] * 2)
    batch.advance([1], masks(1))
    batch.advance([0, 1], masks(2))
    assert policy.asked == 1


@pytest.mark.parametrize("moving", [[0], [2], [0, 2], [0, 1, 2, 3]])
def test_rows_whose_policy_fails_to_begin_again_continue_by_its_progress_rule(moving, caplog):
    class Once(BeginsOnce, Counting):
        progress = "leftmost_if_empty"
        requires = frozenset({"confidence", "margin", "committed"})

    policy_calls._first_failure.seen.clear()
    once, good = Once(), Counting()
    policies = [once, good, once, good]
    batch = started(policies, on_error="progress")
    denoising_step(batch, logits_of(4), end_of_text=OFF)
    batch.advance(moving, masks(len(moving)))
    policy_calls._first_failure.seen.clear()
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "policy 'once': init_state failed"
    ]
    staying = [row for row in (0, 2) if row not in moving]
    assert [batch.policies[row] is once for row in range(4)] == [row in staying for row in range(4)]
    assert (batch.policies[1], batch.policies[3]) == (good, good)
    assert batch.requires == (once.requires if staying else frozenset())
    assert batch.reads_committed == bool(staying)
    denoising_step(batch, logits_of(4, 1), end_of_text=OFF)
    for row in (0, 2):
        if row in moving:
            assert batch.masked[row].tolist() == [False, True, True, True]
            assert batch.carried(row) == {}
    counts = {
        row: int(state["calls"][at])
        for group, state in zip(batch._groups, batch.states, strict=True)
        for at, row in enumerate(group.members)
        if state
    }
    assert counts == {row: 1 if row in moving else 2 for row in (1, 3, *staying)}


def test_a_state_is_kept_only_for_the_next_block():
    policy = Ahead()
    batch = started([policy] * 2, on_error="progress")
    batch.look_ahead([0, 1], masks(2))
    later = (logits_of(2, 1).flatten(0, 1), torch.arange(2 * LENGTH))
    for seed in range(2):
        denoising_step(batch, logits_of(2, seed), end_of_text=OFF, later=later)
    assert batch.states[0]["calls"].tolist() == [2, 2]
    batch.states[0]["calls"] += 5
    batch.advance([0], masks(1))
    assert batch.states[0]["calls"].tolist() == [2, 7]
    assert batch.later_rows == [1]
    batch.advance([0], masks(1))  # no state is kept for this block
    assert batch.states[0]["calls"].tolist() == [0, 7]
    batch.advance([0, 1], masks(2))
    assert batch.states[0]["calls"].tolist() == [0, 2]
    assert batch.later_rows == []


def test_a_state_of_another_form_is_not_kept_for_the_next_block():
    class Shifting(Ahead):
        dtypes = (torch.int64, torch.float32)

        def init_state(self, batch_size, block_length, device):
            self.dtypes = self.dtypes[::-1]
            return {"calls": torch.full((batch_size,), 8, dtype=self.dtypes[1])}

    batch = started([Shifting()])
    batch.look_ahead([0], masks(1))
    later = (logits_of(1, 1).flatten(0, 1), torch.arange(LENGTH))
    denoising_step(batch, logits_of(1), end_of_text=OFF, later=later)
    batch.advance([0], masks(1))
    assert batch.states[0]["calls"].dtype == torch.int64
    assert batch.states[0]["calls"].tolist() == [8]
    assert batch.later_rows == []


@pytest.mark.parametrize("on_error", ["raise", "progress"])
def test_states_of_two_forms_are_not_joined(on_error, caplog):
    class Shifting(Counting):
        dtypes = (torch.int64, torch.float32)

        def init_state(self, batch_size, block_length, device):
            self.dtypes = self.dtypes[::-1]
            return {"calls": torch.zeros(batch_size, dtype=self.dtypes[1])}

    policy_calls._first_failure.seen.clear()
    policy = Shifting()
    rows = [(started([policy], on_error=on_error), 0) for _ in range(2)]
    said = "policy 'shifting': init_state failed"
    if on_error == "raise":
        with pytest.raises(PolicyRuntimeError, match=f"{said}: gave the state .*float32"):
            BlockBatch.gather(rows)
        return
    batch = BlockBatch.gather(rows)
    policy_calls._first_failure.seen.clear()
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [said]
    denoising_step(batch, logits_of(2), end_of_text=OFF)
    assert batch.masked.sum(-1).tolist() == [LENGTH - 1] * 2


def test_rows_that_move_keep_their_references():
    reference = torch.arange(2 * LENGTH).view(2, LENGTH)
    policy = Noting("reference")
    batch = started([policy] * 2, reference=reference)
    batch.keep([1])
    assert batch.reference is not None
    assert torch.equal(batch.reference, reference[1:])
    without = started([Noting()] * 2)
    without.keep([1])
    assert without.reference is None


def test_rows_that_stay_keep_their_references():
    policy, reference = Noting("reference"), torch.arange(2 * LENGTH).view(2, LENGTH)
    batch = started([policy] * 2, reference=reference)
    batch.advance([0], masks(1), reference=torch.tensor([[5, 5, 5, 5]]))
    assert batch.reference.tolist() == [[5] * LENGTH, reference[1].tolist()]
