"""One denoising step of a batch of blocks: statistics -> select -> progress -> commit -> end.

Every engine calls `denoising_step` after its forward pass. Nothing here knows an engine or a
policy, and nothing reads a value back to the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins.end_of_text import EndOfText, behind_end, is_end_of_text
from l2pd_plugins.errors import ANY_FAILURE
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_plugins.policy_calls import (
    ContractError,
    InputChanged,
    OnError,
    Runner,
    State,
    prepare,
    report_failure,
    stand_in,
)
from l2pd_plugins.selection import leftmost, ranks, top_1
from l2pd_plugins.statistics import RowStatistics, row_statistics
from l2pd_plugins.uploading import upload

_COMPUTED = frozenset({"confidence", "entropy", "margin"})


@dataclass(eq=False)
class _Group:
    """The rows of a batch that one policy decides for. Rows with a generator and rows without are
    two groups."""

    runner: Runner
    members: list[int]
    state: State
    index: Tensor | None = None
    """`members` on the device; None when they are all rows."""


@dataclass
class _LaterBlocks:
    """The blocks behind those of a batch, whose policies look ahead."""

    blocks: BlockBatch
    """N blocks at their first step, which take none: they only fill the policies' states."""
    rows: list[int]
    """The row of the batch that each belongs to; of one row, the nearest comes first."""


