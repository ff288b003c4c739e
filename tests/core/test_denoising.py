"""The denoising step under any policy: it ends, commits only masked positions, keeps rows apart.

Longer than 400 lines: it is one list of rules of the step, in the order of its stages.
"""

from __future__ import annotations

import logging
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins import create_policy, policy_calls
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import L2PDError, PolicyRuntimeError
from l2pd_plugins.policy import DenoisingStep, RemaskingPolicy, UnmaskPolicy

VOCABULARY, MASK, EOT = 12, 11, 10
OFF = EndOfText("off", ())
BLOCK = EndOfText("block", (EOT,))


class Scripted(RemaskingPolicy):
    """Selects and remasks by a pattern that depends only on the row's own history."""

    requires = frozenset({"confidence", "entropy", "margin", "committed"})

    def __init__(self, kind: str, progress: str) -> None:
        self.kind = kind
        self.progress = progress

    def init_state(self, batch_size, block_length, device):
        return {"calls": torch.zeros(batch_size, dtype=torch.int64)}

    def select(self, step: DenoisingStep, state):
        state["calls"] = state["calls"] + 1
        if self.kind == "nothing":
            return torch.zeros_like(step.masked)
        if self.kind == "everything":
            return torch.ones_like(step.masked)
        places = torch.arange(step.masked.shape[1]) + state["calls"].unsqueeze(-1)
        return (places * 7) % 3 == 0

    def remask(self, step: DenoisingStep, state):
        if self.kind == "nothing":
            return torch.zeros_like(step.masked)
        return torch.ones_like(step.masked)


class Constant(UnmaskPolicy):
    def __init__(self, answer):
        self.answer = answer

    def select(self, step, state):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def blocks(rows: int, length: int, policies, present: int | None = None) -> BlockBatch:
    tokens = torch.full((rows, length), MASK)
    there = None
    if present is not None:
        there = (torch.arange(length) < present).expand(rows, -1).clone()
    return BlockBatch.start(tokens, policies, mask_token_id=MASK, present=there)


def draw_logits(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, length, VOCABULARY, generator=torch.Generator().manual_seed(seed)).mul(
        3
    )


@given(
    kinds=st.lists(st.sampled_from(["nothing", "everything", "nonsense"]), min_size=1, max_size=4),
    progress=st.sampled_from(["argmax_if_empty", "always_top1", "leftmost_if_empty"]),
    length=st.integers(1, 9),
    rule=st.sampled_from([OFF, BLOCK, EndOfText("predicted", (EOT,))]),
    bad=st.sampled_from([None, "nan", "mask"]),
    seed=st.integers(0, 99),
)
def test_every_block_ends_in_as_many_steps_as_it_has_masks(
    kinds, progress, length, rule, bad, seed
):
    batch = blocks(len(kinds), length, [Scripted(kind, progress) for kind in kinds])
    for step in range(length):
        before = batch.masked.sum(-1)
        if not before.any():
            break
        logits = draw_logits(len(kinds), length, seed + step)
        if bad == "nan":
            logits[:, ::2] = torch.nan
        elif bad == "mask":
            logits[..., MASK] = 1e4
        denoising_step(batch, logits, end_of_text=rule)
        after = batch.masked.sum(-1)
        assert ((after < before) | (before == 0)).all()
    assert not batch.masked.any()
    if bad != "nan":
        assert (batch.tokens != MASK).all()


