"""The interface of forward passes: their input and their output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.families import CacheKind, ModelFamily
from l2pd_adapters.huggingface.cache_names import cache_argument
from l2pd_adapters.huggingface.forward.kv_cache import CanvasCache
from l2pd_adapters.huggingface.forward.model_parts import parts_of
from l2pd_plugins.upload import upload

LOOKING_AHEAD: tuple[CacheKind, ...] = ("none", "prefix")
"""The cache choices with which every position after a block is computed at every step."""


@dataclass
class CanvasView:
    """R prompts with their canvases, W columns, and the current block of each batch row."""

    tokens: Tensor
    """(R, W) int64."""
    attention: Tensor
    """(R, W) int64: attention mask, 1 for columns that may be attended to."""
    position_ids: Tensor
    """(R, W) int64."""
    starts: list[int]
    """First column of each row's block."""
    first: list[int]
    """First column to which each row attends."""
    last: list[int]
    """One past the last column to which each row attends."""
    fresh: list[bool]
    """Whether each row is at the first step of its block."""
    block_length: int
    blocks: int = 1
    """Number of blocks needed of each row: its own, and later ones."""

    @property
    def span(self) -> tuple[int, int]:
        """The columns to which at least one row attends."""
        return min(self.first), max(self.last)

    @property
    def everything(self) -> bool:
        """Whether every row attends to all columns of the span."""
        left, right = self.span
        return min(self.last) == right and max(self.first) == left

    def behind(self, row: int) -> int:
        """Number of columns to which a row attends from its block on; at least the block's own."""
        return max(self.block_length, self.last[row] - self.starts[row])

    @property
    def wanted(self) -> int:
        """Number of positions needed of each row."""
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


class Forward(ABC):
    """The forward passes of one decode, with the state that they keep between steps."""

    def __init__(self, model: Any, family: ModelFamily, cache: CacheKind) -> None:
        self.model, self.family, self.kind = model, family, cache
        self.decoder, self.head = parts_of(model, family)
        self.cache: CanvasCache | None = None
        self._cache_argument = cache_argument(type(self.decoder))

    @abstractmethod
    def hidden(self, view: CanvasView) -> Tensor:
        """Hidden states that predict each row's block, and the later blocks that are needed: (R,
        blocks * L, D).
        """

    def keep(self, rows: list[int], device: torch.device) -> None:
        """Keep these rows, in this order."""
        if self.cache is not None:
            self.cache.keep(rows, device)

    def logits(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """Logits (N, V) of the rows `indices` ((N,) int64, flat over the first two dimensions)."""
        return self.head(hidden.flatten(0, 1).index_select(0, indices)).to(hidden.device)

    def _whole_decoder(self, tokens: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """Hidden states of every column of a pass, by the model's own forward."""
        cache = {} if self.cache is None else {self._cache_argument: self.cache}
        out = self.decoder(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=self.cache is not None,
            **cache,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden.to(tokens.device)  # the last layers of a model may be on another device
