"""Policies that look ahead, tested without an engine: histories over the canvas, row by row."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2pd_plugins import UnmaskPolicy, policy_calls
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import PolicyRuntimeError
from l2pd_plugins.slots import BlockSlots
from tests.engines.policies.l2pd_engine_policies.rules import Persistent

LENGTH, VOCABULARY, MASK = 3, 6, 5
OFF = EndOfText("off", ())


class Stood(Persistent):
    """Selects predictions that it has seen twice in a row, whichever block was decoded then."""

    requires = frozenset({"confidence", "ahead"})


class Forgetful(Stood):
    """The same, but its state begins with each block."""

    requires = frozenset({"confidence"})


class FailsAhead(Stood):
    """Fails for later blocks."""

    def select(self, step, state):
        if bool((step.block_index > 0).all()):
            raise ValueError("too far ahead")
        return super().select(step, state)


def logits_of(row: int, time: int, blocks: int) -> torch.Tensor:
    """The logits of a row's whole canvas at its n-th pass: (blocks, L, V)."""
    generator = torch.Generator().manual_seed(1000 * row + time)
    base = torch.Generator().manual_seed(row)
    shape = (blocks, LENGTH, VOCABULARY)
    return torch.randn(shape, generator=base) + torch.randn(shape, generator=generator)


def reference(row: int, blocks: int, remembers: bool) -> list[list[int]]:
    """The row's tokens after every step, as nested lists: (steps, blocks * L)."""
    tokens = [[MASK] * LENGTH for _ in range(blocks)]
    before, history, time = None, [], 0
    for at in range(blocks):
        if not remembers:
            before = None
        while MASK in tokens[at]:
            logits = logits_of(row, time, blocks)
            logits[..., MASK] = -torch.inf
            confidence, x0 = (v.tolist() for v in logits.softmax(-1).max(-1))
            open_ = [i for i in range(LENGTH) if tokens[at][i] == MASK]
            chosen = [i for i in open_ if before is not None and x0[at][i] == before[at][i]]
            for i in chosen or [max(open_, key=confidence[at].__getitem__)]:
                tokens[at][i] = x0[at][i]
            before = x0
            time += 1
            history.append([token for block in tokens for token in block])
    return history


class Run:
    """Rows with canvases of `blocks[row]` blocks, decoded together by the core."""

    def __init__(self, policies, blocks, on_error="raise"):
        self.blocks, self.on_error = blocks, on_error
        self.rows = list(range(len(blocks)))
        self.time = [0] * len(blocks)
        self.at = [0] * len(blocks)
        self.canvas = [[[MASK] * LENGTH for _ in range(count)] for count in blocks]
        self.history: list[list[list[int]]] = [[] for _ in blocks]
        self.batch = self.begin(policies)

    def begin(self, policies):
        shape = (len(policies), LENGTH)
        batch = BlockBatch.start(
            torch.full(shape, MASK),
            policies,
            mask_token_id=MASK,
            canvas_length=torch.tensor(self.blocks) * LENGTH,
            on_error=self.on_error,
        )
        owners = [row for row in batch.looking_ahead for _ in range(self.blocks[row] - 1)]
        batch.look_ahead(owners, torch.full((len(owners), LENGTH), MASK))
        assert batch.later_rows == owners
        return batch

    def step(self):
        batch = self.batch
        model = [logits_of(row, self.time[row], self.blocks[row]) for row in self.rows]
        here = [logits[self.at[row]] for row, logits in zip(self.rows, model, strict=True)]
        seen = [0] * len(self.rows)
        ahead = []
        for local in batch.later_rows:
            seen[local] += 1
            ahead.append(model[local][self.at[self.rows[local]] + seen[local]])
        later = None
        if ahead:
            later = (torch.cat(ahead), torch.arange(len(ahead) * LENGTH))
        denoising_step(batch, torch.stack(here), end_of_text=OFF, later=later)
        moving, staying = [], []
        for local, row in enumerate(self.rows):
            self.time[row] += 1
            self.canvas[row][self.at[row]] = batch.tokens[local].tolist()
            self.history[row].append([t for block in self.canvas[row] for t in block])
            if batch.masked[local].any():
                staying.append(local)
            elif self.at[row] + 1 < self.blocks[row]:
                self.at[row] += 1
                staying.append(local)
                moving.append(local)
        if moving:
            batch.advance(moving, torch.full((len(moving), LENGTH), MASK))
        return staying

    def keep(self, locals_):
        self.batch.keep(locals_)
        self.rows = [self.rows[local] for local in locals_]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=5), st.data())
def test_a_state_begins_with_the_canvas_for_any_order_of_the_batch(rows, data):
    ahead, forgetful = Stood(), Forgetful()
    run = Run([ahead if looks else forgetful for _, looks in rows], [count for count, _ in rows])
    while run.rows:
        staying = run.step()
        run.keep(data.draw(st.permutations(staying))) if staying else run.rows.clear()
    wanted = [reference(row, count, looks) for row, (count, looks) in enumerate(rows)]
    assert run.history == wanted