@given(
    kinds=st.lists(st.sampled_from(["nothing", "everything", "nonsense"]), min_size=2, max_size=5),
    length=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_batch_equals_its_rows_alone_to_the_bit(kinds, length, seed):
    policies = {kind: Scripted(kind, "argmax_if_empty") for kind in set(kinds)}
    together = blocks(len(kinds), length, [policies[kind] for kind in kinds])
    alone = [blocks(1, length, [policies[kind]]) for kind in kinds]
    for step in range(3):
        logits = draw_logits(len(kinds), length, seed + step)
        outcome = denoising_step(together, logits, end_of_text=BLOCK)
        for row, single in enumerate(alone):
            one = denoising_step(single, logits[row : row + 1], end_of_text=BLOCK)
            assert torch.equal(together.tokens[row], single.tokens[0])
            assert torch.equal(together.masked[row], single.masked[0])
            assert torch.equal(outcome.step.confidence[row], one.step.confidence[0])
            assert torch.equal(outcome.step.entropy[row], one.step.entropy[0])


@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 8),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["nothing", "nonsense"]),
)
def test_logits_of_only_the_needed_rows_give_the_same_step(rows, length, seed, kind):
    policy = Scripted(kind, "argmax_if_empty")
    full, sparse = blocks(rows, length, [policy] * rows), blocks(rows, length, [policy] * rows)
    for step in range(2):
        logits = draw_logits(rows, length, seed + step)
        needed = sparse.needed().flatten().nonzero().flatten()
        denoising_step(full, logits, end_of_text=BLOCK)
        denoising_step(sparse, logits.flatten(0, 1)[needed], needed, end_of_text=BLOCK)
        assert torch.equal(full.tokens, sparse.tokens)
        assert torch.equal(full.masked, sparse.masked)


def test_rows_can_be_dropped_and_reordered():
    kinds = ["nonsense", "nothing", "nonsense", "everything"]
    policies = {kind: Scripted(kind, "argmax_if_empty") for kind in set(kinds)}
    whole = blocks(4, 6, [policies[kind] for kind in kinds])
    moved = blocks(4, 6, [policies[kind] for kind in kinds])
    first, second = draw_logits(4, 6, 1), draw_logits(4, 6, 2)
    for batch in (whole, moved):
        denoising_step(batch, first, end_of_text=OFF)
    moved.keep([2, 1, 0])
    denoising_step(whole, second, end_of_text=OFF)
    denoising_step(moved, second[[2, 1, 0]], end_of_text=OFF)
    assert torch.equal(moved.tokens, whole.tokens[[2, 1, 0]])
    assert moved.policies == [whole.policies[i] for i in (2, 1, 0)]


@given(data=st.data(), seed=st.integers(0, 99))
def test_gathered_rows_decode_as_they_do_alone(data, seed):
    """Rows are gathered at random before every step, from batches that began at different times."""
    length = 6
    policies = [Scripted(kind, "argmax_if_empty") for kind in ("nonsense", "nothing", "nonsense")]
    together, alone = [], []

    def logits_of(row: int, step: int) -> torch.Tensor:
        return draw_logits(1, length, seed + 1000 * row + step)

    for _ in range(4):
        new = data.draw(st.lists(st.sampled_from(policies), max_size=3), label="new rows")
        if new:
            started = blocks(len(new), length, new)
            together += [(started, row) for row in range(len(new))]
            alone += [blocks(1, length, [policy]) for policy in new]
        if not together:
            continue
        order = data.draw(st.permutations(range(len(together))), label="order")
        chosen = order[: data.draw(st.integers(1, len(order)), label="rows")]
        batch = BlockBatch.gather([together[row] for row in chosen])
        assert batch.policies == [alone[row].policies[0] for row in chosen]
        steps = [int(alone[row].step_index) for row in chosen]
        logits = [logits_of(*each) for each in zip(chosen, steps, strict=True)]
        denoising_step(batch, torch.cat(logits), end_of_text=OFF)
        for at, row in enumerate(chosen):
            together[row] = batch, at
            denoising_step(alone[row], logits[at], end_of_text=OFF)
            assert torch.equal(batch.tokens[at], alone[row].tokens[0])
            assert torch.equal(batch.masked[at], alone[row].masked[0])
            assert batch.step_index[at] == alone[row].step_index[0]