@dataclass
class BlockBatch:
    """B blocks that are being decoded, one per sequence, and the policy of each.

    Rows may stand in different blocks of their canvases and run different policies. Which row runs
    which policy is known on the host, so grouping costs no synchronisation.
    """

    tokens: Tensor
    """(B, L) int64; mask_token_id where masked."""
    masked: Tensor
    """(B, L) bool."""
    present: Tensor
    """(B, L) bool; False behind the end of the text, or of a canvas that is no multiple of the
    block length, and where the first block holds the end of the prompt."""
    step_index: Tensor
    """(B,) int64, denoising steps taken in the block."""
    block_index: Tensor
    """(B,) int64."""
    canvas_length: Tensor
    """(B,) int64, positions of the canvas that the block is part of."""
    mask_token_id: int
    policies: list[UnmaskPolicy]
    """One per row; rows with the same object form a group."""
    ignores_end: Tensor
    """(B,) bool, rows for which an end-of-text token is a token like any other."""
    reference: Tensor | None = None
    """(B, L) int64, for policies that require it."""
    generators: list[torch.Generator | None] | None = None
    """One per row, None for a row that has none; None if no row has one."""
    on_error: OnError = "raise"
    """What happens to a policy that fails, at this block and at all that follow: "raise" raises
    PolicyRuntimeError; "progress" (servers) lets its rows go on by its progress rule alone and logs
    the failure once per policy."""
    observe: frozenset[str] = frozenset()
    """What the outcome's step shows beyond what the policies require."""
    _later: _LaterBlocks | None = field(default=None, repr=False)
    _groups: list[_Group] = field(default_factory=list, repr=False)
    _requires: frozenset[str] = field(default=frozenset(), repr=False)
    _whole_rows: Tensor | None = field(default=None, repr=False)
    """(B, 1) bool, rows of which committed positions are needed too; None if there are none."""

    @classmethod
    def start(
        cls,
        tokens: Tensor,
        policies: Sequence[UnmaskPolicy],
        *,
        mask_token_id: int,
        block_index: Tensor | None = None,
        canvas_length: Tensor | None = None,
        present: Tensor | None = None,
        ignores_end: Tensor | None = None,
        reference: Tensor | None = None,
        generators: Sequence[torch.Generator | None] | None = None,
        observe: frozenset[str] = frozenset(),
        on_error: OnError = "raise",
    ) -> BlockBatch:
        """A batch at its first step: tokens (B, L), positions that hold mask_token_id are masked.

        Absent positions (`present` False) are not masked, whatever they hold. A policy that fails,
        here or later, raises PolicyRuntimeError, or with on_error="progress" leaves its rows to its
        progress rule.
        """
        rows = len(tokens)
        if len(policies) != rows:
            raise ValueError(f"{len(policies)} policies for {rows} rows")
        present = torch.ones_like(tokens, dtype=torch.bool) if present is None else present
        zeros = torch.zeros(rows, dtype=torch.int64, device=tokens.device)
        batch = cls(
            tokens=tokens,
            masked=(tokens == mask_token_id) & present,
            present=present,
            step_index=zeros,
            block_index=zeros.clone() if block_index is None else block_index,
            canvas_length=zeros + tokens.shape[1] if canvas_length is None else canvas_length,
            mask_token_id=mask_token_id,
            policies=list(policies),
            ignores_end=zeros.to(torch.bool) if ignores_end is None else ignores_end,
            reference=reference,
            generators=_generators(generators or ()),
            on_error=on_error,
            observe=observe,
        )
        for policy, members in batch._by_policy():
            batch._add_group(members, *prepare(policy, len(members), tokens, on_error))
        batch._index_groups()
        return batch

    def look_ahead(
        self,
        rows: Sequence[int],
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        reference: Tensor | None = None,
        on_error: OnError | None = None,
    ) -> None:
        """Keep a state for blocks behind the present ones too, for policies that look ahead.

        rows: of each of the N blocks the row it belongs to, out of `looking_ahead`; the blocks of
        one row follow each other, and begin with the one behind its present block. tokens, present,
        reference: (N, L), as in `start`. From then on each `denoising_step` takes their logits, and
        `advance` begins a block with the state that was kept for it. It can be called once.

        Raises PolicyRuntimeError as `start` does.
        """
        if not rows:
            return
        distance: list[int] = []
        so_far: Counter[int] = Counter()
        for row in rows:
            so_far[row] += 1
            distance.append(so_far[row])
        index = upload(rows, self.tokens.device)
        blocks = BlockBatch.start(
            tokens,
            [self.policies[row] for row in rows],
            mask_token_id=self.mask_token_id,
            block_index=self.block_index[index] + upload(distance, self.tokens.device),
            canvas_length=self.canvas_length[index],
            present=present,
            reference=reference,
            generators=None if self.generators is None else [self.generators[r] for r in rows],
            on_error=self.on_error if on_error is None else on_error,
        )
        self._later = _LaterBlocks(blocks, list(rows))

    @property
    def looking_ahead(self) -> list[int]:
        """The rows whose policies look ahead."""
        groups = [group for group in self._groups if "ahead" in group.runner.traits.requires]
        return sorted(row for group in groups for row in group.members)

    @property
    def later_rows(self) -> list[int]:
        """The row of each later block that a state is kept for, in the order of their logits."""
        return [] if self._later is None else list(self._later.rows)

    def forget_later(self, rows: Sequence[int]) -> None:
        """These rows have ended: no block follows the one that they stand in."""
        gone = set(rows)
        self._keep_later([at for at, row in enumerate(self.later_rows) if row not in gone])

    @classmethod
    def gather(cls, rows: Sequence[tuple[BlockBatch, int]]) -> BlockBatch:
        """A batch of these rows, each given as (batch, index), in this order.

        The batches are of one decode: block length, mask token, device, `observe` and `on_error`
        are the same. All rows of one batch, in its own order, give that batch itself; otherwise the
        new batch shares nothing with those it comes from. At least one row is given, for the batch
        is like those that its rows come from.
        """
        batches = list({id(batch): batch for batch, _ in rows}.values())
        if not batches:
            raise ValueError("no rows to gather; an empty batch is made by keep([])")
        return cls._gathered(batches, rows)

    @classmethod
    def _gathered(
        cls, batches: Sequence[BlockBatch], rows: Sequence[tuple[BlockBatch, int]]
    ) -> BlockBatch:
        counts = [len(batch.policies) for batch in batches]
        starts = dict(zip(map(id, batches), accumulate(counts, initial=0), strict=False))
        wanted = [starts[id(batch)] + row for batch, row in rows]
        if len(batches) == 1 and wanted == list(range(counts[0])):
            return batches[0]
        some = batches[0]
        index = upload(wanted, some.tokens.device)

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).index_select(0, index)

        per_row: dict[str, Any] = {
            name: joined([getattr(batch, name) for batch in batches]) for name in PER_ROW
        }
        gathered = cls(
            **per_row,
            mask_token_id=some.mask_token_id,
            policies=[batch.policies[row] for batch, row in rows],
            generators=_generators(
                [None if batch.generators is None else batch.generators[row] for batch, row in rows]
            ),
            on_error=some.on_error,
            observe=some.observe,
        )
        if any(batch.reference is not None for batch in batches):
            # Rows without a reference never read theirs.
            gathered.reference = joined(
                [b.tokens if b.reference is None else b.reference for b in batches]
            )
        places = {id(batch): batch._places() for batch in batches}
        for _, members in gathered._by_policy():
            origins = [places[id(batch)][row] for batch, row in (rows[at] for at in members)]
            gathered._add_group(members, *_joined_state(origins, index, some.on_error))
        gathered._index_groups()
        later = [
            (row, (batch._later.blocks, at))
            for row, (batch, origin) in enumerate(rows)
            if batch._later is not None
            for at, owner in enumerate(batch._later.rows)
            if owner == origin
        ]
        if later:
            owners, blocks = zip(*later, strict=True)
            gathered._later = _LaterBlocks(cls.gather(blocks), list(owners))
        return gathered

    @classmethod
    def resume(
        cls, groups: Sequence[tuple[list[int], Runner, State]], **per_row: Any
    ) -> BlockBatch:
        """A batch in the midst of its decode, out of its fields by name. groups: the rows that run
        one policy, how it is run, and its state of them."""
        rows = sum(len(members) for members, _, _ in groups)
        batch = cls(**per_row, policies=[groups[0][1].policy] * rows if groups else [])
        for members, runner, state in groups:
            batch._add_group(members, runner, state)
        batch._index_groups()
        return batch

    @property
    def states(self) -> list[dict[str, Tensor]]:
        """What each policy remembers of its rows, in the order of the groups."""
        return [group.state for group in self._groups]

    @property
    def requires(self) -> frozenset[str]:
        """What any of the policies requires, or is observed."""
        return self._requires

    @property
    def reads_committed(self) -> bool:
        """Whether a step reads logits of committed positions, too."""
        return self._whole_rows is not None

    def needed(self) -> Tensor:
        """bool (B, L): the positions whose logits the next step reads.

        The masked ones; for policies that require "committed", all of a block that has masks.
        """
        if self._whole_rows is None:
            return self.masked
        return self.masked | (self._whole_rows & self.masked.any(-1, True) & self.present)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and drop the others; none is allowed, too."""
        kept = BlockBatch._gathered([self], [(self, row) for row in rows])
        for each in fields(self):
            setattr(self, each.name, getattr(kept, each.name))

    def carried(self, row: int) -> dict[str, Tensor]:
        """What the row's policy `carries` to its next block, each (1, ...), for an engine that
        begins every block by `start` (see `carry`)."""
        for group in self._groups:
            if group.runner.traits.carries and row in group.members:
                at = group.members.index(row)
                return {
                    name: group.state[name][at : at + 1].clone()
                    for name in sorted(group.runner.traits.carries)
                }
        return {}

    def carry(self, carried: Sequence[Mapping[str, Tensor]]) -> None:
        """Begin with what earlier blocks left: of each row what `carried` gave, or nothing."""
        for group in self._groups:
            for name in group.runner.traits.carries:
                new = group.state[name]
                group.state[name] = torch.cat(
                    [
                        carried[row].get(name, new[at : at + 1])
                        for at, row in enumerate(group.members)
                    ]
                )

    def advance(
        self,
        rows: Sequence[int],
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Move these rows to the next block of their canvases: tokens, present and reference
        (len(rows), L), as in `start`.

        Raises PolicyRuntimeError, before anything has moved, if a policy fails and `on_error` is
        "raise"; otherwise its rows that move go on by its progress rule.
        """
        if self.reference is not None and reference is None and "reference" in self._requires:
            raise ValueError(
                "reference=None: rows that have a reference need that of the next block"
            )
        self._renew_states(set(rows), tokens)
        index = upload(rows, self.tokens.device)
        present = torch.ones_like(tokens, dtype=torch.bool) if present is None else present
        masked = (tokens == self.mask_token_id) & present
        # Never in place: whoever watches the steps may still hold these tensors.
        self.tokens = self.tokens.index_copy(0, index, tokens)
        self.present = self.present.index_copy(0, index, present)
        self.masked = self.masked.index_copy(0, index, masked)
        self.step_index = self.step_index.index_fill(0, index, 0)
        self.block_index = self.block_index.index_add(0, index, torch.ones_like(index))
        if reference is not None:
            before = self.tokens if self.reference is None else self.reference
            self.reference = before.index_copy(0, index, reference)

    def _renew_states(self, moving: set[int], tokens: Tensor) -> None:
        """Begin the states of the moving rows anew, for blocks like those of tokens: with the state
        that was kept for a later block, where there is one, else with `init_state`."""
        reached = {row: at for at, row in reversed([*enumerate(self.later_rows)]) if row in moving}
        kept = self._later.blocks._places() if self._later is not None and reached else {}
        fresh: list[tuple[_Group, list[int], State]] = []
        failed: list[tuple[_Group, list[int], Runner]] = []
        for group in self._groups:
            local = [at for at, row in enumerate(group.members) if row in moving]
            if not local or not group.runner.form:
                continue
            known = [at for at in local if self._kept(group, at, reached, kept)]
            new = [at for at in local if not self._kept(group, at, reached, kept)]
            if known:
                origins = [kept[reached[group.members[at]]] for at in known]
                fresh.append((group, known, _joined_state(origins, tokens, self.on_error)[1]))
            if new:
                try:
                    fresh.append((group, new, group.runner.initial_state(len(new), tokens)))
                except KeyboardInterrupt:
                    raise
                except ANY_FAILURE as error:
                    policy = group.runner.policy
                    failed.append(
                        (group, new, stand_in(policy, "init_state", error, self.on_error))
                    )
        for group, local, new_state in fresh:
            carries = group.runner.traits.carries
            state = {name: value for name, value in new_state.items() if name not in carries}
            if len(local) == len(group.members):
                group.state = {**group.state, **state}
                continue
            at = upload(local, self.tokens.device)
            for name, value in state.items():
                group.state[name] = group.state[name].index_copy(0, at, value)
        for group, local, runner in failed:
            self._replace(group, local, runner)
        if failed:
            self._index_groups()
        if reached:
            gone = set(reached.values())
            self._keep_later([at for at in range(len(self.later_rows)) if at not in gone])

    @staticmethod
    def _kept(
        group: _Group, at: int, reached: dict[int, int], kept: dict[int, tuple[_Group, int]]
    ) -> bool:
        """Whether a state was kept for the next block of the group's row. A stand-in has none."""
        block = reached.get(group.members[at])
        if block is None:
            return False
        runner = kept[block][0].runner
        return runner.policy is group.runner.policy and runner.form == group.runner.form

    def _places(self) -> dict[int, tuple[_Group, int]]:
        """The group of each row, and its place there."""
        return {row: (group, at) for group in self._groups for at, row in enumerate(group.members)}

    def _keep_later(self, blocks: list[int]) -> None:
        """Keep these of the later blocks."""
        if self._later is None:
            return
        owners = [self._later.rows[at] for at in blocks]
        later = self._later.blocks
        self._later = (
            _LaterBlocks(BlockBatch.gather([(later, at) for at in blocks]), owners)
            if blocks
            else None
        )

    def _replace(self, group: _Group, local: list[int], runner: Runner) -> None:
        """Let another policy, which has no state, run some of the group's rows."""
        leaving = [group.members[at] for at in local]
        staying = [at for at in range(len(group.members)) if at not in set(local)]
        self._groups = [each for each in self._groups if each is not group]
        if staying:
            at = upload(staying, self.tokens.device)
            state = {name: value.index_select(0, at) for name, value in group.state.items()}
            self._add_group([group.members[at] for at in staying], group.runner, state)
        self._add_group(leaving, runner, {})

    def _by_policy(self) -> Iterator[tuple[UnmaskPolicy, list[int]]]:
        """Each policy object, with the rows that run it; those with a generator by themselves."""
        members: dict[tuple[int, bool], list[int]] = {}
        for row, policy in enumerate(self.policies):
            drawing = self.generators is not None and self.generators[row] is not None
            members.setdefault((id(policy), drawing), []).append(row)
        for rows in members.values():
            yield self.policies[rows[0]], rows

    def _add_group(self, members: list[int], runner: Runner, state: State) -> None:
        for row in members:
            self.policies[row] = runner.policy
        self._groups.append(_Group(runner, members, state))

    def _index_groups(self) -> None:
        self._requires = self.observe.union(
            *(group.runner.traits.requires for group in self._groups)
        )
        whole = np.zeros((len(self.policies), 1), dtype=bool)
        for group in self._groups:
            whole[group.members] = "committed" in group.runner.traits.requires | self.observe
        self._whole_rows = upload(whole, self.tokens.device) if whole.any() else None
        for group in self._groups:
            everything = len(group.members) == len(self.policies)
            group.index = None if everything else upload(group.members, self.tokens.device)


