"""The forward pass: hidden states of each row's block, and logits of the rows that are needed.

Here are the bidirectional models; `block_causal` has the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from l2pd_adapters.families import Attention, ModelFamily
from l2pd_adapters.huggingface.forward.kv_cache import CanvasCache
from l2pd_adapters.huggingface.forward.layers import Layers, columns_of
from l2pd_adapters.huggingface.forward.model_parts import parts_of
from l2pd_adapters.huggingface.forward.pass_groups import CPU_LIMIT, share_passes
from l2pd_plugins.uploading import upload

CacheKind = Literal["none", "prefix", "dual", "block"]
CACHES: dict[Attention, tuple[CacheKind, ...]] = {
    "bidirectional": ("none", "prefix", "dual"),
    "block_causal": ("block", "none"),
}
"""The choices of each family, its default first."""
LOOKING_AHEAD: tuple[CacheKind, ...] = ("none", "prefix")
"""The choices of bidirectional models that compute every position behind a block at every step."""


@dataclass
class CanvasView:
    """R prompts with their canvases, W columns, and where each row stands."""

    tokens: Tensor
    """(R, W) int64."""
    attention: Tensor
    """(R, W) int64, 1 where a column may be seen."""
    position_ids: Tensor
    """(R, W) int64."""
    starts: list[int]
    """First column of each row's block."""
    first: list[int]
    """First column that each row sees."""
    last: list[int]
    """One past the last column that each row sees."""
    fresh: list[bool]
    """Whether each row is at the first step of its block."""
    block_length: int
    blocks: int = 1
    """How many blocks are wanted of each row: its own, and those behind it."""

    @property
    def span(self) -> tuple[int, int]:
        """The columns that any row sees."""
        return min(self.first), max(self.last)

    @property
    def everything(self) -> bool:
        """Whether every row sees all columns of the span."""
        left, right = self.span
        return min(self.last) == right and max(self.first) == left

    def behind(self, row: int) -> int:
        """Columns that a row sees from its block on, the block's own at least."""
        return max(self.block_length, self.last[row] - self.starts[row])

    @property
    def wanted(self) -> int:
        """Positions that are wanted of each row."""
        return self.blocks * self.block_length

    def select(self, rows: list[int]) -> CanvasView:
        """The same view of some of its rows."""
        index = upload(rows, self.tokens.device)
        return CanvasView(
            tokens=self.tokens.index_select(0, index),
            attention=self.attention.index_select(0, index),
            position_ids=self.position_ids.index_select(0, index),
            starts=[self.starts[row] for row in rows],
            first=[self.first[row] for row in rows],
            last=[self.last[row] for row in rows],
            fresh=[self.fresh[row] for row in rows],
            block_length=self.block_length,
            blocks=self.blocks,
        )


class Forward:
    """Forward passes of one decode, with what they remember between steps.

    "none": the whole canvas at every step. "prefix" (Fast-dLLM, arXiv 2505.22618): the
    whole canvas at the first step of a block, then everything from the block on, over the cached
    keys and values of what is before it. "dual": then the block alone, over the cached ones of
    what is before and behind it. A row's refresh depends on its own block only. Where logits are
    shifted, the columns before the block that predict it belong to it.
    """

    def __init__(self, model: Any, family: ModelFamily, cache: CacheKind) -> None:
        self.model, self.family, self.kind = model, family, cache
        self.decoder, self.head = parts_of(model, family)
        self.layers = Layers.of(self.decoder) if family.attention == "bidirectional" else None
        self._positions: tuple[Any, Any, Any] = (None, None, None)
        """What `_position_ids` was asked last, and its answer."""
        self.cache: CanvasCache | None = None

    def hidden(self, view: CanvasView) -> Tensor:
        """Hidden states that predict each row's block, and the blocks behind it that are wanted:
        (R, blocks * L, D). Those of columns that the row does not see mean nothing. With the dual
        cache only the block itself is computed, and nothing more can be wanted."""
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
        """The rows that share a pass over what the cache does not keep. Fresh ones may be among
        them, since their dense passes come after."""
        rows = range(len(view.starts))
        if self.kind == "dual":
            # All rows: a block is narrow, and moving the keys and values of some of them out of
            # the cache would cost more.
            return [list(rows)]
        in_midst = sorted(set(rows) - set(fresh))
        return _shared(in_midst, [0] * len(in_midst), [view.behind(row) for row in in_midst], view)

    def keep(self, rows: list[int], device: torch.device) -> None:
        """Keep these rows, in this order."""
        if self.cache is not None:
            self.cache.keep(rows, device)

    def logits(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """Logits (N, V) of the rows `indices` ((N,) int64, flat over the first two dimensions)."""
        return self.head(hidden.flatten(0, 1).index_select(0, indices)).to(hidden.device)

    def _dense(self, view: CanvasView, rows: Tensor | None) -> Tensor:
        """The blocks of a pass over every column that they see: (R, L, D). `rows` says which rows
        of the cache the view's are; None for all."""
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
        """(R, right - left) int64, as the model counts; the same tensor while nothing changes."""
        whole, span, ids = self._positions
        if whole is not view.position_ids or span != (left, right):
            ids = view.position_ids[:, left:right] + self.family.first_position
            self._positions = view.position_ids, (left, right), ids
        return ids

    def _partial(self, view: CanvasView, rows: Tensor | None) -> Tensor:
        """The blocks of a pass over the columns that the cache does not keep: (R, L, D). `rows` as
        in `_dense`."""
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
        """(R, count) columns from the one on that predicts the first position of each row's
        block."""
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
        """Hidden states of the wanted columns of a pass, see `Layers`; mask None: every column
        sees all that there is."""
        if self.layers is None:
            return columns_of(self._whole_decoder(tokens, mask, position_ids), wanted)
        # Nothing but the model's own modules sees what is made here, so it needs none of what
        # no_grad still prepares for autograd. What the head makes of it is an ordinary tensor.
        with torch.inference_mode():
            if mask is None:
                return self.layers(tokens, position_ids, wanted, self.cache)
            return columns_of(self._whole_decoder(tokens, mask, position_ids), wanted)

    def _whole_decoder(self, tokens: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        cache = {} if self.cache is None else {"past_key_values": self.cache}
        out = self.decoder(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=self.cache is not None,
            **cache,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden.to(tokens.device)  # a model on several devices ends on another one


def _shared(
    rows: list[int], first: list[int], last: list[int], view: CanvasView
) -> list[list[int]]:
    """Groups of these rows, of which the i-th brings the columns [first[i], last[i])."""
    limit = CPU_LIMIT if view.tokens.device.type == "cpu" else None
    return [[rows[i] for i in group] for group in share_passes(first, last, limit)]