def test_gathering_all_rows_in_order_returns_the_same_batch():
    batch = blocks(3, 4, [Scripted("nothing", "argmax_if_empty")] * 3)
    assert BlockBatch.gather([(batch, row) for row in range(3)]) is batch
    assert BlockBatch.gather([(batch, row) for row in (1, 0, 2)]) is not batch


def test_gathered_rows_keep_their_references_and_generators():
    class Referring(Scripted):
        requires = frozenset({"confidence", "reference"})

    with_reference, without = (
        Referring("nothing", "argmax_if_empty"),
        Scripted("nothing", "always_top1"),
    )
    tokens = torch.full((2, 3), MASK)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    first = BlockBatch.start(
        tokens,
        [with_reference] * 2,
        mask_token_id=MASK,
        reference=torch.arange(6).view(2, 3),
        generators=generators[:2],
    )
    second = BlockBatch.start(tokens, [without] * 2, mask_token_id=MASK, generators=generators[2:])
    batch = BlockBatch.gather([(second, 1), (first, 1), (first, 0)])
    assert batch.reference is not None and batch.reference[1:].tolist() == [[3, 4, 5], [0, 1, 2]]
    assert batch.generators == [generators[3], generators[1], generators[0]]


def test_advancing_resets_the_state_of_the_advanced_rows():
    policy = Scripted("nonsense", "argmax_if_empty")
    batch = blocks(3, 4, [policy] * 3)
    denoising_step(batch, draw_logits(3, 4, 0), end_of_text=OFF)
    batch.advance([1], torch.full((1, 4), MASK))
    assert batch.step_index.tolist() == [1, 0, 1]
    assert batch.block_index.tolist() == [0, 1, 0]
    assert batch.masked[1].all()
    assert batch._groups[0].state["calls"].tolist() == [1, 0, 1]


def test_progress_rules():
    logits = torch.zeros(1, 4, VOCABULARY)
    logits[0, 2, 5] = 9.0
    expected = {"argmax_if_empty": 2, "always_top1": 2, "leftmost_if_empty": 0}
    for rule, place in expected.items():
        batch = blocks(1, 4, [Scripted("nothing", rule)])
        denoising_step(batch, logits, end_of_text=OFF)
        assert (~batch.masked[0]).nonzero().flatten().tolist() == [place], rule


def test_always_top1_adds_to_a_selection():
    logits = torch.zeros(1, 4, VOCABULARY)
    logits[0, 2, 5] = 9.0
    chosen = Constant(torch.tensor([[True, False, False, False]]))
    chosen.progress = "always_top1"
    batch = blocks(1, 4, [chosen])
    denoising_step(batch, logits, end_of_text=OFF)
    assert (~batch.masked[0]).tolist() == [True, False, True, False]


def test_end_of_text_fills_exactly_the_positions_after_it():
    logits = torch.zeros(1, 5, VOCABULARY)
    logits[0, :, 3] = 2.0
    logits[0, 2, EOT] = 9.0
    batch = blocks(1, 5, [Constant(torch.tensor([[False, False, True, False, True]]))])
    outcome = denoising_step(batch, logits, end_of_text=BLOCK)
    assert batch.tokens.tolist() == [[MASK, MASK, EOT, EOT, EOT]]
    assert batch.masked.tolist() == [[True, True, False, False, False]]
    assert outcome.ended.tolist() == [True]
    assert outcome.behind.tolist() == [[False, False, False, True, True]]
    assert outcome.committed.tolist() == [[False, False, True, False, False]]


def test_an_end_of_text_that_has_cut_the_block_is_not_masked_again():
    logits = torch.zeros(1, 5, VOCABULARY)
    logits[0, :, 3] = 2.0
    logits[0, 2, EOT] = 9.0
    batch = blocks(1, 5, [Scripted("everything", "argmax_if_empty")])
    outcome = denoising_step(batch, logits, end_of_text=BLOCK)
    assert batch.tokens[0, 2] == EOT
    assert not outcome.remasked[0, 2]
    assert outcome.remasked.any()


