"""The blocks of a batch that are being decoded, and what each policy remembers of its rows.

Nothing here knows an engine or a policy, and nothing reads a value back to the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins.errors import ANY_FAILURE
from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.policy_calls import ContractError, OnError, Runner, State, prepare, stand_in
from l2pd_plugins.transfer import upload

OF_THE_BLOCK = (
    "tokens",
    "masked",
    "present",
    "step_index",
    "block_index",
    "canvas_length",
)
PER_ROW = (*OF_THE_BLOCK, "ignores_end")
"""The tensors of a BlockBatch that have one entry per batch row."""


@dataclass(eq=False)
class Group:
    """The rows of a batch that one policy decides for. Rows with a generator and rows without are
    two groups."""

    runner: Runner
    members: list[int]
    state: State
    index: Tensor | None = None
    """`members` on the device; None when they are all rows."""


@dataclass
class LaterBlocks:
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
    _later: LaterBlocks | None = field(default=None, repr=False)
    _groups: list[Group] = field(default_factory=list, repr=False)
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
        self._later = LaterBlocks(blocks, list(rows))

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
            gathered._later = LaterBlocks(cls.gather(blocks), list(owners))
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
        fresh: list[tuple[Group, list[int], State]] = []
        failed: list[tuple[Group, list[int], Runner]] = []
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
        group: Group, at: int, reached: dict[int, int], kept: dict[int, tuple[Group, int]]
    ) -> bool:
        """Whether a state was kept for the next block of the group's row. A stand-in has none."""
        block = reached.get(group.members[at])
        if block is None:
            return False
        runner = kept[block][0].runner
        return runner.policy is group.runner.policy and runner.form == group.runner.form

    def _places(self) -> dict[int, tuple[Group, int]]:
        """The group of each row, and its place there."""
        return {row: (group, at) for group in self._groups for at, row in enumerate(group.members)}

    def _keep_later(self, blocks: list[int]) -> None:
        """Keep these of the later blocks."""
        if self._later is None:
            return
        owners = [self._later.rows[at] for at in blocks]
        later = self._later.blocks
        self._later = (
            LaterBlocks(BlockBatch.gather([(later, at) for at in blocks]), owners)
            if blocks
            else None
        )

    def _replace(self, group: Group, local: list[int], runner: Runner) -> None:
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
        self._groups.append(Group(runner, members, state))

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


def _generators(each: Sequence[torch.Generator | None]) -> list[torch.Generator | None] | None:
    """One per row; None if no row has one."""
    return list(each) if any(generator is not None for generator in each) else None


def _joined_state(
    rows: Sequence[tuple[Group, int]], like: Tensor, on_error: OnError
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