_OF_THE_BLOCK = (
    "tokens",
    "masked",
    "present",
    "step_index",
    "block_index",
    "canvas_length",
)
_OF_LOGITS = ("x0", "confidence", "entropy", "margin")
PER_ROW = (*_OF_THE_BLOCK, "ignores_end")
"""The tensors of a BlockBatch that have one entry per batch row."""


def _generators(each: Sequence[torch.Generator | None]) -> list[torch.Generator | None] | None:
    """One per row; None if no row has one."""
    return list(each) if any(generator is not None for generator in each) else None


def _joined_state(
    rows: Sequence[tuple[_Group, int]], like: Tensor, on_error: OnError
) -> tuple[Runner, State]:
    """How a policy runs these rows of groups of its own, and its state of them.

    A policy that has begun its blocks with states of several forms cannot go on with them.
    """
    groups = list({id(group): group for group, _ in rows}.values())
    runner = groups[0].runner
    if not any(group.runner.form for group in groups):
        return runner, {}
    starts = dict(
        zip(map(id, groups), accumulate((len(g.members) for g in groups), initial=0), strict=False)
    )
    try:
        for group in groups:
            if group.runner.form != runner.form:
                raise ContractError(
                    f"gave {group.runner.told}, and {runner.told} for other blocks of this batch"
                )
        index = upload([starts[id(group)] + at for group, at in rows], like.device)
        return runner, {
            name: torch.cat([group.state[name] for group in groups]).index_select(0, index)
            for name in runner.form
        }
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        return stand_in(runner.policy, "init_state", error, on_error), {}