def test_the_predicted_rule_cuts_after_the_most_confident_prediction():
    predicted = EndOfText("predicted", (EOT,))
    logits = torch.zeros(1, 6, VOCABULARY)
    logits[0, :, 3] = 4.0
    logits[0, 2, EOT], logits[0, 4, EOT] = 6.0, 8.0
    batch = blocks(1, 6, [Constant(torch.tensor([[True, *[False] * 5]]))])
    outcome = denoising_step(batch, logits, end_of_text=predicted)
    assert outcome.behind.tolist() == [[False] * 5 + [True]]
    assert outcome.ended.tolist() == [True]
    assert batch.masked.tolist() == [[False, True, True, True, True, False]]
    assert batch.present.tolist() == [[True] * 5 + [False]]
    # The position of the cut may still get another token; the positions after it stay cut.
    logits[0, 4, EOT] = 0.0
    batch.policies[0].answer = torch.ones(1, 6, dtype=torch.bool)
    denoising_step(batch, logits, end_of_text=predicted)
    assert batch.tokens[0, :3].tolist() == [3, 3, EOT]
    assert not batch.masked.any()


def test_with_off_an_end_of_text_ends_nothing():
    logits = torch.zeros(1, 3, VOCABULARY)
    logits[0, :, EOT] = 9.0
    batch = blocks(1, 3, [Scripted("nothing", "leftmost_if_empty")])
    outcome = denoising_step(batch, logits, end_of_text=OFF)
    assert batch.masked.sum() == 2
    assert not outcome.ended.any()


def test_rows_that_ignore_the_end_of_text_continue_after_it():
    policy = Scripted("nothing", "argmax_if_empty")
    batch = BlockBatch.start(
        torch.full((2, 4), MASK),
        [policy] * 2,
        mask_token_id=MASK,
        ignores_end=torch.tensor([False, True]),
    )
    logits = torch.zeros(2, 4, VOCABULARY)
    logits[:, 1, EOT] = 9.0
    outcome = denoising_step(batch, logits, end_of_text=BLOCK)
    assert outcome.ended.tolist() == [True, False]
    assert batch.tokens.tolist() == [[MASK, EOT, EOT, EOT], [MASK, EOT, MASK, MASK]]
    assert batch.masked.tolist() == [[True, False, False, False], [True, False, True, True]]


def test_the_mask_token_is_predicted_only_without_suppress_mask():
    logits = torch.zeros(1, 2, VOCABULARY)
    logits[..., MASK] = 5.0
    everything = Constant(torch.ones(1, 2, dtype=torch.bool))
    batch = blocks(1, 2, [everything])
    assert (denoising_step(batch, logits, end_of_text=OFF).step.x0 != MASK).all()
    batch = blocks(1, 2, [everything])
    step = denoising_step(batch, logits, end_of_text=OFF, suppress_mask=False).step
    assert (step.x0 == MASK).all()


def test_positions_after_the_canvas_are_left_unchanged():
    batch = blocks(1, 6, [Scripted("everything", "argmax_if_empty")], present=4)
    outcome = denoising_step(batch, draw_logits(1, 6, 0), end_of_text=OFF)
    assert outcome.step.confidence[0, 4:].tolist() == [0.0, 0.0]
    assert batch.tokens[0, 4:].tolist() == [MASK, MASK]


def test_a_policy_sees_only_what_it_requires():
    seen = []

    class Curious(UnmaskPolicy):
        def __init__(self, *requires):
            self.requires = frozenset(requires)

        def select(self, step, state):
            seen.append({n for n in ("entropy", "margin", "logits") if step.has(n)})
            return step.masked

    policies = [Curious("confidence"), Curious("entropy"), Curious("logits", "margin")]
    denoising_step(blocks(3, 2, policies), draw_logits(3, 2, 0), end_of_text=OFF)
    assert seen == [set(), {"entropy"}, {"logits", "margin"}]


