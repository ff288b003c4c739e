"""The forward pass of block-causal models: a block sees itself and the blocks before it.

What a finished block computes depends on nothing behind it, so its keys and values are final, and a
cache of them is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2pd_adapters.huggingface.caching import CanvasCache
from l2pd_adapters.huggingface.forward import CanvasView, Forward


class BlockCausalForward(Forward):
    """Forward passes of one decode.

    "none": everything up to each row's block, at every step. "block": the block alone, over the
    cached keys and values of the blocks before it. These are written once, by the first step of the
    next block, which brings the finished block along (SGLang spends a forward pass of its own on
    them); the first step of all brings the prompt.

    Everything is laid out by position, not by column: rows that are padded on the left have their
    block borders in the same places, and one mask fits all.
    """

    def hidden(self, view: CanvasView) -> tuple[Tensor, list[int]]:
        """Hidden states (R, L, D) of each row's block, and where in it the block starts: at 0."""
        rows = list(range(len(view.starts)))
        blocks = [start - first for start, first in zip(view.starts, view.first, strict=True)]
        if self.kind == "none":
            return self._forward(view, rows, blocks, [0] * len(rows)), [0] * len(rows)
        if self.cache is None:
            width = view.tokens.shape[1] - min(view.first)
            self.cache = CanvasCache(self.model.config.num_hidden_layers, len(rows), width)
            return self._forward(view, rows, blocks, [0] * len(rows)), [0] * len(rows)
        found: Tensor | None = None
        for fresh, brought in ((False, 0), (True, view.block_length)):
            members = [row for row in rows if view.fresh[row] is fresh]
            if not members:
                continue
            at = [blocks[row] for row in members]
            hidden = self._forward(view, members, at, [start - brought for start in at])
            if len(members) == len(rows):
                return hidden, [0] * len(rows)
            if found is None:
                found = hidden.new_empty(len(rows), *hidden.shape[1:])
            found[torch.tensor(members, device=hidden.device)] = hidden
        assert found is not None
        return found, [0] * len(rows)

    def _forward(
        self, view: CanvasView, rows: list[int], blocks: list[int], begins: list[int]
    ) -> Tensor:
        """Hidden states (r, L, D) of the blocks of these rows, whose positions from `begins` up to
        the end of the block take part; `blocks` holds the first position of each block."""
        device, length = view.tokens.device, view.block_length
        brought = max(block + length - begin for block, begin in zip(blocks, begins, strict=True))
        layout = torch.tensor([rows, blocks, begins, [view.first[row] for row in rows]])
        index, block, begin, first = layout.to(device).unsqueeze(-1).unbind()
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
        hidden = self._decoder(
            view.tokens[index, columns], self._mask(positions, seen, length), positions
        )
        at = block - begin + torch.arange(length, device=device)
        return hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def _mask(self, positions: Tensor, seen: int, length: int) -> Tensor:
        """(r, 1, T, seen): which keys each of the positions (r, T) sees, as the attention wants it:
        bool for sdpa, added to the scores for eager."""
        keys = torch.arange(seen, device=positions.device) // length
        visible = (keys <= (positions // length).unsqueeze(-1)).unsqueeze(1)
        if self.model.config._attn_implementation != "eager":
            return visible
        dtype = self.model.dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
