"""Passing finished blocks and drafts of a sequence to a streamer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.huggingface.rows import Row
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import StepOutcome


class TextStream:
    """Feeds a streamer of transformers; does nothing without one.

    A streamer takes one sequence, so there is one row until it leaves.
    """

    def __init__(self, streamer: Any, max_new_tokens: int) -> None:
        self.streamer, self.max_new_tokens = streamer, max_new_tokens
        self.takes_drafts = hasattr(streamer, "put_draft")

    def prompt(self, input_ids: Tensor) -> None:
        """Pass the prompt (1, P), which a streamer may skip."""
        if self.streamer is not None:
            self.streamer.put(input_ids[0].cpu())

    def draft(self, row: Row, block: BlockBatch, outcome: StepOutcome) -> None:
        """Pass the current block, with predictions at masked positions."""
        if self.takes_drafts:
            draft = torch.where(block.masked, outcome.step.x0, block.tokens)
            room = self._end(row) - row.canvas_start
            self.streamer.put_draft(value=draft[0][block.present[0]][:room].cpu())

    def block(self, row: Row, tokens: Tensor, visible: int) -> None:
        """Pass the full block of a row with tokens (W,), of which `visible` are part of the
        text.
        """
        if self.streamer is not None:
            begin = row.canvas_start
            end = min(begin + visible, self._end(row))
            self.streamer.put(tokens[begin:end].cpu())

    def end(self) -> None:
        """Signal the end of the stream."""
        if self.streamer is not None:
            self.streamer.end()

    def _end(self, row: Row) -> int:
        """One past the last column of the answer."""
        return row.layout.begin + self.max_new_tokens