@pytest.mark.parametrize("statistic", ["entropy", "margin", "logits", "reference"])
def test_reading_what_is_not_required_names_the_policy_and_the_line_to_add(statistic):
    class Sly(UnmaskPolicy):
        requires = frozenset({"entropy", "margin", "logits", "reference"} - {statistic})

        def select(self, step, state):
            return getattr(step, statistic) > 0

    batch = BlockBatch.start(
        torch.full((1, 2), MASK), [Sly()], mask_token_id=MASK, reference=torch.zeros(1, 2).long()
    )
    wanted = f"policy 'sly' reads {statistic}; add \"{statistic}\" to its requires"
    with pytest.raises(PolicyRuntimeError, match=re.escape(wanted)):
        denoising_step(batch, draw_logits(1, 2, 0), end_of_text=OFF)


def test_a_policy_knows_the_mask_token_and_the_name_it_was_requested_by():
    class Noting(UnmaskPolicy):
        def select(self, step, state):
            self.seen = step.mask_token_id, step.policy
            return step.masked

    policy = Noting()
    denoising_step(blocks(1, 2, [policy]), draw_logits(1, 2, 0), end_of_text=OFF)
    assert policy.seen == (MASK, "noting")


def test_a_copy_has_its_own_name_or_reference():
    policy = create_policy("oracle")
    named, shown = policy.named("mine"), policy.with_reference([1, 2])
    assert (policy.name, named.name, shown.name) == ("oracle", "mine", "oracle")
    assert (policy.reference, named.reference, shown.reference) == (None, None, [1, 2])


def test_committed_positions_are_certain_unless_required():
    class Recorder(UnmaskPolicy):
        def __init__(self, *requires):
            self.requires = frozenset(requires)
            self.seen = []

        def select(self, step, state):
            self.seen.append(step.confidence.clone())
            return torch.zeros_like(step.masked)

    plain, asking = Recorder("confidence"), Recorder("confidence", "committed")
    batch = blocks(2, 3, [plain, asking])
    for seed in (0, 1):
        denoising_step(batch, draw_logits(2, 3, seed), end_of_text=OFF)
    assert plain.seen[1].eq(1).sum() == 1
    assert asking.seen[1].lt(1).all()


def test_observing_changes_nothing_for_the_policies():
    class Greedy(UnmaskPolicy):
        requires = frozenset({"confidence", "entropy", "margin"})

        def __init__(self):
            self.seen = []

        def select(self, step, state):
            self.seen.append((step.x0, step.confidence, step.entropy, step.margin))
            return step.confidence > 0.97

    plain, watched = Greedy(), Greedy()
    one = blocks(2, 5, [plain] * 2)
    tokens = torch.full((2, 5), MASK)
    everything = frozenset({"committed", "logits"})
    two = BlockBatch.start(tokens, [watched] * 2, mask_token_id=MASK, observe=everything)
    for seed in range(3):
        denoising_step(one, draw_logits(2, 5, seed), end_of_text=OFF)
        outcome = denoising_step(two, draw_logits(2, 5, seed), end_of_text=OFF)
        assert torch.equal(one.tokens, two.tokens)
    for first, second in zip(plain.seen, watched.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert outcome.step.has("logits")
    assert outcome.step.confidence[~outcome.step.masked].lt(1).any()


@pytest.mark.parametrize(
    "answer",
    [
        torch.ones(1, 3),
        torch.ones(1, 2, dtype=torch.bool),
        None,
        RuntimeError("the policy's own trouble"),
    ],
)
def test_a_failing_policy_is_named_or_falls_back_to_progress(answer, caplog):
    logits = draw_logits(1, 3, 0)
    with pytest.raises(PolicyRuntimeError, match="constant"):
        denoising_step(blocks(1, 3, [Constant(answer)]), logits, end_of_text=OFF)
    failing = Constant(answer)
    failing._name = f"constant-{id(answer)}"
    batch = blocks(1, 3, [failing])
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            denoising_step(batch, logits, end_of_text=OFF, on_error="progress")
    assert not batch.masked.any()
    assert sum(failing.name in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    "state", [ValueError("no room"), {"calls": torch.zeros(3)}, {"calls": 4}, None]
)
def test_a_policy_that_cannot_begin_is_named_or_falls_back_to_progress(state, caplog):
    class Unready(Scripted):
        def init_state(self, batch_size, block_length, device):
            if isinstance(state, Exception):
                raise state
            return state

    unready, other = (
        Unready("everything", "leftmost_if_empty"),
        Scripted("everything", "argmax_if_empty"),
    )
    with pytest.raises(PolicyRuntimeError, match="'unready': init_state failed"):
        blocks(2, 4, [unready, other])
    policy_calls._first_failure.seen.clear()
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            batch = BlockBatch.start(
                torch.full((2, 4), MASK), [unready, other], mask_token_id=MASK, on_error="progress"
            )
            denoising_step(batch, draw_logits(2, 4, 0), end_of_text=OFF, on_error="progress")
            assert batch.masked[0].tolist() == [False, True, True, True]
            assert batch.masked[1].sum() == 3  # all but one are masked again
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "policy 'unready': init_state failed"
    ]


