"""The forward pass: hidden states of each row's block, and logits of the rows that are needed.

Here are the bidirectional models; `block_causal` has the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from l2pd_adapters.families import Attention
from l2pd_adapters.huggingface.caching import CanvasCache

CacheKind = Literal["none", "prefix", "dual", "block"]
CACHES: dict[Attention, tuple[CacheKind, ...]] = {
    "bidirectional": ("none", "prefix", "dual"),
    "block_causal": ("block", "none"),
}
"""The choices of each family, its default first."""


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

    @property
    def span(self) -> tuple[int, int]:
        """The columns that any row sees."""
        return min(self.first), max(self.last)


class Forward:
    """Forward passes of one decode, with what they remember between steps.

    "none": the whole canvas at every step. "prefix" (Fast-dLLM, arXiv 2505.22618, section 3.2): the
    whole canvas at the first step of a block, then everything from the block on, over the cached
    keys and values of what is before it. "dual": then the block alone, over the cached ones of
    what is before and behind it. A row's refresh depends on its own block only.
    """

    def __init__(self, model: Any, cache: CacheKind) -> None:
        self.model, self.kind = model, cache
        self.cache: CanvasCache | None = None

    def hidden(self, view: CanvasView) -> tuple[Tensor, list[int]]:
        """Hidden states (R, S, D), and the index in S at which each row's block starts."""
        left, right = view.span
        if self.kind == "none":
            hidden = self._dense(view, None)
            return hidden, [start - left for start in view.starts]
        rows, width = view.tokens.shape
        if self.cache is None:
            layers = self.model.config.num_hidden_layers
            self.cache = CanvasCache(layers, rows, width)
        fresh = [row for row, at_start in enumerate(view.fresh) if at_start]
        begin = torch.tensor(view.starts, device=view.tokens.device).unsqueeze(-1)
        block = begin + torch.arange(view.block_length, device=view.tokens.device)
        found: Tensor | None = None
        if len(fresh) < rows:
            # All rows take part, fresh ones too: what these compute is overwritten below, and
            # moving the other rows' keys and values out and in again would cost more.
            found = self._partial(view, begin)[:, : view.block_length]
        if fresh:
            index = torch.tensor(fresh, device=view.tokens.device)
            every = None if len(fresh) == rows else index
            self.cache.write_all((left, right), every)
            hidden = self._dense(view, every)
            if every is not None:
                block = block.index_select(0, every)
            at = (block - left).clamp(max=right - left - 1)
            of_block = hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            found = of_block if found is None else found.index_copy(0, index, of_block)
        assert found is not None
        return found, [0] * rows

    def keep(self, rows: list[int], device: torch.device) -> None:
        """Keep these rows, in this order."""
        if self.cache is not None:
            self.cache.keep(rows, device)

    def logits(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """Logits (N, V) of the rows `indices` ((N,) int64, flat over the first two dimensions).

        The language-model head of a vocabulary of 150,000 costs as much as many layers, so it never
        sees the rows that nobody asks about.
        """
        logits: Tensor = self.model.get_output_embeddings()(hidden.flatten(0, 1)[indices])
        return logits

    def _dense(self, view: CanvasView, rows: Tensor | None) -> Tensor:
        """Every column of the span, of these rows (None: of all)."""
        left, right = view.span
        everything = min(view.last) == right and max(view.first) == left
        tokens, attention, position_ids = (
            (tensor if rows is None else tensor.index_select(0, rows))[:, left:right]
            for tensor in (view.tokens, view.attention, view.position_ids)
        )
        return self._decoder(tokens, None if everything else attention, position_ids)

    def _partial(self, view: CanvasView, begin: Tensor) -> Tensor:
        """The columns that the cache does not keep, from each row's block on: (R, T, D)."""
        assert self.cache is not None
        width = view.tokens.shape[1]
        columns_wanted = view.block_length
        if self.kind == "prefix":
            spans = [last - start for last, start in zip(view.last, view.starts, strict=True)]
            columns_wanted = max(view.block_length, *spans)
        columns = begin + torch.arange(columns_wanted, device=begin.device)
        inside = columns.clamp(max=width - 1)
        ends = torch.tensor(view.last, device=begin.device).unsqueeze(-1)
        self.cache.write_some(view.span, torch.where(columns < ends, columns, width))
        left, right = view.span
        return self._decoder(
            view.tokens.gather(1, inside),
            view.attention[:, left:right],
            view.position_ids.gather(1, inside),
        )

    def _decoder(self, tokens: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        out = self.model.get_decoder()(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden
