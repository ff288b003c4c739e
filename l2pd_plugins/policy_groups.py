"""The rows of a batch, grouped by kind of policy, and the state that is kept for them.

A set of rows is given in two ways: by indices, if the host knows them, or by a mask on the device,
if it does not. `put` has the same interface for both, so the code that moves rows to their next
block is written once. Nothing here reads a value back to the host.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins.errors import ANY_FAILURE
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_plugins.policy_calls import ContractError, OnError, Runner, State, stand_in
from l2pd_plugins.row_options import Same, columns_of
from l2pd_plugins.upload import upload


class Rows(Protocol):
    """Some of the rows of tensors (B, ...)."""

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        """A copy of values (B, ...) with `new` in these rows. Not in place, since an observer of
        the steps may still hold the tensor.
        """
        ...

    def take(self, values: Tensor) -> Tensor:
        """The values (B, ...) of these rows, in the form that `put` takes as `new`."""
        ...


@dataclass(frozen=True)
class IndexedRows:
    """Rows given by N indices; `new` is (N, ...)."""

    index: Tensor | None
    """(N,) int64; None for all rows, in their order."""

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        return new if self.index is None else values.index_copy(0, self.index, new)

    def take(self, values: Tensor) -> Tensor:
        return values if self.index is None else values.index_select(0, self.index)


@dataclass(frozen=True)
class MarkedRows:
    """Rows given by a mask on the device; `new` has B rows, or one row for all of them."""

    where: Tensor
    """(B,) bool."""

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        return torch.where(self.where.view(-1, *[1] * (values.ndim - 1)), new, values)

    def take(self, values: Tensor) -> Tensor:
        return values


@dataclass(eq=False)
class Group:
    """The rows of a batch whose policies are of one kind (see `row_options.kind_of`). Rows with a
    generator and rows without are separate groups.
    """

    runner: Runner
    """Runs the policy of the first member."""
    members: list[int]
    state: State
    index: Tensor | None = None
    """`members` on the device; None if they are all rows."""
    columns: dict[str, Tensor] | None = None
    """The row options, each (N, 1); empty if all members have the same policy. None until they are
    derived from the members' policies.
    """

    def ask(self, method: Literal["select", "remask"], step: DenoisingStep) -> Tensor:
        """The policy's answer for the members. Raises what the policy raises, and ContractError."""
        return self.runner.ask(method, step, self.state, self.columns)

    def rows_at(self, local: list[int], device: torch.device) -> IndexedRows:
        """The rows at these places of `members`, in order."""
        everything = len(local) == len(self.members)
        return IndexedRows(None if everything else upload(local, device))

    def carried(self, at: int) -> State:
        """The state tensors that the policy carries to the next block of the row at this place,
        each (1, ...).
        """
        names = sorted(self.runner.traits.carries)
        return {name: self.state[name][at : at + 1].clone() for name in names}

    def carry(self, carried: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore the state that earlier blocks have left: for each row of the batch the result of
        `carried`, or an empty dict.
        """
        for name in self.runner.traits.carries:
            new = self.state[name]
            rows = enumerate(self.members)
            self.state[name] = torch.cat(
                [carried[row].get(name, new[at : at + 1]) for at, row in rows]
            )

    def renew(self, rows: Rows, fresh: Mapping[str, Tensor]) -> None:
        """Begin a block in these rows of the group: their state becomes `fresh`, except the tensors
        that the policy carries from block to block.
        """
        carries = self.runner.traits.carries
        # Empty if a stand-in runs instead of the policy.
        names = [name for name in self.runner.form if name not in carries]
        self.state = {
            **self.state,
            **{name: rows.put(self.state[name], fresh[name]) for name in names},
        }


class Groups:
    """All rows of a batch, grouped by kind of policy.

    Which row runs which policy is known on the host, so grouping costs no synchronisation.
    """

    def __init__(
        self, policies: list[UnmaskPolicy], observe: frozenset[str], device: torch.device
    ) -> None:
        self.policies = policies
        """The batch's own list: the policy of each row."""
        self.observe, self.device = observe, device
        self.requires: frozenset[str] = frozenset()
        """Union of the statistics that the policies require and that are observed."""
        self.whole_rows: Tensor | None = None
        """(B, 1) bool: rows whose policies also read committed positions; None if there are
        none.
        """
        self._each: list[Group] = []

    def __iter__(self) -> Iterator[Group]:
        return iter(self._each)

    def __getitem__(self, at: int) -> Group:
        return self._each[at]

    def by_kind(
        self, kinds: Sequence[Hashable], generators: Sequence[torch.Generator | None] | None
    ) -> list[list[int]]:
        """The rows of each kind; rows with a generator are separate. kinds: of each row."""
        members: dict[tuple[Hashable, bool], list[int]] = {}
        for row, kind in enumerate(kinds):
            drawing = generators is not None and generators[row] is not None
            members.setdefault((kind, drawing), []).append(row)
        return [*members.values()]

    def add(
        self,
        members: list[int],
        runner: Runner,
        state: State,
        columns: dict[str, Tensor] | None = None,
    ) -> None:
        """Add a group: these rows, their runner, their state and, if known, their row options. Call
        `index` after the last group.
        """
        if runner.stands_in:
            for row in members:
                self.policies[row] = runner.policy
        elif members and runner.policy is not self.policies[members[0]]:
            runner = replace(runner, policy=self.policies[members[0]])
        self._each.append(Group(runner, members, state, columns=columns))

    def replace(self, group: Group, local: list[int], runner: Runner) -> None:
        """Let a stateless policy run some rows of the group, given by their places in it. Call
        `index` after the last change.
        """
        leaving = [group.members[at] for at in local]
        staying = [at for at in range(len(group.members)) if at not in set(local)]
        self._each = [each for each in self._each if each is not group]
        if staying:
            at = upload(staying, self.device)
            state = {name: value.index_select(0, at) for name, value in group.state.items()}
            self.add([group.members[at] for at in staying], group.runner, state)
        self.add(leaving, runner, {})

    def split(self, group: Group) -> list[Group]:
        """Replace a group by one for each policy among its members; none if it has only one."""
        members: dict[int, list[int]] = {}
        for at, row in enumerate(group.members):
            members.setdefault(id(self.policies[row]), []).append(at)
        if not group.columns or len(members) == 1:
            return []
        parts = []
        for local in members.values():
            rows = [group.members[at] for at in local]
            policy, places = self.policies[rows[0]], upload(local, self.device)
            runner = replace(group.runner, policy=policy, kind=Same(policy))
            state = {name: value.index_select(0, places) for name, value in group.state.items()}
            parts.append(Group(runner, rows, state, upload(rows, self.device), {}))
        place = self._each.index(group)
        self._each[place : place + 1] = parts
        return parts

    def index(self) -> None:
        """Update everything that is derived from the groups."""
        self.requires = self.observe.union(*(group.runner.traits.requires for group in self))
        whole = np.zeros((len(self.policies), 1), dtype=bool)
        for group in self:
            whole[group.members] = "committed" in group.runner.traits.requires | self.observe
        self.whole_rows = upload(whole, self.device) if whole.any() else None
        for group in self:
            everything = len(group.members) == len(self.policies)
            group.index = None if everything else upload(group.members, self.device)
            if group.columns is None:
                policies = [self.policies[row] for row in group.members]
                group.columns = columns_of(policies, self.device)

    def fallback(self) -> Tensor | None:
        """(B,) bool: rows in which a fallback decided the last step instead of the policy's own
        rule, as their policies say in the state tensor "fallback"; None if no policy has one.
        """
        told = None
        for group in self:
            said = group.state.get("fallback")
            if said is None or said.dtype is not torch.bool or said.ndim != 1:
                continue
            if group.index is None:
                return said
            if told is None:
                told = torch.zeros(len(self.policies), dtype=torch.bool, device=said.device)
            told = told.index_copy(0, group.index, said)
        return told

    def places(self) -> dict[int, tuple[Group, int]]:
        """The group of each row, and the row's place in it."""
        return {row: (group, at) for group in self for at, row in enumerate(group.members)}


def joined_state(
    rows: Sequence[tuple[Group, int]], like: Tensor, on_error: OnError
) -> tuple[Runner, State]:
    """The runner and the state of one kind of policy for rows that come from several of its groups.

    A policy whose states have different forms in these groups cannot continue.
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


@dataclass
class Beginnings:
    """The states with which some rows begin their next blocks."""

    fresh: list[tuple[Group, IndexedRows, State]]
    """Groups, rows of each group, and the state with which these begin."""
    failed: list[tuple[Group, list[int], Runner]]
    """Groups whose policy has failed, places of rows in them, and the stand-in that runs there."""

    @classmethod
    def of(
        cls,
        groups: Iterable[Group],
        moving: set[int],
        kept: Mapping[int, tuple[Group, int]],
        like: Tensor,
        on_error: OnError,
    ) -> Beginnings:
        """The states for the moving rows, whose new blocks have the shape of `like` (N, L): the
        state that was kept for the row's next block if there is one, otherwise that of
        `init_state`.

        kept: for rows, the group and place of the kept state. Raises PolicyRuntimeError if a policy
        fails and on_error is "raise". Does not change the groups.
        """
        fresh: list[tuple[Group, IndexedRows, State]] = []
        failed: list[tuple[Group, list[int], Runner]] = []
        for group in groups:
            local = [at for at, row in enumerate(group.members) if row in moving]
            if not local or not group.runner.form:
                continue
            known = [at for at in local if _is_kept(group, at, kept)]
            new = [at for at in local if not _is_kept(group, at, kept)]
            if known:
                origins = [kept[group.members[at]] for at in known]
                state = joined_state(origins, like, on_error)[1]
                fresh.append((group, group.rows_at(known, like.device), state))
            if new:
                try:
                    state = group.runner.initial_state(len(new), like)
                    fresh.append((group, group.rows_at(new, like.device), state))
                except KeyboardInterrupt:
                    raise
                except ANY_FAILURE as error:
                    runner = stand_in(group.runner.policy, "init_state", error, on_error)
                    failed.append((group, new, runner))
        return cls(fresh, failed)


def _is_kept(group: Group, at: int, kept: Mapping[int, tuple[Group, int]]) -> bool:
    """Whether a state was kept for the next block of this row of the group. A stand-in has none."""
    found = kept.get(group.members[at])
    if found is None:
        return False
    runner = found[0].runner
    return runner.kind == group.runner.kind and runner.form == group.runner.form