@dataclass(frozen=True)
class StepOutcome:
    """What a denoising step did; all (B, L) bool but `ended` and `step`."""

    step: DenoisingStep
    """The step before the commits, with all that was computed; a policy saw what it requires."""
    committed: Tensor
    remasked: Tensor
    behind: Tensor
    """Positions that this step put behind the end of the text: they are end-of-text now, and no
    longer present."""
    ended: Tensor
    """(B,) bool, rows whose text has got its end in this block."""
    sound: Tensor
    """Positions that were masked before the step and whose logits hold no NaN."""


def denoising_step(
    block: BlockBatch,
    logits: Tensor,
    positions: Tensor | None = None,
    *,
    end_of_text: EndOfText,
    x0: Tensor | None = None,
    suppress_mask: bool = True,
    on_error: OnError | None = None,
    later: tuple[Tensor, Tensor] | None = None,
) -> StepOutcome:
    """Take one denoising step; `block` is updated in place.

    Args:
        block: the blocks as they stand. Rows without masks stay as they are.
        logits: (N, V), or (B, L, V) for every position of the block.
        positions: (N,) int64, ``row * L + position`` of each row of logits; it must cover
            `block.needed()`. None if logits are given for every position.
        end_of_text: the rule in force.
        x0: (N,) tokens drawn from the logits (see `sample_tokens`); None for the argmax.
        suppress_mask: never predict the mask token. False is for exact parity with code that does
            not suppress it (LLaDA, Fast-dLLM): a position that is selected and whose prediction is
            the mask token stays masked, counts as what the step selected, and is decoded again.
            So that the block ends, this holds for its first L steps, as many as that code takes at
            most; from then on the row's mask token is suppressed.
        on_error: for this call alone, instead of the batch's own `on_error`.
        later: for a batch that looks ahead (`BlockBatch.look_ahead`), the logits (M, V) of its
            later blocks and where they belong, (M,) int64, ``block * L + position``, blocks in the
            order of `BlockBatch.later_rows`; they cover all masked positions of these blocks.

    A block that has masks has fewer of them afterwards, whatever the policy selects (without
    suppress_mask from its step L on, so that a block ends in 2 L steps at most). Positions
    whose logits hold NaN, which is seen by their confidence, are never selected; the progress rule
    takes one where no other mask is left.

    Raises PolicyRuntimeError, with the policy's name and the method's, if a policy raises or breaks
    its contract and on_error is "raise". A policy that changes what it was shown is not asked again
    in this block.
    """
    on_error = block.on_error if on_error is None else on_error
    step = _observe(block, logits, positions, x0, suppress_mask)
    _look_ahead(block, later, suppress_mask, on_error)
    sound = block.masked & ~step.confidence.isnan()
    decided = []
    for group in block._groups:
        seen = _seen_by(step, group, block, on_error)
        has_logits = seen.has("logits")
        answer = _ask(group, "select", seen, block, on_error)
        if answer is None:
            # It may have written to what it was shown, which in a batch of its own is no copy;
            # where it was shown the logits, which are read no second time, the rest was one.
            if group.index is None and not has_logits:
                step = _observe(block, logits, positions, x0, suppress_mask)
            seen = _seen_by(step, group, block, on_error)
            answer = torch.zeros_like(seen.masked)
        candidates = _of(sound, group)
        selected = answer & candidates
        # By the core's own tensors: a policy may have written to those that it was shown.
        confidence, masked = _of(step.confidence, group), _of(block.masked, group)
        rule = group.runner.traits.progress
        selected = selected | _progress(rule, selected, confidence, masked, candidates)
        if group.runner.traits.edits:
            ignores_end = _of(block.ignores_end, group)
            selected = selected | (answer & _editable(seen, ignores_end, end_of_text))
        decided.append(selected)
    committed = _joined(block, decided)
    if not suppress_mask:
        committed &= step.x0 != block.mask_token_id

    tokens = torch.where(committed, step.x0, block.tokens)
    masked = block.masked & ~committed
    remasked = torch.zeros_like(masked)
    if any(group.runner.traits.remasks for group in block._groups):
        # One fewer than were committed, so that the block ends; none where nothing was.
        allowed = ((committed & block.masked).sum(-1, keepdim=True) - 1).clamp_(min=0)
        open_to_it = ~masked & block.present
        if end_of_text.rule != "off":  # what was cut behind an end of text does not come back
            ends = is_end_of_text(tokens, end_of_text.token_ids)
            open_to_it &= ~ends | block.ignores_end.unsqueeze(-1)
        for group in block._groups:
            if group.runner.traits.remasks:
                seen = _seen_by(step, group, block, on_error)
                after = seen.changed(tokens=_of(tokens, group), masked=_of(masked, group))
                answer = _ask(group, "remask", after, block, on_error)
                if answer is None:
                    continue
                back = answer & _of(open_to_it, group)
                _put(remasked, group, back & (ranks(-seen.confidence, back) < _of(allowed, group)))
        tokens = tokens.masked_fill(remasked, block.mask_token_id)
        masked = masked | remasked

    block.step_index = block.step_index + block.masked.any(-1)
    block.tokens, block.masked = tokens, masked
    if end_of_text.rule == "off":
        nowhere = torch.zeros_like(masked)
        return StepOutcome(step, committed, remasked, nowhere, nowhere[:, 0], sound)

    settled = torch.where(block.present, tokens, block.mask_token_id)
    ended, behind = behind_end(settled, masked, step.x0, step.confidence, end_of_text)
    ended = ended & ~block.ignores_end
    behind = behind & block.present & ended.unsqueeze(-1)
    kept = ~behind
    block.tokens = tokens.masked_fill(behind, end_of_text.token_ids[0])
    block.masked = masked & kept
    block.present = block.present & kept
    return StepOutcome(step, committed & kept, remasked & kept, behind, ended, sound)


