"""Random batches of blocks through the denoising step.

Longer than 400 lines: it is one machine of random moves and the checks after each.

Rows are added and dropped, begin new blocks, and change places. Some of them are also decoded
alone, in a batch of one. The results must be equal to the bit, whatever runs beside them; and a row
alone must change as plain Python computes from the policy's answers (`reference.py`).
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins import UnmaskPolicy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import StepOutcome, denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.policy import RemaskingPolicy
from l2pd_plugins.slots import BlockSlots
from tests.fuzz import reference
from tests.fuzz.making import Failing, Wild, random_logits, random_policy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = frozenset({"committed", "entropy", "margin", "logits"})


@dataclass
class Case:
    """The parameters that all blocks of one case share."""

    rng: random.Random
    length: int
    vocabulary: int
    mask: int
    end_of_text: EndOfText
    suppress: bool
    dtype: Any
    observe: frozenset[str]
    sampled: bool
    """Whether the predictions are sampled; otherwise they are the argmax."""
    policies: list[UnmaskPolicy] = field(default_factory=list)
    steps: int = 0
    """Steps taken, including those of the rows alone."""


@dataclass
class Line:
    """A row of the batch, and the same row alone."""

    policy: UnmaskPolicy
    seed: int
    tokens: list[int]
    present: list[bool]
    ignores_end: bool
    reference: list[int]
    draws: bool
    time: int = 0
    alone: BlockBatch | None = None
    answers: dict[str, Tensor] = field(default_factory=dict)
    rules: reference.Rules | None = None
    later: list[Line] = field(default_factory=list)
    """The row's next blocks, for which its policy already has a state. Of these lines only the
    content, `time` and `calls` are used."""
    calls: int = 0
    """How often `Wild` has been called, as its state must record."""

    def generator(self) -> torch.Generator | None:
        """The row's random generator in its initial state."""
        return torch.Generator().manual_seed(self.seed) if self.draws else None


def try_one(rng: random.Random) -> int:
    """Run one case; returns the number of its steps."""
    case = _new_case(rng)
    (_in_slots if rng.random() < 0.3 else _in_batches)(case)
    return case.steps


def _new_case(rng: random.Random) -> Case:
    length = rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
    vocabulary = rng.choice([3, 5, 12, 40, 513])
    mask = rng.choice([0, vocabulary - 1, rng.randrange(vocabulary)])
    others = [token for token in range(vocabulary) if token != mask]
    ends = tuple(rng.sample(others, rng.choice([1, 1, 2])))
    rule = rng.choice(["block", "block", "predicted", "off"])
    end_of_text = EndOfText(rule, ends if rule != "off" or rng.random() < 0.5 else ())
    case = Case(
        rng,
        length,
        vocabulary,
        mask,
        end_of_text,
        suppress=rng.random() < 0.75,
        dtype=rng.choice(DTYPES),
        observe=EVERYTHING if rng.random() < 0.15 else frozenset(),
        sampled=rng.random() < 0.15,
    )
    for _ in range(rng.randint(1, 3)):
        case.policies.append(random_policy(rng, length, mask, vocabulary))
    return case


def _new_line(case: Case, followed: bool) -> Line:
    rng, length = case.rng, case.length
    others = [token for token in range(case.vocabulary) if token != case.mask]
    policy = rng.choice(case.policies)
    if not followed and rng.random() < 0.3:
        policy = Failing(rng)
    known = rng.choice([0, 0, rng.randint(0, length)])
    tokens = [rng.choice(others) for _ in range(known)] + [case.mask] * (length - known)
    present = [rng.random() < 0.8 or kept for kept in [rng.random() < 0.7] * length]
    line = Line(
        policy,
        seed=rng.randrange(1 << 30),
        tokens=tokens,
        present=present,
        ignores_end=rng.random() < 0.25,
        reference=[rng.choice(others) for _ in range(length)],
        draws=True,
    )
    if followed:
        _follow(case, line)
    return line


def _follow(case: Case, line: Line) -> None:
    """Begin the same row alone, and record the answers of its policy."""
    policy = copy.deepcopy(line.policy)
    line.alone = BlockBatch.start(
        torch.tensor([line.tokens]),
        [policy],
        **_start_of(case, [line]),
        observe=case.observe if case.rng.random() < 0.5 else frozenset(),
    )
    line.rules = reference.Rules(
        case.mask, case.end_of_text, line.ignores_end, policy.progress, policy.edits
    )
    for method in ("select", "remask"):
        ask = getattr(policy, method, None)
        if ask is not None:

            def heard(step: Any, state: Any, ask: Any = ask, method: str = method) -> Tensor:
                line.answers[method] = answer = ask(step, state)
                return answer

            policy.__dict__[method] = heard


