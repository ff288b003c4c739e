"""The blocks after those that are being decoded, for policies that look ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from l2pd_plugins.policy_calls import OnError
from l2pd_plugins.policy_groups import Beginnings, Groups
from l2pd_plugins.upload import upload

if TYPE_CHECKING:
    from l2pd_plugins.blocks import BlockBatch


@dataclass
class LaterBlocks:
    """The later blocks of a batch's rows whose policies look ahead."""

    blocks: BlockBatch
    """N blocks that stay at their first step: they only fill the policies' states."""
    rows: list[int]
    """The batch row of each later block; for one row, the nearest block comes first."""

    @classmethod
    def behind(
        cls,
        batch: BlockBatch,
        rows: Sequence[int],
        tokens: Tensor,
        *,
        present: Tensor | None,
        reference: Tensor | None,
        on_error: OnError,
    ) -> LaterBlocks:
        """The later blocks of these rows; the arguments are those of `BlockBatch.look_ahead`."""
        device = batch.tokens.device
        distance: list[int] = []
        so_far: Counter[int] = Counter()
        for row in rows:
            so_far[row] += 1
            distance.append(so_far[row])
        index = upload(rows, device)
        blocks = batch.start(
            tokens,
            [batch.policies[row] for row in rows],
            mask_token_id=batch.mask_token_id,
            block_index=batch.block_index[index] + upload(distance, device),
            canvas_length=batch.canvas_length[index],
            present=present,
            reference=reference,
            generators=None if batch.generators is None else [batch.generators[r] for r in rows],
            on_error=on_error,
        )
        return cls(blocks, list(rows))

    @classmethod
    def gathered(cls, rows: Sequence[tuple[BlockBatch, int]]) -> LaterBlocks | None:
        """The later blocks of a batch that is gathered from these rows (see
        `BlockBatch.gather`).
        """
        found = [
            (row, (batch._later.blocks, at))
            for row, (batch, origin) in enumerate(rows)
            if batch._later is not None
            for at, owner in enumerate(batch._later.rows)
            if owner == origin
        ]
        if not found:
            return None
        owners, blocks = zip(*found, strict=True)
        return cls(blocks[0][0].gather(blocks), list(owners))

    def nearest(self, rows: Collection[int]) -> dict[int, int]:
        """For each of these batch rows that has a later block: the index of its nearest one in
        `rows`.
        """
        return {row: at for at, row in reversed([*enumerate(self.rows)]) if row in rows}

    def without(self, blocks: Collection[int]) -> LaterBlocks | None:
        """A copy without these blocks, given by their indices in `rows`; None if no block is
        left.
        """
        kept = [at for at in range(len(self.rows)) if at not in blocks]
        if not kept:
            return None
        gathered = self.blocks.gather([(self.blocks, at) for at in kept])
        return LaterBlocks(gathered, [self.rows[at] for at in kept])


def begin_next(
    groups: Groups,
    later: LaterBlocks | None,
    moving: set[int],
    tokens: Tensor,
    on_error: OnError,
) -> tuple[Beginnings, LaterBlocks | None]:
    """The states with which the moving rows begin blocks of the shape of `tokens`, and the later
    blocks without those that they reach. Raises what `Beginnings.of` does.
    """
    if later is None:
        return Beginnings.of(groups, moving, {}, tokens, on_error), None
    reached = later.nearest(moving)
    places = later.blocks._groups.places()
    kept = {row: places[at] for row, at in reached.items()}
    begun = Beginnings.of(groups, moving, kept, tokens, on_error)
    return begun, later.without(set(reached.values()))