def _look_ahead(
    block: BlockBatch,
    logits: tuple[Tensor, Tensor] | None,
    suppress_mask: bool,
    on_error: OnError,
) -> None:
    """Show the policies what the model predicts for the later blocks; only their states change."""
    if (block._later is None) != (logits is None):
        raise ValueError(
            f"a batch with {len(block.later_rows)} later blocks and "
            f"{'no' if logits is None else 'some'} logits for them"
        )
    if block._later is None or logits is None:
        return
    blocks = block._later.blocks
    step = _observe(blocks, *logits, None, suppress_mask)
    for group in blocks._groups:
        _ask(group, "select", _seen_by(step, group, blocks, on_error), blocks, on_error)


def _observe(
    block: BlockBatch,
    logits: Tensor,
    positions: Tensor | None,
    x0: Tensor | None,
    suppress_mask: bool,
) -> DenoisingStep:
    """The statistics of the given rows of logits, laid out over the blocks."""
    rows, length = block.tokens.shape
    flat = logits.flatten(0, -2)
    if positions is None and len(flat) != rows * length:
        raise ValueError(f"logits of {len(flat)} rows for {rows} blocks of {length} positions")
    requires = block.requires
    suppress = block.mask_token_id if suppress_mask else None
    needed = block.needed()
    given = None
    if positions is None:  # of all positions: the others are skipped
        every = torch.arange(rows * length, device=flat.device)
        given = torch.where(needed.flatten(), every, -1)
    found = row_statistics(flat, requires & _COMPUTED, suppress, x0=x0, rows=given)
    if not suppress_mask and block.mask_token_id >= 0:
        found = _suppressed_late(found, block, flat, positions, x0, given)

    def lay_out(values: Tensor, elsewhere: Tensor) -> Tensor:
        if positions is None:
            full = values.view(rows, length)
        else:
            full = elsewhere.flatten().index_copy(0, positions, values).view(rows, length)
        return torch.where(needed, full, elsewhere)

    predicted = lay_out(found.x0, block.tokens)
    # Committed positions are certain. A masked one whose logits were not given is the last to be
    # taken.
    committed = (block.present > block.masked).to(torch.float32)
    confidence = lay_out(found.confidence, committed)
    entropy = margin = cube = None
    if found.entropy is not None:
        entropy = lay_out(found.entropy, torch.zeros_like(committed))
    if found.margin is not None:
        margin = lay_out(found.margin, block.present.to(torch.float32))
    if "logits" in requires:
        if positions is None:
            cube = flat.view(rows, length, flat.shape[1])
        else:
            cube = logits.new_zeros(rows * length, flat.shape[1])
            cube = cube.index_copy_(0, positions, flat).view(rows, length, flat.shape[1])
    return DenoisingStep(
        tokens=block.tokens,
        masked=block.masked,
        x0=predicted,
        confidence=confidence,
        entropy=entropy,
        margin=margin,
        logits=cube,
        step_index=block.step_index,
        block_index=block.block_index,
        canvas_length=block.canvas_length,
        present=block.present,
        mask_token_id=block.mask_token_id,
        reference=block.reference,
    )