def test_a_history_over_the_canvas_commits_other_tokens():
    # Otherwise the test above could not distinguish the two.
    assert any(reference(row, 3, True) != reference(row, 3, False) for row in range(5))


def test_gathered_rows_of_two_batches_keep_their_later_blocks():
    policy = Stood()
    first, second = Run([policy] * 2, [3, 2]), Run([policy] * 2, [3, 4])
    for run in (first, second):
        run.step()
    both = BlockBatch.gather([(second.batch, 1), (first.batch, 0)])
    assert both.later_rows == [0] * (3 - second.at[1]) + [1] * (2 - first.at[0])
    back = BlockBatch.gather([(both, 1)])
    assert torch.equal(
        back._later.blocks.states[0]["x0"],
        first.batch._later.blocks.states[0]["x0"][: 2 - first.at[0]],
    )


def test_an_ended_row_drops_its_later_blocks_and_the_others_keep_theirs():
    run = Run([Stood()] * 3, [3, 2, 3])
    run.batch.forget_later([0])
    assert run.batch.later_rows == [1, 2, 2]
    run.batch.forget_later([1, 2])
    assert run.batch.later_rows == []


def test_a_later_block_is_seen_at_step_0_with_its_own_block_index():
    seen = []

    class Notes(Stood):
        def select(self, step, state):
            seen.append((step.step_index.tolist(), step.block_index.tolist()))
            return super().select(step, state)

    run = Run([Notes()] * 2, [3, 2])
    run.step()
    run.step()
    assert seen[0] in (([0, 0, 0], [1, 2, 1]), ([0, 0], [0, 0]))
    assert ([0, 0, 0], [1, 2, 1]) in seen


def test_logits_of_later_blocks_are_required_and_refused_if_there_are_none():
    batch = Run([Stood()], [2]).batch
    with pytest.raises(ValueError, match="1 later blocks and no logits"):
        denoising_step(batch, torch.zeros(1, LENGTH, VOCABULARY), end_of_text=OFF)
    blind = Run([Forgetful()], [2]).batch
    with pytest.raises(ValueError, match="0 later blocks and some logits"):
        denoising_step(
            blind,
            torch.zeros(1, LENGTH, VOCABULARY),
            end_of_text=OFF,
            later=(torch.zeros(LENGTH, VOCABULARY), torch.arange(LENGTH)),
        )


def test_a_failure_in_a_later_block_affects_only_its_own_rows(caplog):
    policy_calls._first_failure.seen.clear()
    with pytest.raises(PolicyRuntimeError, match="too far ahead"):
        Run([FailsAhead()], [2]).step()
    run = Run([FailsAhead(), Stood()], [3, 3], on_error="progress")
    with caplog.at_level(logging.ERROR):
        while run.rows:
            staying = run.step()
            run.keep(staying) if staying else run.rows.clear()
    assert run.history[1] == reference(1, 3, True)
    assert MASK not in run.history[0][-1]
    assert len(caplog.records) == 1
    policy_calls._first_failure.seen.clear()


class Counts(UnmaskPolicy):
    """Counts the steps of a row's answer and of its block."""

    carries = frozenset({"answer"})

    def init_state(self, batch_size, block_length, device):
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return {"answer": zeros, "block": zeros.clone()}

    def select(self, step, state):
        state.update(answer=state["answer"] + 1, block=state["block"] + 1)
        return torch.zeros_like(step.masked)


def test_carried_state_is_kept_when_the_next_block_begins():
    run = Run([Counts()] * 2, [2, 2])
    for _ in range(LENGTH):
        run.step()  # one token per step: both rows have advanced
    assert {name: value.tolist() for name, value in run.batch.states[0].items()} == {
        "answer": [LENGTH] * 2,
        "block": [0] * 2,
    }
    slots = BlockSlots(2, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))
    slots.assign(0, Counts(), [MASK] * LENGTH, [True] * LENGTH)
    taken = slots.take(np.array([0]))
    denoising_step(taken.block, torch.zeros(1, LENGTH, VOCABULARY), end_of_text=OFF)
    taken.advance(
        torch.tensor([True]),
        torch.full((1, LENGTH), MASK),
        torch.ones(1, LENGTH, dtype=torch.bool),
    )
    assert {name: value.tolist() for name, value in taken.block.states[0].items()} == {
        "answer": [1],
        "block": [0],
    }


def test_an_engine_that_starts_every_block_passes_on_carried_state():
    def started():
        tokens = torch.full((3, LENGTH), MASK)
        return BlockBatch.start(tokens, [first, other, first], mask_token_id=MASK)

    first, other = Counts(), Counts()
    before = started()
    for _ in range(2):
        denoising_step(before, torch.zeros(3, LENGTH, VOCABULARY), end_of_text=OFF)
    after = started()
    after.carry([before.carried(2), before.carried(1), {}])  # the last request is new
    assert [state["answer"].tolist() for state in after.states] == [[2, 0], [2]]
    assert [state["block"].tolist() for state in after.states] == [[0, 0], [0]]
