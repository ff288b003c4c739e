"""Blocks in static buffers, with one row for each slot of an engine.

Some engines launch the next forward pass before they have read the result of the last step
(asynchronous scheduling, CUDA graphs). Whether a block is full, and which block begins next, is
then decided on the device; the host knows only which slot runs which policy. Nothing here is read
back, and every buffer keeps its address.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins.blocks import PER_ROW, BlockBatch, masked_positions
from l2pd_plugins.errors import ANY_FAILURE
from l2pd_plugins.group_answers import of_group
from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.policy_calls import Runner, State, prepare, stand_in
from l2pd_plugins.policy_groups import Group, MarkedRows
from l2pd_plugins.row_options import column_of, kind_of
from l2pd_plugins.sampling import RowSampling, Sampling, as_numbers
from l2pd_plugins.sampling import room as room_for_sampling
from l2pd_plugins.upload import upload


@dataclass
class _Resident:
    """A kind of policy that slots run, and its state. Policies that differ only in row options are
    of one kind (`row_options.kind_of`).
    """

    asked: UnmaskPolicy
    """The first policy of its kind."""
    kind: Hashable
    runner: Runner
    """Runs `asked`, or its stand-in if it could not begin."""
    fresh: State
    """The state of one new block, (1, ...)."""
    state: State
    """The state of every slot, (slots, ...)."""
    columns: State
    """The row options of every slot, each (slots, 1)."""


@dataclass
class SlotBatch:
    """A copy of some slots' blocks for one step; `BlockSlots.put` writes it back."""

    block: BlockBatch
    index: Tensor
    """(B,) int64, the slot of each row."""
    residents: list[_Resident]
    """The resident of each row."""

    def advance(self, where: Tensor, tokens: Tensor, present: Tensor) -> None:
        """Move the rows where (B,) bool is True to the next block of their canvases; tokens and
        present (B, L) as in `BlockBatch.start`."""
        states = [
            (group, MarkedRows(of_group(where, group)), self.resident_of(group).fresh)
            for group in self.block._groups
        ]
        self.block.renew(MarkedRows(where), tokens, present, states)

    def resident_of(self, group: Group) -> _Resident:
        """The resident that the group's rows run."""
        return self.residents[group.members[0]]


_CHANGED = ("tokens", "masked", "present", "step_index", "block_index")


