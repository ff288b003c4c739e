"""The forward pass of bidirectional models: every position attends to the whole canvas."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l2pd_adapters.families import CacheKind, ModelFamily
from l2pd_adapters.huggingface.forward.base import CanvasView, Forward
from l2pd_adapters.huggingface.forward.kv_cache import CanvasCache
from l2pd_adapters.huggingface.forward.layers import Layers, columns_of
from l2pd_adapters.huggingface.forward.pass_groups import CPU_LIMIT, share_passes
from l2pd_plugins.upload import upload


class BidirectionalForward(Forward):
    """The forward passes of one decode, with the state that they keep between steps.

    "none" computes the whole canvas at every step. "prefix" (Fast-dLLM, arXiv 2505.22618) computes
    the whole canvas at the first step of a block, and then all columns from the block on, with
    cached keys and values of the columns before it. "dual" then computes only the block, with
    cached keys and values of the columns before and after it. When a batch row's cache is renewed
    depends only on its own block. If logits are shifted, the columns before the block that predict
    it are computed with it.
    """

    def __init__(self, model: Any, family: ModelFamily, cache: CacheKind) -> None:
        super().__init__(model, family, cache)
        self.layers = Layers.of(self.decoder)
        self._positions: tuple[Any, Any, Any] = (None, None, None)
        """The last arguments of `_position_ids`, and its result."""

    def hidden(self, view: CanvasView) -> Tensor:
        """Hidden states that predict each row's block, and the later blocks that are needed: (R,
        blocks * L, D). Values at columns to which the row does not attend are undefined. With the
        dual cache only the block itself is computed, so no later block may be needed.
        """
        rows, width = view.tokens.shape
        if self.kind != "none" and self.cache is None:
            layers = self.model.config.num_hidden_layers
            self.cache = CanvasCache(layers, rows, width)
        fresh = [row for row, at_start in enumerate(view.fresh) if at_start or self.cache is None]
        first, last = ([ends[row] for row in fresh] for ends in (view.first, view.last))
        passes = [(self._dense, group) for group in _shared(fresh, first, last, view)]
        if len(fresh) < rows:
            groups = self._partial_groups(view, fresh)
            passes = [(self._partial, group) for group in groups] + passes
        found: Tensor | None = None
        for forward, members in passes:
            if len(members) == rows:
                found = forward(view, None)
                continue
            index = upload(members, view.tokens.device)
            of_group = forward(view.select(members), index)
            if found is None:
                found = of_group.new_zeros(rows, *of_group.shape[1:])
            found = found.index_copy(0, index, of_group)
        assert found is not None
        return found

    def _partial_groups(self, view: CanvasView, fresh: list[int]) -> list[list[int]]:
        """Groups of rows that share a pass over the columns that are not cached. They may include
        rows of `fresh`, since the dense passes of those come afterwards.
        """
        rows = range(len(view.starts))
        if self.kind == "dual":
            # All rows in one pass: a block is narrow, and copying the keys and values of some rows
            # out of the cache would cost more.
            return [list(rows)]
        in_midst = sorted(set(rows) - set(fresh))
        return _shared(in_midst, [0] * len(in_midst), [view.behind(row) for row in in_midst], view)

    def _dense(self, view: CanvasView, rows: Tensor | None) -> Tensor:
        """Hidden states of the blocks, from a pass over all columns to which they attend: (R, L,
        D). `rows` are the cache's rows of the view; None for all.
        """
        left, right = view.span
        if self.cache is not None:
            self.cache.write_all((left, right), rows)
        mask = None if view.everything else view.attention[:, left:right]
        begin = view.starts[0] - self.family.logit_shift - left
        end = begin + view.wanted
        wanted: slice | Tensor = slice(begin, end)
        if end > right - left or any(start != view.starts[0] for start in view.starts):
            wanted = (self._block_columns(view, view.wanted) - left).clamp(max=right - left - 1)
        return self._decoder(
            view.tokens[:, left:right], mask, self._position_ids(view, left, right), wanted
        )

    def _position_ids(self, view: CanvasView, left: int, right: int) -> Tensor:
        """(R, right - left) int64: position ids; the same tensor object while nothing changes."""
        whole, span, ids = self._positions
        if whole is not view.position_ids or span != (left, right):
            ids = view.position_ids[:, left:right] + self.family.first_position
            self._positions = view.position_ids, (left, right), ids
        return ids

    def _partial(self, view: CanvasView, rows: Tensor | None) -> Tensor:
        """Hidden states of the blocks, from a pass over the columns that are not cached: (R, L, D).
        `rows` as in `_dense`.
        """
        assert self.cache is not None
        width = view.tokens.shape[1]
        columns_wanted = view.block_length
        if self.kind == "prefix":
            columns_wanted = max(view.behind(row) for row in range(len(view.starts)))
        columns = self._block_columns(view, columns_wanted + self.family.logit_shift)
        inside = columns.clamp(max=width - 1)
        ends = upload(view.last, columns.device).unsqueeze(-1)
        self.cache.write_some(view.span, torch.where(columns < ends, columns, width), rows)
        left, right = view.span
        hidden = self._decoder(
            view.tokens.gather(1, inside),
            None if view.everything else view.attention[:, left:right],
            view.position_ids.gather(1, inside) + self.family.first_position,
            slice(0, view.wanted),
        )
        missing = view.wanted - hidden.shape[1]
        return F.pad(hidden, (0, 0, 0, missing)) if missing else hidden

    def _block_columns(self, view: CanvasView, count: int) -> Tensor:
        """(R, count) columns, starting with the one that predicts the first position of each row's
        block.
        """
        device = view.tokens.device
        begin = upload(view.starts, device).unsqueeze(-1) - self.family.logit_shift
        return begin + torch.arange(count, device=device)

    def _decoder(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        position_ids: Tensor,
        wanted: slice | Tensor = slice(None),
    ) -> Tensor:
        """Hidden states of the needed columns of a pass, see `Layers`; mask None: every column
        attends to all columns.
        """
        if self.layers is None:
            return columns_of(self._whole_decoder(tokens, mask, position_ids), wanted)
        # inference_mode avoids the overhead that no_grad still has for autograd. Only the model's
        # own modules use these tensors; the head's result is an ordinary tensor.
        with torch.inference_mode():
            if mask is None:
                return self.layers(tokens, position_ids, wanted, self.cache)
            return columns_of(self._whole_decoder(tokens, mask, position_ids), wanted)


def _shared(
    rows: list[int], first: list[int], last: list[int], view: CanvasView
) -> list[list[int]]:
    """Groups of these rows; the i-th computes the columns [first[i], last[i])."""
    limit = CPU_LIMIT if view.tokens.device.type == "cpu" else None
    return [[rows[i] for i in group] for group in share_passes(first, last, limit)]
