"""The current blocks of the rows of a batch.

Nothing here knows an engine or a policy, and nothing reads a value back to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, zip_longest
from typing import Any

import torch
from torch import Tensor

from l2pd_plugins.later_blocks import LaterBlocks, begin_next
from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.policy_calls import OnError, Runner, State, prepare
from l2pd_plugins.policy_groups import Group, Groups, IndexedRows, Rows, joined_state
from l2pd_plugins.row_options import kinds_of
from l2pd_plugins.sampling import RowSampling, Sampling, generators_or_none
from l2pd_plugins.upload import upload

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


@dataclass
class BlockBatch:
    """B blocks that are being decoded, one per sequence, and the policy of each.

    Rows may be at different blocks of their canvases and run different policies. The host knows
    which row runs which policy, so grouping costs no synchronisation.
    """

    tokens: Tensor
    """(B, L) int64; mask_token_id where masked."""
    masked: Tensor
    """(B, L) bool."""
    present: Tensor
    """(B, L) bool: False after the end of the text or of the canvas, and at positions of the
    prompt, if the first block begins with the end of the prompt.
    """
    step_index: Tensor
    """(B,) int64: denoising steps taken so far in the block."""
    block_index: Tensor
    """(B,) int64."""
    canvas_length: Tensor
    """(B,) int64: number of positions of the canvas to which the block belongs."""
    mask_token_id: int
    policies: list[UnmaskPolicy]
    """One policy per row; rows with policies of one kind form a group."""
    ignores_end: Tensor
    """(B,) bool: rows that continue after an end-of-text token."""
    reference: Tensor | None = None
    """(B, L) int64: the reference answer, for policies that require it."""
    generators: list[torch.Generator | None] | None = None
    """One generator per row, None for a row without one; None if no row has one."""
    sampling: RowSampling | None = None
    """How each row draws its predictions; None if all rows take the argmax."""
    on_error: OnError = "raise"
    """What to do when a policy fails, at this block and all later ones: "raise" raises
    PolicyRuntimeError; with "progress" (servers) its rows continue with only its progress rule, and
    the failure is logged once per policy.
    """
    observe: frozenset[str] = frozenset()
    """Statistics that the outcome's step contains in addition to those that the policies
    require.
    """
    _later: LaterBlocks | None = field(default=None, repr=False)
    _groups: Groups = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._groups = Groups(self.policies, self.observe, self.tokens.device)

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
        sampling: Sequence[Sampling | None] | None = None,
        observe: frozenset[str] = frozenset(),
        on_error: OnError = "raise",
    ) -> BlockBatch:
        """A batch at its first step: tokens (B, L), positions that hold mask_token_id are masked.

        Absent positions (`present` False) are not masked, whatever they hold. If a policy fails,
        here or later, PolicyRuntimeError is raised, or with on_error="progress" its rows continue
        with its progress rule.
        """
        rows = len(tokens)
        if len(policies) != rows:
            raise ValueError(f"{len(policies)} policies for {rows} rows")
        present = torch.ones_like(tokens, dtype=torch.bool) if present is None else present
        zeros = torch.zeros(rows, dtype=torch.int64, device=tokens.device)
        batch = cls(
            tokens=tokens,
            masked=masked_positions(tokens, mask_token_id, present),
            present=present,
            step_index=zeros,
            block_index=zeros.clone() if block_index is None else block_index,
            canvas_length=zeros + tokens.shape[1] if canvas_length is None else canvas_length,
            mask_token_id=mask_token_id,
            policies=list(policies),
            ignores_end=zeros.to(torch.bool) if ignores_end is None else ignores_end,
            reference=reference,
            generators=generators_or_none(generators or ()),
            sampling=RowSampling.of(sampling, tokens.device),
            on_error=on_error,
            observe=observe,
        )
        for members in batch._groups.by_kind(kinds_of(policies), batch.generators):
            prepared = prepare(policies[members[0]], len(members), tokens, on_error)
            batch._groups.add(members, *prepared)
        batch._groups.index()
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
        """Also keep a state for later blocks, for policies that look ahead.

        rows: the batch row of each of the N blocks, one of `looking_ahead`; the blocks of one row
        are consecutive and begin with the one after its current block. tokens, present,
        reference: (N, L), as in `start`. From then on each `denoising_step` takes their logits, and
        `advance` begins a block with the state that was kept for it. It can be called only once.

        Raises PolicyRuntimeError as `start` does.
        """
        if not rows:
            return
        self._later = LaterBlocks.behind(
            self,
            rows,
            tokens,
            present=present,
            reference=reference,
            on_error=self.on_error if on_error is None else on_error,
        )

    def set_tokens(self, tokens: Tensor, present: Tensor | None = None) -> None:
        """Set the tokens (B, L) of the blocks, and present (B, L) bool (None: unchanged).

        `tokens`, `present` and `masked` are changed here and nowhere else, so that always ``masked
        == (tokens == mask_token_id) & present``. Raises ValueError for tensors of other shapes.
        """
        present = self.present if present is None else present
        self._check_shape("tokens", tokens)
        self._check_shape("present", present)
        self.tokens, self.present = tokens, present
        self.masked = masked_positions(tokens, self.mask_token_id, present)

    def set_reference(self, reference: Tensor | None) -> None:
        """Set the reference (B, L) int64 for policies that require it; None: there is none.

        Raises ValueError for a tensor of another shape.
        """
        if reference is not None:
            self._check_shape("reference", reference)
        self.reference = reference

    @property
    def looking_ahead(self) -> list[int]:
        """The rows whose policies look ahead."""
        groups = [group for group in self._groups if "ahead" in group.runner.traits.requires]
        return sorted(row for group in groups for row in group.members)

    @property
    def later_rows(self) -> list[int]:
        """The batch row of each later block with a state, in the order of their logits."""
        return [] if self._later is None else list(self._later.rows)

    def forget_later(self, rows: Sequence[int]) -> None:
        """Drop the later blocks of these rows, whose texts have ended."""
        if self._later is not None:
            gone = set(rows)
            ended = {at for at, row in enumerate(self._later.rows) if row in gone}
            self._later = self._later.without(ended)

    @classmethod
    def gather(cls, rows: Sequence[tuple[BlockBatch, int]]) -> BlockBatch:
        """A batch of these rows, each given as (batch, index), in this order.

        The batches are of one decode: block length, mask token, device, `observe` and `on_error`
        are the same. All rows of one batch, in its own order, give that batch itself; otherwise the
        new batch shares no tensors with the old ones. At least one row is required, since the new
        batch takes its settings from the old ones.
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
            generators=generators_or_none(
                [None if batch.generators is None else batch.generators[row] for batch, row in rows]
            ),
            sampling=RowSampling.joined([b.sampling for b in batches], counts, wanted),
            on_error=some.on_error,
            observe=some.observe,
        )
        if any(batch.reference is not None for batch in batches):
            # The values in rows without a reference are never read.
            gathered.reference = joined(
                [b.tokens if b.reference is None else b.reference for b in batches]
            )
        places = {id(batch): batch._groups.places() for batch in batches}
        origins = [places[id(batch)][row] for batch, row in rows]
        kinds = [group.runner.kind for group, _ in origins]
        for members in gathered._groups.by_kind(kinds, gathered.generators):
            joining = [origins[at] for at in members]
            gathered._groups.add(members, *joined_state(joining, index, some.on_error))
        gathered._groups.index()
        gathered._later = LaterBlocks.gathered(rows)
        return gathered

    @classmethod
    def resume(
        cls,
        groups: Sequence[tuple[list[int], Runner, State]],
        columns: Sequence[State] = (),
        **fields_: Any,
    ) -> BlockBatch:
        """A batch in the middle of its decode, created from its fields. groups: for each kind of
        policy, its rows, its runner and its state. columns: their row options (see `Group`).
        """
        policies = fields_.pop("policies", None)
        if policies is None:
            by_row = {row: runner.policy for rows, runner, _ in groups for row in rows}
            policies = [by_row[row] for row in range(len(by_row))]
        batch = cls(**fields_, policies=policies)
        for (members, runner, state), known in zip_longest(groups, columns):
            batch._groups.add(members, runner, state, known)
        batch._groups.index()
        return batch

    @property
    def states(self) -> list[dict[str, Tensor]]:
        """The state of each policy, in the order of the groups."""
        return [group.state for group in self._groups]

    @property
    def fallback(self) -> Tensor | None:
        """(B,) bool: see `Groups.fallback`."""
        return self._groups.fallback()

    @property
    def requires(self) -> frozenset[str]:
        """Union of the statistics that the policies require and that are observed."""
        return self._groups.requires

    @property
    def reads_committed(self) -> bool:
        """Whether a step also reads logits of committed positions."""
        return self._groups.whole_rows is not None

    def needed(self) -> Tensor:
        """bool (B, L): the positions whose logits the next step reads.

        These are the masked ones; for policies that require "committed", all positions of a block
        with masks.
        """
        if self._groups.whole_rows is None:
            return self.masked
        return self.masked | (self._groups.whole_rows & self.masked.any(-1, True) & self.present)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and drop the others; the list may be empty."""
        kept = BlockBatch._gathered([self], [(self, row) for row in rows])
        for each in fields(self):
            setattr(self, each.name, getattr(kept, each.name))

    def carried(self, row: int) -> dict[str, Tensor]:
        """The state tensors that the row's policy `carries` to its next block, each (1, ...), for
        an engine that begins every block with `start` (see `carry`).
        """
        found = self._groups.places().get(row)
        return {} if found is None else found[0].carried(found[1])

    def carry(self, carried: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore the state of earlier blocks: for each row the result of `carried`, or an empty
        dict.
        """
        for group in self._groups:
            group.carry(carried)

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
        "raise"; otherwise its moving rows continue with its progress rule.
        """
        if (
            self.reference is not None
            and reference is None
            and "reference" in self._groups.requires
        ):
            raise ValueError(
                "reference=None: rows that have a reference need that of the next block"
            )
        begun, self._later = begin_next(self._groups, self._later, set(rows), tokens, self.on_error)
        present = torch.ones_like(tokens, dtype=torch.bool) if present is None else present
        index = upload(rows, self.tokens.device)
        self.renew(IndexedRows(index), tokens, present, begun.fresh, reference=reference)
        for group, places, runner in begun.failed:
            self._groups.replace(group, places, runner)
        if begun.failed:
            self._groups.index()

    def renew(
        self,
        rows: Rows,
        tokens: Tensor,
        present: Tensor,
        states: Iterable[tuple[Group, Rows, Mapping[str, Tensor]]],
        *,
        reference: Tensor | None = None,
    ) -> None:
        """Begin the next block in these rows, given on the host or only on the device.

        tokens, present, reference (..., L): in the form that `rows.put` takes; reference None:
        unchanged. states: groups, the moving rows of each group, and the state with which they
        begin.
        """
        self.set_tokens(rows.put(self.tokens, tokens), rows.put(self.present, present))
        following = rows.take(self.block_index) + 1
        self.block_index = rows.put(self.block_index, following)
        self.step_index = rows.put(self.step_index, torch.zeros_like(following))
        if reference is not None:
            before = self.tokens if self.reference is None else self.reference
            self.reference = rows.put(before, reference)
        for group, members, fresh in states:
            group.renew(members, fresh)

    def _check_shape(self, name: str, values: Tensor) -> None:
        if values.shape != self.tokens.shape:
            raise ValueError(
                f"{name} {tuple(values.shape)}: expected the blocks' {tuple(self.tokens.shape)}"
            )


def masked_positions(tokens: Tensor, mask_token_id: int, present: Tensor) -> Tensor:
    """bool, of the shape of tokens: the positions to be decoded. Absent positions are never masked,
    whatever their token.
    """
    return (tokens == mask_token_id) & present