def _start_of(case: Case, lines: list[Line]) -> dict[str, Any]:
    return {
        "mask_token_id": case.mask,
        "present": torch.tensor([line.present for line in lines]),
        "ignores_end": torch.tensor([line.ignores_end for line in lines]),
        "reference": torch.tensor([line.reference for line in lines]),
        "generators": [line.generator() for line in lines],
        "on_error": "progress",
    }


def _start(case: Case, lines: list[Line]) -> BlockBatch:
    batch = BlockBatch.start(
        torch.tensor([line.tokens for line in lines]),
        [line.policy for line in lines],
        **_start_of(case, lines),
        observe=case.observe,
    )
    _look_ahead(case, batch, lines)
    return batch


def _look_ahead(case: Case, batch: BlockBatch, lines: list[Line]) -> None:
    """Let the policies that look ahead see some of the next blocks, in the batch and alone."""
    if case.rng.random() < 0.2:
        return
    owners = []
    for row in batch.looking_ahead:
        line, count = lines[row], case.rng.randint(0, 2)
        line.later = [_new_line(case, followed=False) for _ in range(count)]
        owners += [row] * count
        if line.alone is not None:
            line.alone.look_ahead([0] * count, **_content_of(line.later))
    if owners:
        content = _content_of([each for row in batch.looking_ahead for each in lines[row].later])
        batch.look_ahead(owners, **content)


def _content_of(blocks: list[Line]) -> dict[str, Tensor]:
    """The content of blocks, in the form of the arguments of `advance` and `look_ahead`."""
    names = ("tokens", "present", "reference")
    return {name: torch.tensor([getattr(each, name) for each in blocks]) for name in names}


def _in_batches(case: Case) -> None:
    """Decode rows of several batches, which are gathered anew at random."""
    rng = case.rng
    lines = [_new_line(case, followed=i < 2) for i in range(rng.randint(1, 5))]
    rng.shuffle(lines)
    batch = _start(case, lines)
    for _ in range(rng.randint(2, 2 * case.length + 3)):
        _step(case, batch, lines)
        full = [row for row in range(len(lines)) if not batch.masked[row].any()]
        if full and rng.random() < 0.5:
            batch = _advance(case, batch, lines, full)
        elif lines and rng.random() < 0.05:
            _forget_later(batch, lines, rng.randrange(len(lines)))
        what = rng.random()
        if what < 0.1:
            more = [_new_line(case, followed=False) for _ in range(rng.randint(1, 2))]
            new = _start(case, more)
            rows = [(batch, at, line) for at, line in enumerate(lines) if rng.random() < 0.8]
            rows += [(new, at, line) for at, line in enumerate(more)]
            rng.shuffle(rows)
            batch = BlockBatch.gather([(each, at) for each, at, _ in rows])
            lines = [line for _, _, line in rows]
        elif what < 0.2:
            order = rng.sample(range(len(lines)), rng.randint(1, len(lines)))
            batch.keep(order)
            lines = [lines[row] for row in order]


def _advance(case: Case, batch: BlockBatch, lines: list[Line], rows: list[int]) -> BlockBatch:
    """Begin the next block in these rows, and in the same rows alone; returns the next batch.

    Some engines begin every block with `start`, and pass on the carried state of its policy.
    """
    anew = case.rng.random() < 0.2
    carried = [batch.carried(row) for row in rows]
    blocks = []
    for line in (lines[row] for row in rows):
        if anew:
            line.later = []
            if line.alone is not None:
                line.alone.forget_later([0])
        blocks.append(line.later.pop(0) if line.later else _new_line(case, followed=False))
        if line.alone is not None:
            line.alone.advance([0], **_content_of(blocks[-1:]))
        _begin(line, blocks[-1])
    if not anew:
        batch.advance(rows, **_content_of(blocks))
        return batch
    moved, content = [lines[row] for row in rows], _content_of(blocks)
    drawing = batch.generators or [None] * len(lines)
    began = BlockBatch.start(
        content.pop("tokens"),
        [line.policy for line in moved],
        **_start_of(case, moved) | content | {"generators": [drawing[row] for row in rows]},
        block_index=batch.block_index[rows] + 1,
        observe=case.observe,
    )
    began.carry(carried)
    _look_ahead(case, began, moved)
    at = {row: (began, place) for place, row in enumerate(rows)}
    return BlockBatch.gather([at.get(row, (batch, row)) for row in range(len(lines))])


def _forget_later(batch: BlockBatch, lines: list[Line], row: int) -> None:
    batch.forget_later([row])
    lines[row].later = []
    alone = lines[row].alone
    if alone is not None:
        alone.forget_later([0])


