"""The forward pass of block-causal models: a block attends to itself and the blocks before it.

A finished block's keys and values depend on nothing after it, so they are final, and caching them
is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2pd_adapters.huggingface.forward.base import CanvasView, Forward
from l2pd_adapters.huggingface.forward.kv_cache import CanvasCache
from l2pd_plugins.upload import upload


class BlockCausalForward(Forward):
    """The forward passes of one decode.

    "none" computes everything up to each row's block, at every step. "block" computes only the
    block, with cached keys and values of the blocks before it. These are written once, in the first
    step of the next block, which also computes the finished block (SGLang uses a separate forward
    pass for this); the very first step computes the prompt.

    Tensors are indexed by position and not by column, so that the block boundaries of rows with
    different left padding are at the same indices.
    """

    def hidden(self, view: CanvasView) -> Tensor:
        """Hidden states (R, L, D) of each row's block."""
        rows = list(range(len(view.starts)))
        blocks = [start - first for start, first in zip(view.starts, view.first, strict=True)]
        if self.cache is None:  # without a cache, or at the very first step
            groups, begins = [rows], [0] * len(rows)
            if self.kind == "block":
                width = view.tokens.shape[1] - min(view.first)
                self.cache = CanvasCache(self.model.config.num_hidden_layers, len(rows), width)
        else:
            in_midst = [row for row in rows if not view.fresh[row]]
            groups = [in_midst, [row for row in rows if view.fresh[row]]]
            begins = [
                block - view.block_length if fresh else block
                for block, fresh in zip(blocks, view.fresh, strict=True)
            ]
        parts = [
            self._forward(
                view, group, [blocks[row] for row in group], [begins[row] for row in group]
            )
            for group in groups
            if group
        ]
        if len(parts) == 1:
            return parts[0]
        order = [row for group in groups for row in group]
        back = upload(sorted(rows, key=order.__getitem__), view.tokens.device)
        return torch.cat(parts).index_select(0, back)

    def _forward(
        self, view: CanvasView, rows: list[int], blocks: list[int], begins: list[int]
    ) -> Tensor:
        """Hidden states (r, L, D) of the blocks of these rows; computes the positions from `begins`
        to the end of the block. `blocks` has the first position of each block.
        """
        device, length = view.tokens.device, view.block_length
        brought = max(block + length - begin for block, begin in zip(blocks, begins, strict=True))
        layout = upload([*rows, *blocks, *begins, *(view.first[row] for row in rows)], device)
        index, block, begin, first = layout.view(4, -1, 1).unbind()
        positions = begin + torch.arange(brought, device=device)
        inside = positions < block + length
        columns = (first + positions).clamp(max=view.tokens.shape[1] - 1)
        seen = max(blocks) + length
        if self.cache is None:
            seen = brought
        else:
            everyone = len(rows) == self.cache.rows
            self.cache.write_some(
                (0, seen),
                torch.where(inside, positions, self.cache.width),
                None if everyone else index.squeeze(-1),
            )
        hidden = self._whole_decoder(
            view.tokens[index, columns],
            self._mask(positions, seen, length),
            positions + self.family.first_position,
        )
        at = block - begin + torch.arange(length, device=device)
        return hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def _mask(self, positions: Tensor, seen: int, length: int) -> Tensor:
        """(r, 1, T, seen): the keys to which each of the positions (r, T) attends, in the form of
        the attention implementation: bool for sdpa, additive for eager.
        """
        keys = torch.arange(seen, device=positions.device) // length
        visible = (keys <= (positions // length).unsqueeze(-1)).unsqueeze(1)
        if self.model.config._attn_implementation != "eager":
            return visible
        dtype = self.model.dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