class BlockSlots:
    """One block for each of S slots, each with its policy, its state and its position in a canvas.

    If a policy fails, its slots continue with its progress rule: `on_error` of the blocks that are
    taken is "progress".
    """

    def __init__(
        self, slots: int, block_length: int, *, mask_token_id: int, device: torch.device
    ) -> None:
        self.block_length, self.mask_token_id = block_length, mask_token_id
        self.device = device

        def room(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        # The same fields as in BlockBatch.
        self.tokens = room(block_length)
        self.masked = room(block_length, dtype=torch.bool)
        self.present = room(block_length, dtype=torch.bool)
        self.step_index = room()
        self.block_index = room()
        self.canvas_length = room()
        self.ignores_end = room(dtype=torch.bool)
        self._residents: dict[int, _Resident] = {}
        self._runs = np.full(slots, -1, dtype=np.int64)
        """The resident that each slot runs; -1 for none."""
        self._policies = np.full(slots, None, dtype=object)
        """The policy of each slot, or None."""
        self._generators = np.full(slots, None, dtype=object)
        """The torch.Generator of each slot, or None."""
        self._sampling = room_for_sampling(slots)
        """The seed and the settings of sampling of each slot."""

    def __len__(self) -> int:
        """Number of assigned slots."""
        return int((self._runs >= 0).sum())

    @property
    def policies(self) -> list[UnmaskPolicy]:
        """The policies that slots run, each once."""
        return [*{id(each): each for each in self._policies if each is not None}.values()]

    def policy_of(self, slot: int) -> UnmaskPolicy:
        """The policy that an assigned slot runs."""
        runner = self._residents[int(self._runs[slot])].runner
        policy: UnmaskPolicy = runner.policy if runner.stands_in else self._policies[slot]
        return policy

    def assign(
        self,
        slot: int,
        policy: UnmaskPolicy,
        tokens: Sequence[int],
        present: Sequence[bool],
        *,
        block_index: int = 0,
        canvas_length: int | None = None,
        ignores_end: bool = False,
        generator: torch.Generator | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        """Begin a block in this slot: tokens and present (L,), as in `BlockBatch.start`."""
        row, there = upload(tokens, self.device), upload(present, self.device, torch.bool)
        self.release(slot)
        self._runs[slot] = kind = self._reside(policy)
        self._policies[slot], self._generators[slot] = policy, generator
        for buffer, value in zip(self._sampling, as_numbers(sampling), strict=True):
            buffer[slot] = value
        self.tokens[slot] = row
        self.present[slot] = there
        self.masked[slot] = masked_positions(row, self.mask_token_id, there)
        self.step_index[slot].fill_(0)
        self.block_index[slot].fill_(block_index)
        self.canvas_length[slot].fill_(canvas_length or self.block_length)
        self.ignores_end[slot].fill_(ignores_end)
        resident = self._residents[kind]
        for name, fresh in resident.fresh.items():
            resident.state[name][slot] = fresh[0]
        for name, column in resident.columns.items():
            column[slot].fill_(getattr(policy, name))

    def release(self, slot: int) -> None:
        """Free the slot. A kind of policy that no slot runs any more is dropped with its state."""
        was = int(self._runs[slot])
        self._runs[slot], self._policies[slot], self._generators[slot] = -1, None, None
        if was >= 0 and not (self._runs == was).any():
            del self._residents[was]

    def take(self, slots: np.ndarray, *, reference: Tensor | None = None) -> SlotBatch:
        """The blocks of these assigned slots, each at most once, in this order.

        slots: (B,) on the host; may be empty. reference: (B, L) int64, for policies that require
        it. Raises ValueError for a slot that is not assigned.
        """
        slots = np.asarray(slots, dtype=np.int64)
        runs = self._runs[slots]
        if (runs < 0).any():
            raise ValueError(f"slots {slots[runs < 0].tolist()}: not assigned")
        generators = self._generators[slots]
        # Rows with a generator are a separate group, as in a batch.
        keys = 2 * runs + (generators != np.array(None))
        kinds = np.unique(keys)
        residents = [self._residents[int(kind) // 2] for kind in kinds]
        members = [np.flatnonzero(keys == kind) for kind in kinds]
        sizes = [len(slots), *map(len, members)]
        index, *rows = upload(np.concatenate([slots, *members]), self.device).split_with_sizes(
            sizes
        )
        policies = self._policies[slots]
        groups, columns = [], []
        for resident, on_host, on_device in zip(residents, members, rows, strict=True):
            at = index.index_select(0, on_device)
            state = {name: value.index_select(0, at) for name, value in resident.state.items()}
            groups.append((on_host.tolist(), resident.runner, state))
            mixed = len({id(each) for each in policies[on_host]}) > 1
            options = resident.columns if mixed else {}  # one policy alone is asked itself
            columns.append({name: value.index_select(0, at) for name, value in options.items()})
        seeds, how = self._sampling
        block = BlockBatch.resume(
            groups,
            columns,
            **{name: getattr(self, name).index_select(0, index) for name in PER_ROW},
            policies=policies.tolist(),
            mask_token_id=self.mask_token_id,
            reference=reference,
            generators=generators.tolist() if any(kind % 2 for kind in kinds) else None,
            sampling=RowSampling.unless_greedy(seeds[slots], how[slots], self.device),
            on_error="progress",
        )
        return SlotBatch(block, index, [self._residents[int(run)] for run in runs])

    def put(self, batch: SlotBatch) -> None:
        """Write back these blocks after a step."""
        for name in _CHANGED:
            getattr(self, name).index_copy_(0, batch.index, getattr(batch.block, name))
        for group in batch.block._groups:
            resident, at = batch.resident_of(group), of_group(batch.index, group)
            for name, value in group.state.items():
                resident.state[name].index_copy_(0, at, value)

    def _reside(self, policy: UnmaskPolicy) -> int:
        """The key in `_residents` of the policy's kind; allocates a state for every slot if it is
        new.
        """
        asked = kind_of(policy)
        for key, resident in self._residents.items():
            if resident.kind == asked:
                return key
        runner, fresh = prepare(policy, 1, self.tokens, "progress")
        columns: State = {}
        try:
            # Copies: the policy may keep its returned tensors and write to them.
            fresh = {name: value.clone() for name, value in fresh.items()}
            state = self._for_every_slot(fresh)
            if runner.kind == asked:
                columns = self._for_every_slot(column_of(policy, self.device))
        except KeyboardInterrupt:
            raise
        except ANY_FAILURE as error:  # not enough memory
            runner, fresh, state = stand_in(policy, "init_state", error, "progress"), {}, {}
        key = 1 + max(self._residents, default=-1)
        self._residents[key] = _Resident(policy, asked, runner, fresh, state, columns)
        return key

    def _for_every_slot(self, values: State) -> State:
        """Each (slots, ...), from one value, (1, ...)."""
        return {
            name: value.expand(len(self._runs), *value.shape[1:]).clone()
            for name, value in values.items()
        }
