"""One denoising step of a batch of blocks: statistics -> select -> progress -> commit -> end.

Every engine calls `denoising_step` after its forward pass. Nothing here knows an engine or a
policy, and nothing reads a value back to the host.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins.end_of_text import EndOfText, behind_end, is_end_of_text
from l2pd_plugins.errors import L2PDError, PolicyRuntimeError
from l2pd_plugins.policy import DenoisingStep, RemaskingPolicy, UnmaskPolicy
from l2pd_plugins.selection import leftmost, ranks, top_1
from l2pd_plugins.statistics import row_statistics
from l2pd_plugins.uploading import upload

logger = logging.getLogger(__name__)

OnError = Literal["raise", "progress"]

_COMPUTED = frozenset({"confidence", "entropy", "margin"})
_failed: set[str] = set()


@dataclass
class _Group:
    """The rows of a batch that one policy decides for."""

    policy: UnmaskPolicy
    members: list[int]
    state: dict[str, Tensor]
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
    generators: list[torch.Generator] | None = None
    observe: frozenset[str] = frozenset()
    """What the outcome's step shows beyond what the policies require."""
    _later: _LaterBlocks | None = field(default=None, repr=False)
    _groups: list[_Group] = field(default_factory=list, repr=False)
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
        generators: Sequence[torch.Generator] | None = None,
        observe: frozenset[str] = frozenset(),
        on_error: OnError = "raise",
    ) -> BlockBatch:
        """A batch at its first step: tokens (B, L), positions that hold mask_token_id are masked.

        Absent positions (`present` False) are not masked, whatever they hold. A policy whose
        `init_state` fails raises PolicyRuntimeError, or with on_error="progress" leaves its rows to
        the progress rule alone (see `denoising_step`).
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
            generators=None if generators is None else list(generators),
            observe=observe,
        )
        for policy, members in _by_policy(batch.policies):
            policy, state = prepare(policy, len(members), tokens, on_error)
            for row in members:
                batch.policies[row] = policy
            batch._groups.append(_Group(policy, members, state))
        batch._index_groups()
        return batch

    def look_ahead(
        self,
        rows: Sequence[int],
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        reference: Tensor | None = None,
        on_error: OnError = "raise",
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
        distance = [rows[: at + 1].count(row) for at, row in enumerate(rows)]
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
            on_error=on_error,
        )
        self._later = _LaterBlocks(blocks, list(rows))

    @property
    def looking_ahead(self) -> list[int]:
        """The rows whose policies look ahead."""
        return [row for row, each in enumerate(self.policies) if "ahead" in each.requires]

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

        The batches are of one decode: block length, mask token, device and `observe` are the same.
        All rows of one batch, in its own order, give that batch itself; otherwise the new batch
        shares nothing with those it comes from.
        """
        batches = list({id(batch): batch for batch, _ in rows}.values())
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
            name: joined([getattr(batch, name) for batch in batches]) for name in _PER_ROW
        }
        gathered = cls(
            **per_row,
            mask_token_id=some.mask_token_id,
            policies=[batch.policies[row] for batch, row in rows],
            observe=some.observe,
        )
        if any(batch.reference is not None for batch in batches):
            # Rows without a reference never read theirs.
            gathered.reference = joined(
                [b.tokens if b.reference is None else b.reference for b in batches]
            )
        if some.generators is not None:
            gathered.generators = [(batch.generators or [])[row] for batch, row in rows]
        for policy, members in _by_policy(gathered.policies):
            origin = [rows[member] for member in members]
            gathered._groups.append(_Group(policy, members, _gathered_state(policy, origin)))
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
        cls, groups: Sequence[tuple[list[int], dict[str, Tensor]]], **per_row: Any
    ) -> BlockBatch:
        """A batch in the midst of its decode, out of its fields by name. groups: the rows that run
        one policy, and its state of them."""
        batch = cls(**per_row)
        batch._groups = [_Group(batch.policies[rows[0]], rows, state) for rows, state in groups]
        batch._index_groups()
        return batch

    @property
    def states(self) -> list[dict[str, Tensor]]:
        """What each policy remembers of its rows, in the order of the groups."""
        return [group.state for group in self._groups]

    @property
    def requires(self) -> frozenset[str]:
        """What any of the policies requires, or is observed."""
        return self.observe.union(*(group.policy.requires for group in self._groups))

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
        """Keep these rows, in this order, and drop the others."""
        kept = BlockBatch.gather([(self, row) for row in rows])
        for each in fields(self):
            setattr(self, each.name, getattr(kept, each.name))

    def advance(
        self,
        rows: Sequence[int],
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Move these rows to the next block of their canvases: tokens (len(rows), L)."""
        index = upload(rows, self.tokens.device)
        present = torch.ones_like(tokens, dtype=torch.bool) if present is None else present
        masked = (tokens == self.mask_token_id) & present
        # Never in place: whoever watches the steps may still hold these tensors.
        self.tokens = self.tokens.index_copy(0, index, tokens)
        self.present = self.present.index_copy(0, index, present)
        self.masked = self.masked.index_copy(0, index, masked)
        self.step_index = self.step_index.index_fill(0, index, 0)
        self.block_index = self.block_index.index_add(0, index, torch.ones_like(index))
        if self.reference is not None and reference is not None:
            self.reference = self.reference.index_copy(0, index, reference)
        moving = set(rows)
        firsts = {row: at for at, row in reversed([*enumerate(self.later_rows)]) if row in moving}
        nearest: dict[int, int] = {}
        if self._later is not None:  # a stand-in has kept nothing (see `prepare`)
            runs = self._later.blocks.policies
            nearest = {row: at for row, at in firsts.items() if runs[at] is self.policies[row]}
        for group in self._groups:
            local = [i for i, row in enumerate(group.members) if row in moving]
            if not local or not group.state:
                continue
            known = [i for i in local if group.members[i] in nearest]
            new = [i for i in local if group.members[i] not in nearest]
            begun: list[tuple[list[int], dict[str, Tensor]]] = []
            if known:
                kept = [nearest[group.members[i]] for i in known]
                begun.append((known, self._kept_for(group.policy, kept)))
            if new:
                begun.append((new, _initial_state(group.policy, len(new), tokens)))
            for places, state in begun:
                at = upload(places, self.tokens.device)
                for name, value in state.items():
                    group.state[name] = group.state[name].index_copy(0, at, value)
        reached = set(firsts.values())
        if reached:
            self._keep_later([at for at in range(len(self.later_rows)) if at not in reached])

    def _kept_for(self, policy: UnmaskPolicy, blocks: list[int]) -> dict[str, Tensor]:
        """The policy's state of these later blocks."""
        assert self._later is not None
        later = self._later.blocks
        return _gathered_state(policy, [(later, at) for at in blocks])

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

    def _index_groups(self) -> None:
        whole = np.zeros((len(self.policies), 1), dtype=bool)
        for group in self._groups:
            whole[group.members] = "committed" in group.policy.requires | self.observe
        self._whole_rows = upload(whole, self.tokens.device) if whole.any() else None
        for group in self._groups:
            everything = len(group.members) == len(self.policies)
            group.index = None if everything else upload(group.members, self.tokens.device)


_PER_ROW = (
    "tokens",
    "masked",
    "present",
    "step_index",
    "block_index",
    "canvas_length",
    "ignores_end",
)


class _ProgressOnly(UnmaskPolicy):
    """Stands in for a policy that could not begin: nothing but its progress rule."""

    def __init__(self, failed: UnmaskPolicy) -> None:
        self.__dict__.update(_name=failed.name, progress=failed.progress)

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        return torch.zeros_like(step.masked)


def _by_policy(policies: Sequence[UnmaskPolicy]) -> list[tuple[UnmaskPolicy, list[int]]]:
    """Each policy object, with the rows that run it."""
    members: dict[int, list[int]] = {}
    for row, policy in enumerate(policies):
        members.setdefault(id(policy), []).append(row)
    return [(policies[rows[0]], rows) for rows in members.values()]


def prepare(
    policy: UnmaskPolicy, rows: int, tokens: Tensor, on_error: OnError
) -> tuple[UnmaskPolicy, dict[str, Tensor]]:
    """The policy to run, and its state for this many new blocks like those of tokens (B, L).

    Where `init_state` fails it raises PolicyRuntimeError, or with on_error="progress" gives a
    stand-in that is nothing but the policy's progress rule.
    """
    try:
        return policy, _initial_state(policy, rows, tokens)
    except L2PDError:
        if on_error == "raise":
            raise
        _report_failure(policy, "init_state")
        return _ProgressOnly(policy), {}


def _initial_state(policy: UnmaskPolicy, rows: int, tokens: Tensor) -> dict[str, Tensor]:
    try:
        state = policy.init_state(rows, tokens.shape[1], tokens.device)
        _check_state(state, rows)
    except L2PDError:
        raise
    except Exception as error:
        raise PolicyRuntimeError(f"policy {policy.name!r}: init_state failed: {error}") from error
    return state


def _check_state(state: dict[str, Tensor], rows: int) -> None:
    for name, shape in _form(state).items():
        if shape[:1] != (rows,):
            raise TypeError(f"state {name!r} is of shape {shape}, wanted {rows} rows")


def _form(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}


def _gathered_state(
    policy: UnmaskPolicy, rows: Sequence[tuple[BlockBatch, int]]
) -> dict[str, Tensor]:
    """The policy's state of these rows, out of the batches that they come from."""
    states: list[dict[str, Tensor]] = []
    at: dict[tuple[int, int], int] = {}
    for batch in {id(batch): batch for batch, _ in rows}.values():
        group = next(group for group in batch._groups if group.policy is policy)
        states.append(group.state)
        for member in group.members:
            at[id(batch), member] = len(at)
    if not states[0]:
        return {}
    wanted = [at[id(batch), row] for batch, row in rows]
    index = upload(wanted, rows[0][0].tokens.device)
    return {
        name: torch.cat([state[name] for state in states]).index_select(0, index)
        for name in states[0]
    }


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
    on_error: OnError = "raise",
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
        suppress_mask: never predict the mask token. A model whose argmax is the mask token would
            otherwise not finish; False is for exact parity with code that does not suppress it.
        on_error: "raise" lets a failing policy end the call; "progress" (servers) lets its rows
            go on by the progress rule alone and logs the failure once per policy.
        later: for a batch that looks ahead (`BlockBatch.look_ahead`), the logits (M, V) of its
            later blocks and where they belong, (M,) int64, ``block * L + position``, blocks in the
            order of `BlockBatch.later_rows`; they cover all masked positions of these blocks.

    A block that has masks has fewer of them afterwards, whatever the policy selects. Positions
    whose logits hold NaN, which is seen by their confidence, are never selected; the progress rule
    takes one where no other mask is left.

    Raises PolicyRuntimeError, with the policy's name, if a policy raises or returns anything but a
    bool tensor (B, L), and on_error is "raise".
    """
    step = _observe(block, logits, positions, x0, suppress_mask)
    _look_ahead(block, later, suppress_mask, on_error)
    sound = block.masked & ~step.confidence.isnan()
    decided = []
    for group in block._groups:
        seen = _seen_by(step, group, block)
        answer = _ask(group, "select", seen, on_error)
        candidates = _of(sound, group)
        selected = answer & candidates
        selected = selected | _progress(group.policy, selected, seen, candidates)
        if group.policy.edits:
            selected = selected | (answer & _editable(seen, end_of_text))
        decided.append(selected)
    committed = _joined(block, decided)

    tokens = torch.where(committed, step.x0, block.tokens)
    masked = block.masked & ~committed
    remasked = torch.zeros_like(masked)
    if any(isinstance(group.policy, RemaskingPolicy) for group in block._groups):
        # One fewer than were committed, so that the block ends; none where nothing was.
        allowed = ((committed & block.masked).sum(-1, keepdim=True) - 1).clamp_(min=0)
        open_to_it = ~masked & block.present
        if end_of_text.rule != "off":  # what was cut behind an end of text does not come back
            ends = is_end_of_text(tokens, end_of_text.token_ids)
            open_to_it &= ~ends | block.ignores_end.unsqueeze(-1)
        for group in block._groups:
            if isinstance(group.policy, RemaskingPolicy):
                seen = _seen_by(step, group, block)
                after = replace(seen, tokens=_of(tokens, group), masked=_of(masked, group))
                back = _ask(group, "remask", after, on_error) & _of(open_to_it, group)
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
        _ask(group, "select", _seen_by(step, group, blocks), on_error)


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
            cube = flat.view(rows, length, -1)
        else:
            cube = logits.new_zeros(rows * length, flat.shape[1])
            cube = cube.index_copy_(0, positions, flat).view(rows, length, -1)
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
        reference=block.reference,
        generator=block.generators,
    )


def _seen_by(step: DenoisingStep, group: _Group, block: BlockBatch) -> DenoisingStep:
    """The group's rows of the step, with nothing that its policy did not require."""
    requires = group.policy.requires
    for name in ("entropy", "margin", "logits", "reference"):
        if name not in requires and getattr(step, name) is not None:
            step = replace(step, **{name: None})  # type: ignore[arg-type]
    if "committed" not in requires and "committed" in block.requires:
        certain = block.present.to(torch.float32)
        step = replace(
            step,
            x0=torch.where(block.masked, step.x0, block.tokens),
            confidence=torch.where(block.masked, step.confidence, certain),
            entropy=None if step.entropy is None else step.entropy * block.masked,
            margin=None if step.margin is None else torch.where(block.masked, step.margin, certain),
        )
    return step if group.index is None else step.select_rows(group.index, group.members)


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


def _editable(step: DenoisingStep, end_of_text: EndOfText) -> Tensor:
    """bool (B, L): the committed positions with another prediction, which is one."""
    differs = (step.x0 != step.tokens) & ~step.masked & step.present & step.masked.any(-1, True)
    if end_of_text.rule != "off":  # what was cut behind an end of text does not come back
        differs &= ~is_end_of_text(step.tokens, end_of_text.token_ids)
    return differs & ~step.confidence.isnan()


def _progress(policy: UnmaskPolicy, selected: Tensor, step: DenoisingStep, sound: Tensor) -> Tensor:
    """What the policy's progress rule commits besides the selection; sound (B, L): the masked
    positions whose confidence is a number."""
    if policy.progress == "always_top1":
        return top_1(step.confidence, step.masked)
    empty = ~selected.any(-1, keepdim=True)
    if policy.progress == "leftmost_if_empty":
        return empty & leftmost(torch.where(sound.any(-1, True), sound, step.masked))
    return empty & top_1(step.confidence, step.masked)


def _ask(
    group: _Group, method: Literal["select", "remask"], step: DenoisingStep, on_error: OnError
) -> Tensor:
    """Call the policy and check what it returns, and the state that it leaves."""
    policy = group.policy
    before = dict(group.state)
    try:
        answer = getattr(policy, method)(step, group.state)
        if not isinstance(answer, Tensor):
            raise TypeError(f"returned {type(answer).__name__}, not a tensor")
        found, wanted = (
            (value.dtype, tuple(value.shape), value.device.type) for value in (answer, step.masked)
        )
        if found != wanted:
            raise TypeError(f"returned a tensor of {found}, wanted {wanted}")
        left, began = _form(group.state), _form(before)
        if left != began:
            raise TypeError(f"left the state {left}, it began with {began}")
    except Exception as error:
        group.state = before
        if on_error == "raise":
            raise PolicyRuntimeError(f"policy {policy.name!r}: {method} failed: {error}") from error
        _report_failure(policy, method)
        return torch.zeros_like(step.masked)
    return answer


def _report_failure(policy: UnmaskPolicy, method: str) -> None:
    """Log, once per policy, the exception that is being handled."""
    if policy.name in _failed:
        return
    _failed.add(policy.name)
    logger.exception(
        "policy %r: %s failed; its rows go on by the progress rule %r",
        policy.name,
        method,
        policy.progress,
    )