@pytest.mark.parametrize(
    "left", [{}, {"calls": torch.zeros(5)}, {"calls": torch.zeros(2, 1)}, {"calls": 0}]
)
def test_a_policy_that_breaks_its_state_gets_the_previous_state_back(left):
    class Spoiling(Scripted):
        spoils = True

        def select(self, step, state):
            if self.spoils:
                state.clear()
                state.update(left)
            return super().select(step, state) if not self.spoils else step.masked

    policy = Spoiling("nothing", "argmax_if_empty")
    batch = blocks(2, 4, [policy] * 2)
    with pytest.raises(PolicyRuntimeError, match="state"):
        denoising_step(batch, draw_logits(2, 4, 0), end_of_text=OFF)
    denoising_step(batch, draw_logits(2, 4, 0), end_of_text=OFF, on_error="progress")
    assert batch.masked.sum(-1).tolist() == [3, 3]
    policy.spoils = False
    denoising_step(batch, draw_logits(2, 4, 0), end_of_text=OFF)


def test_unknown_end_of_text_rules_are_refused():
    with pytest.raises(L2PDError, match=r"sometimes.*block, predicted, off"):
        EndOfText("sometimes", (1,))
    with pytest.raises(L2PDError, match="eos_token_id"):
        EndOfText("block", ())


def test_logits_for_the_wrong_number_of_positions_are_refused():
    with pytest.raises(ValueError, match="logits of 3 rows"):
        denoising_step(
            blocks(1, 2, [Scripted("nothing", "always_top1")]),
            torch.zeros(3, VOCABULARY),
            end_of_text=OFF,
        )


@pytest.mark.parametrize("progress", ["argmax_if_empty", "always_top1", "leftmost_if_empty"])
@pytest.mark.parametrize("kind", ["everything", "nothing"])
def test_a_position_with_nan_is_committed_only_if_no_other_is_left(progress, kind):
    batch = blocks(2, 4, [Scripted(kind, progress)] * 2)
    logits = draw_logits(2, 4, 3)
    logits[0, 0, 5] = torch.nan
    logits[1] = torch.nan
    outcome = denoising_step(batch, logits, end_of_text=OFF)
    assert not outcome.committed[0, 0]
    assert outcome.committed[0].any()
    assert outcome.committed[1].sum() == 1
    for _ in range(3):
        denoising_step(batch, logits, end_of_text=OFF)
    assert not batch.masked.any()
