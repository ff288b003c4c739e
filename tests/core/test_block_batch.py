"""A batch of blocks: its defaults, its fields, and what its rows keep when they move."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins import policy_calls
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
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
    assert outcome.step.has("margin")
    assert not policy.seen[-1].has("margin")


def test_a_stand_in_bears_the_name_of_what_it_stands_in_for():
    class Unready(Steady):
        def init_state(self, batch_size, block_length, device):
            raise ValueError("not today")

    batch = BlockBatch.start(masks(1), [Unready()], mask_token_id=MASK, on_error="progress")
    assert [policy.name for policy in batch.policies] == ["unready"]


@pytest.mark.parametrize("rule", [OFF, END])
def test_absent_positions_take_nothing_back(rule):
    """Remasking keeps to what is present; of what was committed it takes back all but one."""

    class Wavering(RemaskingPolicy):
        def select(self, step, state):
            return step.masked

        def remask(self, step, state):
            return torch.ones_like(step.masked)

    present = torch.tensor([[False, True, True, True], [False, False, True, False]])
    batch = BlockBatch.start(masks(2), [Wavering()] * 2, mask_token_id=MASK, present=present)
    logits = logits_of(2).index_fill(-1, torch.tensor(EOT), -9.0)
    outcome = denoising_step(batch, logits, end_of_text=rule)
    assert outcome.committed.tolist() == present.tolist()
    assert outcome.remasked.sum(-1).tolist() == [2, 0]
    assert not (outcome.remasked & ~present).any()
    # The least confident go back.
    confidence = outcome.step.confidence[0, 1:]
    assert not outcome.remasked[0, 1 + int(confidence.argmax())]
    assert batch.step_index.tolist() == [1, 1]
    denoising_step(batch, logits, end_of_text=rule)
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
    for rule in (OFF, EndOfText("off", (EOT,))):
        off = BlockBatch.start(masks(2), [Wavering()] * 2, mask_token_id=MASK)
        outcome = denoising_step(off, logits, end_of_text=rule)
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
    assert not plain.seen[0].has("logits")
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


class Ahead(Noting):
    def __init__(self, *requires: str, fails: bool = False) -> None:
        super().__init__("ahead", *requires)
        self.fails = fails

    def init_state(self, batch_size, block_length, device):
        return {"calls": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def select(self, step, state):
        if self.fails and bool((step.block_index > 0).all()):
            raise ValueError("too far ahead")
        state["calls"] = state["calls"] + 1
        return super().select(step, state)


def test_later_blocks_have_the_fields_of_their_rows():
    policy = Ahead("reference")
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    batch = BlockBatch.start(
        masks(2),
        [policy] * 2,
        mask_token_id=MASK,
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
    # What was kept for the next block of row 1 is what that block begins with.
    batch.advance([1], masks(1), reference=reference[:1])
    assert batch.states[0]["calls"].tolist() == [1, 1]
    assert batch.later_rows == [1, 0]
    batch.forget_later([1])
    assert batch.later_rows == [0]


def test_no_later_blocks_are_none():
    batch = BlockBatch.start(masks(1), [Ahead()], mask_token_id=MASK)
    batch.look_ahead([], masks(0))
    assert batch.later_rows == []
    denoising_step(batch, logits_of(1), end_of_text=OFF)


@pytest.mark.parametrize(
    ("of_batch", "of_blocks", "raises"),
    [("raise", None, True), ("progress", None, False), ("raise", "progress", False)],
)
def test_later_blocks_begin_under_the_rule_of_the_batch_unless_told_otherwise(
    of_batch, of_blocks, raises
):
    class Unready(Ahead):
        begun = False

        def init_state(self, batch_size, block_length, device):
            if self.begun:
                raise ValueError("not again")
            self.begun = True
            return super().init_state(batch_size, block_length, device)

    batch = BlockBatch.start(masks(1), [Unready()], mask_token_id=MASK, on_error=of_batch)
    if raises:
        with pytest.raises(PolicyRuntimeError, match="not again"):
            batch.look_ahead([0], masks(1), on_error=of_blocks)
        return
    batch.look_ahead([0], masks(1), on_error=of_blocks)
    assert batch.later_rows == [0]


def test_the_next_block_has_what_is_given_for_it():
    policies = [Noting("reference"), Noting()]
    batch = BlockBatch.start(masks(2), policies, mask_token_id=MASK)
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


def test_a_reference_that_nobody_reads_need_not_go_on():
    reference = torch.zeros(1, LENGTH, dtype=torch.int64)
    batch = BlockBatch.start(masks(1), [Noting()], mask_token_id=MASK, reference=reference)
    batch.advance([0], masks(1))
    assert batch.block_index.tolist() == [1]
    without = BlockBatch.start(masks(1), [Noting("reference")], mask_token_id=MASK)
    without.advance([0], masks(1))
    assert without.reference is None


class Counting(UnmaskPolicy):
    def init_state(self, batch_size, block_length, device):
        return {"calls": torch.zeros(batch_size, dtype=torch.int64)}

    def select(self, step, state):
        state["calls"] = state["calls"] + 1
        return torch.zeros_like(step.masked)


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
def test_the_rows_that_move_begin_anew_and_no_others(moving, wanted):
    first, second, plain = Counting(), Counting(), Noting()
    for policies in ([first, second, first, second], [first, second, first, second, plain]):
        batch = BlockBatch.start(masks(len(policies)), policies, mask_token_id=MASK)
        denoising_step(batch, logits_of(len(policies)), end_of_text=OFF)
        batch.advance(moving, masks(len(moving)))
        states = [state["calls"].tolist() for state in batch.states if state]
        assert states == wanted


def test_an_edit_is_no_commit_that_may_be_taken_back():
    """Of one commit and three edits none may be masked again: the block would not end."""

    class Wavering(RemaskingPolicy):
        edits = True
        requires = frozenset({"confidence", "committed"})

        def select(self, step, state):
            return torch.ones_like(step.masked)

        def remask(self, step, state):
            return torch.ones_like(step.masked)

    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[..., 3] = 5.0
    batch = BlockBatch.start(torch.tensor([[1, MASK, 1, 1]]), [Wavering()], mask_token_id=MASK)
    outcome = denoising_step(batch, logits, end_of_text=OFF)
    assert outcome.committed.all()
    assert not outcome.remasked.any()
    assert batch.tokens.tolist() == [[3] * LENGTH]


def test_nothing_is_behind_the_end_where_nothing_is():
    present = torch.tensor([[True, True, True, False]])
    batch = BlockBatch.start(masks(1), [Noting(answer=True)], mask_token_id=MASK, present=present)
    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[0, :, 3] = 2.0
    logits[0, 1, EOT] = 9.0
    outcome = denoising_step(batch, logits, end_of_text=END)
    assert outcome.behind.tolist() == [[False, False, True, False]]
    assert outcome.committed.tolist() == [[True, True, False, False]]
    assert batch.present.tolist() == [[True, True, False, False]]
    assert batch.tokens.tolist() == [[3, EOT, EOT, MASK]]


def test_what_is_behind_the_end_was_not_masked_again():
    class Wavering(RemaskingPolicy):
        def select(self, step, state):
            return step.masked

        def remask(self, step, state):
            return torch.arange(LENGTH).expand_as(step.masked) >= 2

    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[0, :, 3] = 2.0
    logits[0, 1, EOT] = 9.0
    batch = BlockBatch.start(masks(1), [Wavering()], mask_token_id=MASK)
    outcome = denoising_step(batch, logits, end_of_text=END)
    assert not outcome.remasked.any()
    assert not batch.masked.any()
    assert batch.tokens.tolist() == [[3, EOT, EOT, EOT]]


def test_only_what_is_required_is_computed():
    outcome = denoising_step(
        BlockBatch.start(masks(1), [Noting()], mask_token_id=MASK), logits_of(1), end_of_text=OFF
    )
    step = outcome.step
    assert not any(map(step.has, ("entropy", "margin", "logits", "reference")))
    with_entropy = BlockBatch.start(masks(1), [Noting("entropy")], mask_token_id=MASK)
    step = denoising_step(with_entropy, logits_of(1), end_of_text=OFF).step
    assert step.has("entropy")
    assert not step.has("margin")


def test_tokens_that_were_drawn_are_what_is_predicted():
    for some in (False, True):
        batch = BlockBatch.start(masks(2), [Noting(answer=True)] * 2, mask_token_id=MASK)
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
def test_too_few_logits_are_refused_only_where_no_positions_are_given(position):
    batch = BlockBatch.start(torch.tensor([[MASK, MASK, MASK, 1]]), [Noting()], mask_token_id=MASK)
    logits = logits_of(1).flatten(0, 1)[:3]
    if position is None:
        with pytest.raises(ValueError, match="logits of 3 rows for 1 blocks of 4 positions"):
            denoising_step(batch, logits, end_of_text=OFF)
    else:
        assert denoising_step(batch, logits, position, end_of_text=OFF).committed.sum() == 1


class Spoiling(Noting):
    """Writes to what it is shown, and fails."""

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
def test_what_a_policy_writes_reaches_neither_the_block_nor_the_step(beside, requires):
    def started(policy):
        policies = [policy, Steady()] if beside else [policy]
        return BlockBatch.start(
            masks(len(policies)), policies, mask_token_id=MASK, on_error="progress"
        )

    bad, good = started(Spoiling(*requires)), started(Noting(*requires))
    for seed in range(LENGTH):
        rows = len(bad.tokens)
        spoilt = denoising_step(bad, logits_of(rows, seed), end_of_text=OFF)
        sound = denoising_step(good, logits_of(rows, seed), end_of_text=OFF)
        assert torch.equal(bad.tokens, good.tokens)
        assert torch.equal(bad.block_index, good.block_index)
        # From the second step on a stand-in runs, which requires nothing.
        shown = ("x0", "confidence", *requires) if not seed else ("x0", "confidence")
        for name in set(shown) - {"logits"}:
            found, wanted = getattr(spoilt.step, name), getattr(sound.step, name)
            assert torch.equal(found, wanted), name
        assert torch.equal(spoilt.committed, sound.committed)
    assert not bad.masked.any()
    # It is not asked again.
    assert len(bad.policies) == len(good.policies)
    assert bad.policies[0].name == "spoiling"
    assert not isinstance(bad.policies[0], Spoiling)


def test_a_policy_that_raises_is_asked_again():
    policy = Failing()
    batch = BlockBatch.start(masks(1), [policy], mask_token_id=MASK, on_error="progress")
    denoising_step(batch, logits_of(1), end_of_text=OFF)
    assert batch.policies == [policy]


def test_each_row_hands_on_what_its_own_policy_carries():
    class Carrying(Counting):
        carries = frozenset({"calls"})

        def init_state(self, batch_size, block_length, device):
            return {"calls": torch.arange(batch_size) * 10}

    plain, first, second = Counting(), Carrying(), Carrying()
    batch = BlockBatch.start(masks(5), [plain, first, second, first, second], mask_token_id=MASK)
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


def test_rows_that_are_gathered_keep_their_later_blocks():
    policy = Ahead()
    batches = []
    for rows in (2, 1):
        batch = BlockBatch.start(masks(rows), [policy] * rows, mask_token_id=MASK)
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
    batch = BlockBatch.start(masks(2), [policy] * 2, mask_token_id=MASK)
    batch.advance([1], masks(1))
    batch.advance([0, 1], masks(2))
    assert policy.asked == 1


@pytest.mark.parametrize("moving", [[0], [2], [0, 2], [0, 1, 2, 3]])
def test_rows_whose_policy_cannot_begin_again_go_on_by_its_progress_rule(moving, caplog):
    class Once(Counting):
        progress = "leftmost_if_empty"
        requires = frozenset({"confidence", "margin", "committed"})
        begun = False

        def init_state(self, batch_size, block_length, device):
            if self.begun:
                raise ValueError("not again")
            self.begun = True
            return super().init_state(batch_size, block_length, device)

    policy_calls._failed.clear()
    once, good = Once(), Counting()
    policies = [once, good, once, good]
    batch = BlockBatch.start(masks(4), policies, mask_token_id=MASK, on_error="progress")
    denoising_step(batch, logits_of(4), end_of_text=OFF)
    batch.advance(moving, masks(len(moving)))
    policy_calls._failed.clear()
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


def test_a_state_is_kept_for_the_next_block_alone():
    policy = Ahead()
    batch = BlockBatch.start(masks(2), [policy] * 2, mask_token_id=MASK, on_error="progress")
    batch.look_ahead([0, 1], masks(2))
    later = (logits_of(2, 1).flatten(0, 1), torch.arange(2 * LENGTH))
    for seed in range(2):
        denoising_step(batch, logits_of(2, seed), end_of_text=OFF, later=later)
    assert batch.states[0]["calls"].tolist() == [2, 2]
    batch.states[0]["calls"] += 5
    batch.advance([0], masks(1))
    assert batch.states[0]["calls"].tolist() == [2, 7]
    assert batch.later_rows == [1]
    batch.advance([0], masks(1))  # for which none is kept
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

    batch = BlockBatch.start(masks(1), [Shifting()], mask_token_id=MASK)
    batch.look_ahead([0], masks(1))
    later = (logits_of(1, 1).flatten(0, 1), torch.arange(LENGTH))
    denoising_step(batch, logits_of(1), end_of_text=OFF, later=later)
    batch.advance([0], masks(1))
    assert batch.states[0]["calls"].dtype == torch.int64
    assert batch.states[0]["calls"].tolist() == [8]
    assert batch.later_rows == []


@pytest.mark.parametrize("on_error", ["raise", "progress"])
def test_states_of_two_forms_do_not_go_together(on_error, caplog):
    class Shifting(Counting):
        dtypes = (torch.int64, torch.float32)

        def init_state(self, batch_size, block_length, device):
            self.dtypes = self.dtypes[::-1]
            return {"calls": torch.zeros(batch_size, dtype=self.dtypes[1])}

    policy_calls._failed.clear()
    policy = Shifting()
    rows = [
        (BlockBatch.start(masks(1), [policy], mask_token_id=MASK, on_error=on_error), 0)
        for _ in range(2)
    ]
    said = "policy 'shifting': init_state failed"
    if on_error == "raise":
        with pytest.raises(PolicyRuntimeError, match=f"{said}: gave the state .*float32"):
            BlockBatch.gather(rows)
        return
    batch = BlockBatch.gather(rows)
    policy_calls._failed.clear()
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [said]
    denoising_step(batch, logits_of(2), end_of_text=OFF)
    assert batch.masked.sum(-1).tolist() == [LENGTH - 1] * 2


def test_a_policy_that_may_edit_edits_what_it_names():
    class Editing(Noting):
        edits = True

        def select(self, step, state):
            return torch.tensor([[True, False, False, False]])

    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[..., 3] = 5.0
    tokens = torch.tensor([[1, 2, MASK, MASK]])
    batch = BlockBatch.start(tokens, [Editing("committed")], mask_token_id=MASK)
    outcome = denoising_step(batch, logits, end_of_text=OFF)
    assert outcome.committed.tolist() == [[True, False, True, False]]
    assert batch.tokens.tolist() == [[3, 2, 3, MASK]]


@pytest.mark.parametrize("mask", [0, 8])
@pytest.mark.parametrize("some", [False, True])
def test_from_its_last_step_on_a_row_predicts_no_mask(mask, some):
    """Without suppress_mask, rows that have taken L steps, whichever token is the mask."""
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


def test_a_text_ends_where_its_end_is_committed_and_only_there():
    batch = BlockBatch.start(
        masks(3),
        [Noting()] * 3,
        mask_token_id=MASK,
        ignores_end=torch.tensor([False, True, False]),
    )
    logits = torch.zeros(3, LENGTH, VOCABULARY)
    logits[:, :, 3] = 2.0
    logits[:2, 1, EOT] = 9.0
    outcome = denoising_step(batch, logits, end_of_text=END)
    assert outcome.ended.tolist() == [True, False, False]
    assert outcome.behind.sum(-1).tolist() == [LENGTH - 2, 0, 0]


def test_what_others_require_is_not_shown_beside_committed_positions():
    plain, asking = Noting(), Noting("entropy", "margin", "committed")
    batch = BlockBatch.start(masks(2), [plain, asking], mask_token_id=MASK)
    denoising_step(batch, logits_of(2), end_of_text=OFF)
    assert not plain.seen[0].has("entropy")
    assert not plain.seen[0].has("margin")
    assert asking.seen[0].has("entropy")
    assert asking.seen[0].has("margin")


@pytest.mark.parametrize("rule", ["argmax_if_empty", "leftmost_if_empty"])
def test_a_rule_for_empty_selections_adds_to_no_other(rule):
    class Third(UnmaskPolicy):
        progress = rule

        def select(self, step, state):
            return torch.tensor([[False, False, True, False]]) & step.masked

    batch = BlockBatch.start(masks(1), [Third()], mask_token_id=MASK)
    assert denoising_step(batch, logits_of(1), end_of_text=OFF).committed.tolist() == [
        [False, False, True, False]
    ]
    assert denoising_step(batch, logits_of(1), end_of_text=OFF).committed.sum() == 1


def test_rows_that_move_keep_their_references():
    reference = torch.arange(2 * LENGTH).view(2, LENGTH)
    policy = Noting("reference")
    batch = BlockBatch.start(masks(2), [policy] * 2, mask_token_id=MASK, reference=reference)
    batch.keep([1])
    assert batch.reference is not None
    assert torch.equal(batch.reference, reference[1:])
    without = BlockBatch.start(masks(2), [Noting()] * 2, mask_token_id=MASK)
    without.keep([1])
    assert without.reference is None


def test_rows_that_stay_keep_their_references():
    policy, reference = Noting("reference"), torch.arange(2 * LENGTH).view(2, LENGTH)
    batch = BlockBatch.start(masks(2), [policy] * 2, mask_token_id=MASK, reference=reference)
    batch.advance([0], masks(1), reference=torch.tensor([[5, 5, 5, 5]]))
    assert batch.reference.tolist() == [[5] * LENGTH, reference[1].tolist()]


def test_committed_positions_are_needed_only_for_whoever_asks():
    tokens = torch.tensor([[1, MASK, MASK, 1]] * 2)
    batch = BlockBatch.start(tokens, [Noting(), Noting("committed")], mask_token_id=MASK)
    assert batch.needed().tolist() == [[False, True, True, False], [True] * LENGTH]