def _suppressed_late(
    found: RowStatistics,
    block: BlockBatch,
    logits: Tensor,
    positions: Tensor | None,
    x0: Tensor | None,
    given: Tensor | None,
) -> RowStatistics:
    """Statistics (N,) that predict no mask token in the rows that have taken L steps."""
    length = block.tokens.shape[1]
    late = block.step_index >= length
    if positions is None:
        assert given is not None
        here, every = late.repeat_interleave(length), given
    else:
        here = late.index_select(0, positions.div(length, rounding_mode="floor"))
        every = torch.arange(len(logits), device=logits.device)
    mask = block.mask_token_id
    asked = frozenset(n for n in ("entropy", "margin") if getattr(found, n) is not None)
    instead = row_statistics(
        logits,
        asked,
        mask,
        x0=None if x0 is None else torch.where(x0 == mask, -1, x0),
        rows=torch.where(here, every, -1),
    )

    def chosen(name: str) -> Any:
        early = getattr(found, name)
        return None if early is None else torch.where(here, getattr(instead, name), early)

    return RowStatistics(**{each.name: chosen(each.name) for each in fields(RowStatistics)})


def _seen_by(
    step: DenoisingStep, group: _Group, block: BlockBatch, on_error: OnError
) -> DenoisingStep:
    """The group's rows of the step, with nothing that its policy did not require."""
    requires = group.runner.traits.requires
    changes: dict[str, Any] = {
        name: None for name in ("entropy", "margin", "logits", "reference") if name not in requires
    }
    if "committed" not in requires and "committed" in block.requires:
        masked, certain = block.masked, block.present.to(torch.float32)
        changes["x0"] = torch.where(masked, step.x0, block.tokens)
        changes["confidence"] = torch.where(masked, step.confidence, certain)
        if "entropy" in requires and step.has("entropy"):
            changes["entropy"] = step.entropy * masked
        if "margin" in requires and step.has("margin"):
            changes["margin"] = torch.where(masked, step.margin, certain)
    generators = block.generators
    if generators is not None and generators[group.members[0]] is not None:
        # Of its rows alone; others are never read.
        changes["generator"] = tuple(generators)
    # A copy in any case, so that no policy holds the step that the core goes on with.
    seen = step.changed(policy=group.runner.traits.name, **changes)
    if group.index is not None:
        return seen.select_rows(group.index, group.members)
    if on_error == "raise":  # a policy that writes to them ends the decode
        return seen
    # Of all rows: the block's own tensors are copied, so that a write does not reach the block.
    # Of a policy that may write to the logits, all that was made of them is.
    names = [*_OF_THE_BLOCK]
    if seen.has("logits"):
        names += [name for name in _OF_LOGITS if seen.has(name)]
    return seen.changed(**{name: getattr(seen, name).clone() for name in names})


