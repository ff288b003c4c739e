"""The rows of a batch by the policy that decides for them, and what each policy remembers of them.

Rows are named in two ways: by their indices, where the host knows which they are, and by a mask on
the device, where it does not. `put` writes to them in the same way for both, so everything that
follows from rows that go on is written once. Nothing here reads a value back to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins.errors import ANY_FAILURE
from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.policy_calls import ContractError, OnError, Runner, State, stand_in
from l2pd_plugins.transfer import upload


class Rows(Protocol):
    """Some of the rows of tensors (B, ...)."""

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        """values (B, ...) with `new` in these rows. Never in place: whoever watches the steps may
        still hold the tensor."""

    def take(self, values: Tensor) -> Tensor:
        """What `put` takes as `new` to leave values (B, ...) as they are."""


@dataclass(frozen=True)
class IndexedRows:
    """Rows by their indices; `new` (N, ...) has as many rows as there are indices."""

    index: Tensor | None
    """(N,) int64; None for all rows, in their order."""

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        return new if self.index is None else values.index_copy(0, self.index, new)

    def take(self, values: Tensor) -> Tensor:
        return values if self.index is None else values.index_select(0, self.index)


@dataclass(frozen=True)
class MarkedRows:
    """Rows that a mask on the device marks; `new` has all B rows, or one for all of them."""

    where: Tensor
    """(B,) bool."""

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        return torch.where(self.where.view(-1, *[1] * (values.ndim - 1)), new, values)

    def take(self, values: Tensor) -> Tensor:
        return values


@dataclass(eq=False)
class Group:
    """The rows of a batch that one policy decides for. Rows with a generator and rows without are
    two groups."""

    runner: Runner
    members: list[int]
    state: State
    index: Tensor | None = None
    """`members` on the device; None when they are all rows."""

    def rows_at(self, local: list[int], device: torch.device) -> IndexedRows:
        """Rows of the group, by their places in `members`, in order."""
        everything = len(local) == len(self.members)
        return IndexedRows(None if everything else upload(local, device))

    def carried(self, at: int) -> State:
        """What the policy carries to the next block of the row at this place, each (1, ...)."""
        names = sorted(self.runner.traits.carries)
        return {name: self.state[name][at : at + 1].clone() for name in names}

    def carry(self, carried: Sequence[Mapping[str, Tensor]]) -> None:
        """Begin with what earlier blocks left: of each row of the batch what `carried` gave, or
        nothing."""
        for name in self.runner.traits.carries:
            new = self.state[name]
            rows = enumerate(self.members)
            self.state[name] = torch.cat(
                [carried[row].get(name, new[at : at + 1]) for at, row in rows]
            )

    def renew(self, rows: Rows, fresh: Mapping[str, Tensor]) -> None:
        """Begin a block in these of the group's rows: their state is `fresh`, but for what the
        policy carries from one block to the next."""
        carries = self.runner.traits.carries
        # Nothing, where something stands in for the policy.
        names = [name for name in self.runner.form if name not in carries]
        self.state = {
            **self.state,
            **{name: rows.put(self.state[name], fresh[name]) for name in names},
        }


class Groups:
    """All rows of a batch, by the policy that decides for them.

    Which row runs which policy is known on the host, so grouping costs no synchronisation.
    """

    def __init__(
        self, policies: list[UnmaskPolicy], observe: frozenset[str], device: torch.device
    ) -> None:
        self.policies = policies
        """The batch's own list, one for each row: the policy that a group runs stands there."""
        self.observe, self.device = observe, device
        self.requires: frozenset[str] = frozenset()
        """What any of the policies requires, or is observed."""
        self.whole_rows: Tensor | None = None
        """(B, 1) bool, rows of which committed positions are read, too; None if there are none."""
        self._each: list[Group] = []

    def __iter__(self) -> Iterator[Group]:
        return iter(self._each)

    def __getitem__(self, at: int) -> Group:
        return self._each[at]

    def by_policy(
        self, generators: Sequence[torch.Generator | None] | None
    ) -> Iterator[tuple[UnmaskPolicy, list[int]]]:
        """Each policy object, with the rows that run it; those with a generator by themselves."""
        members: dict[tuple[int, bool], list[int]] = {}
        for row, policy in enumerate(self.policies):
            drawing = generators is not None and generators[row] is not None
            members.setdefault((id(policy), drawing), []).append(row)
        for rows in members.values():
            yield self.policies[rows[0]], rows

    def add(self, members: list[int], runner: Runner, state: State) -> None:
        """Have these rows run so. After the last group, `index` is called."""
        for row in members:
            self.policies[row] = runner.policy
        self._each.append(Group(runner, members, state))

    def replace(self, group: Group, local: list[int], runner: Runner) -> None:
        """Let another policy, which has no state, run some of the group's rows, by their places
        there. After the last change, `index` is called."""
        leaving = [group.members[at] for at in local]
        staying = [at for at in range(len(group.members)) if at not in set(local)]
        self._each = [each for each in self._each if each is not group]
        if staying:
            at = upload(staying, self.device)
            state = {name: value.index_select(0, at) for name, value in group.state.items()}
            self.add([group.members[at] for at in staying], group.runner, state)
        self.add(leaving, runner, {})

    def index(self) -> None:
        """Note what follows from the groups as they are now."""
        self.requires = self.observe.union(*(group.runner.traits.requires for group in self))
        whole = np.zeros((len(self.policies), 1), dtype=bool)
        for group in self:
            whole[group.members] = "committed" in group.runner.traits.requires | self.observe
        self.whole_rows = upload(whole, self.device) if whole.any() else None
        for group in self:
            everything = len(group.members) == len(self.policies)
            group.index = None if everything else upload(group.members, self.device)

    def places(self) -> dict[int, tuple[Group, int]]:
        """The group of each row, and its place there."""
        return {row: (group, at) for group in self for at, row in enumerate(group.members)}


def joined_state(
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


@dataclass
class Beginnings:
    """What the policies of some rows begin their next blocks with."""

    fresh: list[tuple[Group, IndexedRows, State]]
    """Groups, rows of them, and the state that these begin with."""
    failed: list[tuple[Group, list[int], Runner]]
    """Groups whose policy has failed, places of rows in them, and what stands in for it there."""

    @classmethod
    def of(
        cls,
        groups: Iterable[Group],
        moving: set[int],
        kept: Mapping[int, tuple[Group, int]],
        like: Tensor,
        on_error: OnError,
    ) -> Beginnings:
        """For the moving rows, and blocks like those of tokens `like` (N, L): the state that was
        kept for the row's next block, where there is one, else that of `init_state`.

        kept: of rows, the group and place of the state that was kept. Raises PolicyRuntimeError if
        a policy fails and on_error is "raise". Nothing is changed.
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
    """Whether a state was kept for the next block of the group's row. A stand-in has none."""
    found = kept.get(group.members[at])
    if found is None:
        return False
    runner = found[0].runner
    return runner.policy is group.runner.policy and runner.form == group.runner.form
