"""Keys and values of canvases whose batch rows are in different blocks.

A dynamic cache grows at its end. Here a whole canvas is written at the start of a block, and then
some of its columns, different ones in each row, are overwritten repeatedly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from l2pd_plugins.upload import upload


class CanvasLayer(CacheLayerMixin):
    """One layer's keys and values: (R, heads, W + 1, head_dim).

    The last column is a dummy: rows whose span is shorter than the longest write there, and it is
    never read.
    """

    def __init__(self, cache: CanvasCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, once the number of heads and the dtype are known."""
        shape = (self.cache.rows, key_states.shape[1], self.cache.width + 1, key_states.shape[3])
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; return those to which the attention attends."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        left, right = self.cache.span
        # Layers of one model may be on several devices.
        rows, columns = self.cache.index, self.cache.columns
        rows = None if rows is None else rows.to(key_states.device)
        columns = None if columns is None else columns.to(key_states.device)
        if columns is None:
            for stored, new in ((self.keys, key_states), (self.values, value_states)):
                if rows is None:
                    stored[:, :, left:right] = new
                else:
                    stored[:, :, left:right].index_copy_(0, rows, new)
            return key_states, value_states
        if rows is None:
            columns = columns[:, None, :, None].expand_as(key_states)
            self.keys.scatter_(2, columns, key_states)
            self.values.scatter_(2, columns, value_states)
            return self.keys[:, :, left:right], self.values[:, :, left:right]
        found = []
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored[rows.unsqueeze(-1), :, columns] = new.transpose(1, 2)
            found.append(stored[:, :, left:right].index_select(0, rows))
        return found[0], found[1]

    def keep(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys = self.keys.index_select(0, rows)
            self.values = self.values.index_select(0, rows)

    def get_seq_length(self) -> int:
        """0: the caller passes position ids, so the cache need not count."""
        return 0

    def get_max_length(self) -> int:
        """Columns that the cache holds."""
        return self.cache.width

    get_max_cache_shape = get_max_length  # its name in transformers 5.11

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys to which the attention attends, and their offset."""
        left, right = self.cache.span
        return right - left, 0


class CanvasCache(Cache):
    """The cache of R rows of W columns; call `write_all` or `write_some` before each forward
    pass.
    """

    def __init__(self, layers: int, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        self.span = (0, width)
        self.index: Tensor | None = None
        self.columns: Tensor | None = None
        super().__init__(layers=[CanvasLayer(self) for _ in range(layers)])

    def write_all(self, span: tuple[int, int], rows: Tensor | None) -> None:
        """The next forward pass computes every column of the span, for these rows (None: all)."""
        self.span, self.index, self.columns = span, rows, None

    def write_some(
        self, span: tuple[int, int], columns: Tensor, rows: Tensor | None = None
    ) -> None:
        """The next forward pass computes `columns` (R, T) of these rows (None: all) and attends to
        the whole span.
        """
        self.span, self.index, self.columns = span, rows, columns

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Keep these rows, in this order."""
        index = upload(rows, device)
        self.rows = len(rows)
        for layer in self.layers:
            assert isinstance(layer, CanvasLayer)
            layer.keep(index)
