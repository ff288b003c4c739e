"""The sequences that are still being decoded: their state on the host, and their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins.block_layout import BlockLayout
from l2pd_plugins.upload import upload


@dataclass
class Row:
    """A live sequence. Columns are those of the whole batch, including the padding on the left."""

    sequence: int
    """Index of the sequence in the caller's batch."""
    layout: BlockLayout
    """In columns."""
    first: int
    """First column to which it attends."""
    last: int = field(init=False)
    """One past the last column to which it attends."""
    block: int = 0
    """Index of its current block."""
    fresh: bool = True
    """Whether it is at the first step of its block."""
    ended: bool = False
    """Whether its text has ended: no block follows the current one."""
    masked: list[bool] = field(init=False)
    """The masked positions of its block; a host copy."""
    needed: list[bool] = field(init=False)
    """Positions of its block whose logits the next step reads; a host copy."""
    ahead: int = 0
    """Number of positions of later blocks that its policy has seen, over all steps."""

    def __post_init__(self) -> None:
        self.last = self.layout.end
        self.masked = self.needed = self.present

    @property
    def start(self) -> int:
        """First column of its block."""
        return self.layout.start_of(self.block)

    @property
    def canvas_start(self) -> int:
        """First column of its block after the prompt."""
        return self.layout.canvas_start_of(self.block)

    @property
    def present(self) -> list[bool]:
        """Which positions of its block belong to the canvas."""
        return self.layout.present_in(self.block)

    @property
    def is_last_block(self) -> bool:
        """Whether no block follows."""
        return self.ended or self.layout.start_of(self.block + 1) >= self.layout.end

    def begin_next_block(self) -> None:
        """Move to the first step of the next block, with all of its positions masked."""
        self.block += 1
        self.fresh = True
        self.masked = self.needed = self.present


@dataclass
class RowTensors:
    """Prompts and canvases of the R live rows, W columns each, on the device."""

    tokens: Tensor
    """(R, W) int64."""
    attention: Tensor
    """(R, W) int64: attention mask, 1 for columns that may be attended to."""
    position_ids: Tensor
    """(R, W) int64."""
    sequences: Tensor
    """(R,) int64, `Row.sequence`."""
    begins: Tensor
    """(R, 1) int64, first column of the canvas."""
    ends: Tensor
    """(R, 1) int64, one past the last column of the canvas."""
    columns: Tensor
    """(R, L) int64, the columns of the block."""

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor, rows: Sequence[Row], mask_token_id: int
    ) -> RowTensors:
        """Prompts (B, P) and their fully masked canvases. Canvases are rounded up to whole blocks,
        so that a last block that extends beyond its canvas has columns.
        """
        batch, prompt = input_ids.shape
        device = input_ids.device
        layouts = [row.layout for row in rows]
        width = max(layout.whole_end for layout in layouts)
        tokens = torch.full((batch, width), mask_token_id, device=device)
        tokens[:, :prompt] = input_ids
        attention = torch.ones(batch, width, dtype=torch.int64, device=device)
        attention[:, :prompt] = attention_mask
        edges = torch.tensor(
            [(layout.begin, layout.end, layout.origin) for layout in layouts], device=device
        )
        begins, ends, origins = edges.split(1, dim=1)
        return cls(
            tokens=tokens,
            attention=attention,
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
            sequences=torch.arange(batch, device=device),
            begins=begins,
            ends=ends,
            columns=origins + torch.arange(layouts[0].block_length, device=device),
        )

    def present(self, columns: Tensor, at: Tensor | slice) -> Tensor:
        """bool (N, L): which of the columns (N, L) belong to the canvases of the rows `at`."""
        return (columns >= self.begins[at]) & (columns < self.ends[at])

    def keep(self, index: Tensor) -> None:
        """Keep the rows of this index (K,), in this order."""
        keep_rows(self, index)


def keep_rows(tensors: Any, index: Tensor) -> None:
    """Keep these rows of a dataclass whose fields are all tensors with one entry per row."""
    for each in fields(tensors):
        setattr(tensors, each.name, getattr(tensors, each.name).index_select(0, index))


@dataclass(frozen=True)
class LaterColumns:
    """The columns of the N later blocks of R rows, for policies that look ahead; M of their
    positions are inside the canvases.
    """

    blocks: int
    """Number of blocks of each row whose hidden states are needed, including the row's current
    one.
    """
    in_view: Tensor
    """(M,) int64, places in hidden states (R, blocks * L)."""
    in_blocks: Tensor
    """(M,) int64, the same places in (N, L)."""
    counts: list[int]
    """Number of the M positions of each of the R rows."""

    @classmethod
    def of(cls, owners: Sequence[int], rows: Sequence[Row], device: torch.device) -> LaterColumns:
        """owners: the row of each later block; for one row, the nearest block comes first."""
        length = rows[0].layout.block_length
        distance: list[int] = []
        behind = [0] * len(rows)
        for row in owners:
            behind[row] += 1
            distance.append(behind[row])
        blocks = 1 + max(behind)
        row_of, nth = np.array(owners), np.array(distance)
        offset = nth[:, None] * length + np.arange(length)
        room = np.array([row.layout.end - row.start for row in rows])[row_of]
        inside = (offset < room[:, None]).ravel()
        in_view = (row_of[:, None] * blocks * length + offset).ravel()[inside]
        in_blocks = np.flatnonzero(inside)
        counts = np.bincount(row_of[in_blocks // length], minlength=len(rows))
        return cls(blocks, upload(in_view, device), upload(in_blocks, device), counts.tolist())