def _begin(line: Line, block: Line) -> None:
    """Record that the row is in this block now."""
    if "calls" not in getattr(line.policy, "carries", ()):
        line.calls = block.calls


def _in_slots(case: Case) -> None:
    """Decode rows in slots that are taken in any order, advanced when full, and assigned again."""
    rng, count = case.rng, case.rng.randint(1, 5)
    slots = BlockSlots(count, case.length, mask_token_id=case.mask, device=torch.device("cpu"))
    lines: dict[int, Line] = {}
    for _ in range(rng.randint(2, 2 * case.length + 3)):
        for slot in range(count):
            if slot not in lines or rng.random() < 0.05:
                lines[slot] = line = _new_line(case, followed=rng.random() < 0.5)
                slots.assign(
                    slot,
                    line.policy,
                    line.tokens,
                    line.present,
                    ignores_end=line.ignores_end,
                    generator=line.generator(),
                )
        chosen = rng.sample(range(count), rng.randint(1, count))
        taken = [lines[slot] for slot in chosen]
        references = torch.tensor([line.reference for line in taken])
        batch = slots.take(np.array(chosen), reference=references)
        _step(case, batch.block, taken)
        next_one = _new_line(case, followed=False)
        full = ~batch.block.masked.any(-1)
        tokens = torch.tensor([next_one.tokens]).expand(len(chosen), -1)
        present = torch.tensor([next_one.present]).expand(len(chosen), -1)
        batch.advance(full, tokens, present)
        for row, line in enumerate(taken):
            if not full[row]:
                continue
            _begin(line, next_one)
            if line.alone is not None:
                line.alone.advance(
                    [0], tokens[:1], present=present[:1], reference=references[row : row + 1]
                )
        slots.put(batch)
        for slot in [*lines]:
            if rng.random() < 0.05:
                slots.release(slot)
                del lines[slot]


def _step(case: Case, batch: BlockBatch, lines: list[Line]) -> None:
    """One step of the batch, and of those of its rows that are also decoded alone."""
    logits = torch.stack([_logits_of(case, line) for line in lines])
    given = [_given_of(case, line) for line in lines]
    x0 = None if all(each is None for each in given) else given
    before, asked = batch.masked.sum(-1), batch.needed()
    outcome = _denoise(case, batch, logits, x0, lines)
    assert bool((batch.masked & ~batch.present).any()) is False, "an absent position is masked"
    wrong = (batch.tokens == case.mask) & ~batch.masked & batch.present
    assert not wrong.any(), f"the mask token came out: {batch.tokens.tolist()}"
    after = batch.masked.sum(-1)
    must = before > 0 if case.suppress else (before > 0) & (batch.step_index > case.length)
    assert bool((after < before)[must].all()), f"no progress: {before.tolist()} {after.tolist()}"
    for row, line in enumerate(lines):
        line.calls += 1
        if line.alone is not None:
            one = [given[row]] if x0 is not None else None
            _compare(case, batch, outcome, asked[row], row, line, logits[row], one)
        line.time += 1
        for block in line.later:
            block.time, block.calls = block.time + 1, block.calls + 1


def _logits_of(case: Case, line: Line) -> Tensor:
    return random_logits(line.seed + line.time, case.length, case.vocabulary, case.mask, case.dtype)


def _given_of(case: Case, line: Line) -> list[int] | None:
    """Sampled tokens for the row's positions, -1 for the argmax; None without sampling."""
    if not case.sampled:
        return None
    rng = random.Random(line.seed + line.time)
    others = [token for token in range(case.vocabulary) if token != case.mask]
    return [rng.choice([-1, rng.choice(others)]) for _ in range(case.length)]


def _denoise(
    case: Case,
    batch: BlockBatch,
    logits: Tensor,
    given: list[list[int] | None] | None,
    lines: list[Line],
) -> StepOutcome:
    """Call the step, with the logits of all positions or of some, in any order."""
    case.steps += 1
    x0 = None if given is None else torch.tensor(given).flatten()
    positions = None
    if case.rng.random() < 0.5:
        positions = _some_positions(case, batch)
        logits = logits.flatten(0, 1)[positions]
        x0 = None if x0 is None else x0[positions]
    return denoising_step(
        batch,
        logits,
        positions,
        end_of_text=case.end_of_text,
        x0=x0,
        suppress_mask=case.suppress,
        later=_later_logits(case, batch, lines),
    )