def _of(values: Tensor, group: _Group) -> Tensor:
    return values if group.index is None else values.index_select(0, group.index)


def _put(target: Tensor, group: _Group, values: Tensor) -> None:
    if group.index is None:
        target.copy_(values)
    else:
        target.index_copy_(0, group.index, values)


def _joined(block: BlockBatch, values: list[Tensor]) -> Tensor:
    """bool (B, L) of all rows, out of those of each group."""
    if len(values) == 1 and block._groups[0].index is None:
        return values[0]
    joined = torch.zeros_like(block.masked)
    for group, of_group in zip(block._groups, values, strict=True):
        _put(joined, group, of_group)
    return joined


def _editable(step: DenoisingStep, ignores_end: Tensor, end_of_text: EndOfText) -> Tensor:
    """bool (B, L): the committed positions with another prediction, which is one. ignores_end: (B,)
    bool, the rows in which an end-of-text token is a token like any other."""
    differs = (step.x0 != step.tokens) & ~step.masked & step.present & step.masked.any(-1, True)
    if end_of_text.rule != "off":  # what was cut behind an end of text does not come back
        ends = is_end_of_text(step.tokens, end_of_text.token_ids)
        differs &= ~ends | ignores_end.unsqueeze(-1)
    return differs & ~step.confidence.isnan()


def _progress(
    rule: str, selected: Tensor, confidence: Tensor, masked: Tensor, sound: Tensor
) -> Tensor:
    """What a policy's progress rule commits besides the selection; sound (B, L): the masked
    positions whose confidence is a number."""
    if rule == "always_top1":
        return top_1(confidence, masked)
    empty = ~selected.any(-1, keepdim=True)
    if rule == "leftmost_if_empty":
        return empty & leftmost(torch.where(sound.any(-1, True), sound, masked))
    return empty & top_1(confidence, masked)


def _ask(
    group: _Group,
    method: Literal["select", "remask"],
    step: DenoisingStep,
    block: BlockBatch,
    on_error: OnError,
) -> Tensor | None:
    """What the policy answers; None where it fails."""
    runner, before = group.runner, dict(group.state)
    try:
        return runner.ask(method, step, group.state)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        if isinstance(error, InputChanged) or not runner.keeps_form(before, step.masked):
            # It cannot be asked again: the rows, or their state, are not what they were.
            group.runner, before = stand_in(runner.policy, method, error, on_error), {}
            for row in group.members:
                block.policies[row] = group.runner.policy
        else:
            report_failure(runner.policy, method, error, on_error)
        group.state = before
        return None