def _later_logits(case: Case, batch: BlockBatch, lines: list[Line]) -> tuple[Tensor, Tensor] | None:
    """Logits of the later blocks that the policies see, and their positions."""
    found: Counter[int] = Counter()
    logits = []
    for row in batch.later_rows:
        logits.append(_logits_of(case, lines[row].later[found[row]]))
        found[row] += 1
    wanted = {row: len(line.later) for row, line in enumerate(lines) if line.later}
    assert found == wanted, f"later blocks {dict(found)}, should be {wanted}"
    if batch._later is None:
        return None
    positions = _some_positions(case, batch._later.blocks)
    return torch.cat(logits)[positions], positions


def _some_positions(case: Case, batch: BlockBatch) -> Tensor:
    """The positions whose logits are read, and some others, in any order."""
    asked = batch.needed().flatten()
    asked = asked | (torch.rand(len(asked), generator=_shuffler(case)) < 0.2)
    positions = asked.nonzero().flatten()
    return positions[torch.randperm(len(positions), generator=_shuffler(case))]


def _shuffler(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(case.rng.randrange(1 << 30))


def _compare(
    case: Case,
    batch: BlockBatch,
    outcome: StepOutcome,
    asked: Tensor,
    row: int,
    line: Line,
    logits: Tensor,
    given: list[list[int] | None] | None,
) -> None:
    """Compare the row in its batch with the row alone, and the row alone with plain Python.
    asked (L,): the positions whose logits were read for the batch."""
    alone, rules = line.alone, line.rules
    assert alone is not None and rules is not None
    began = reference.row_of(alone.tokens[0], alone.masked[0], alone.present[0])
    needed = (alone.needed()[0] & asked).tolist()
    suppressing = case.suppress or int(alone.step_index[0]) >= case.length
    line.answers.clear()
    single = _denoise(case, alone, logits[None], given, [line])
    about = f"{alone.policies[0].describe()} at step {line.time + 1}"
    if isinstance(line.policy, Wild):
        (group, place), states = batch._groups.places()[row], alone.states[0]
        asked_of = int(group.state["calls"][place]), int(states["calls"][0])
        assert asked_of == (line.calls, line.calls), f"{about}: {asked_of}, not {line.calls} calls"
        assert int(group.state["seen"][place]) == int(states["seen"][0]), f"{about}: other states"
        moved = group.state["moved"][place] | states["moved"][0]
        assert not moved, f"{about}: the state of another block"
    for name in ("tokens", "masked", "present", "step_index", "block_index"):
        left, right = getattr(batch, name)[row], getattr(alone, name)[0]
        assert torch.equal(left, right), (
            f"{about}: {name} is {left.tolist()}, alone {right.tolist()}"
        )
    for name in ("committed", "remasked", "behind", "ended"):
        left, right = getattr(outcome, name)[row], getattr(single, name)[0]
        assert torch.equal(left, right), (
            f"{about}: {name} is {left.tolist()}, alone {right.tolist()}"
        )
    x0, confidence = single.step.x0[0].tolist(), single.step.confidence[0].tolist()
    predictions = reference.statistics(
        logits, case.mask if suppressing else None, None if given is None else given[0]
    )
    for i, needs in enumerate(needed):
        if not needs:
            continue
        in_batch = float(outcome.step.confidence[row, i]), int(outcome.step.x0[row, i])
        same = in_batch == (confidence[i], x0[i]) or (
            math.isnan(in_batch[0]) and math.isnan(confidence[i]) and in_batch[1] == x0[i]
        )
        assert same, f"{about}: {in_batch} in the batch, alone {(confidence[i], x0[i])}"
        token, probability = predictions[i]
        assert token is None or token == x0[i], f"{about}: x0 is {x0[i]} at {i}, should be {token}"
        assert not suppressing or x0[i] != case.mask, f"{about}: the mask is predicted at {i}"
        assert math.isnan(probability) == math.isnan(confidence[i]), f"{about}: {confidence[i]}"
        if not math.isnan(probability):
            assert abs(probability - confidence[i]) < 2e-5, f"{about}: {confidence[i]} at {i}"
    if (
        "committed" not in alone.policies[0].requires
    ):  # observed statistics are not shown to the policy
        for i in range(case.length):
            if not began.masked[i]:
                x0[i], confidence[i] = began.tokens[i], float(began.present[i])
    nothing = torch.zeros(1, case.length, dtype=torch.bool)
    takes_back = isinstance(alone.policies[0], RemaskingPolicy)
    wanted = reference.take_step(
        began,
        rules,
        x0,
        confidence,
        line.answers.get("select", nothing)[0].tolist(),
        line.answers.get("remask", nothing)[0].tolist() if takes_back else None,
        may_stay_masked=not suppressing,
    )
    found = reference.row_of(alone.tokens[0], alone.masked[0], alone.present[0])
    assert found == wanted, f"{about}: {found}, should be {wanted}, from {began}"
