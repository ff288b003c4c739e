"""The log-probabilities of the tokens of each slot's block, recorded when they are committed.

A block is given out later than its tokens are committed, so they are kept in buffers with one row
for each of vLLM's slots. Nothing is allocated or computed before a request wants them, and nothing
is read back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from l2pd_adapters.request_sampling import MOST_TOP
from l2pd_plugins.denoising import StepOutcome
from l2pd_plugins.sampling import log_probabilities, ranks_of, top_log_probabilities
from l2pd_plugins.slots import SlotBatch
from l2pd_plugins.upload import upload


@dataclass
class Told:
    """Of B blocks of L positions."""

    log_probabilities: Tensor
    """(B, L, 1 + K) float32: of the token, and of the K most probable ones."""
    tokens: Tensor
    """(B, L, 1 + K) int64: their ids."""
    ranks: Tensor
    """(B, L) int64: the rank of the token, from 1."""


class LogProbabilities:
    """The log-probabilities of S slots with blocks of L positions."""

    def __init__(self, slots: int, block_length: int, device: torch.device) -> None:
        self.block_length, self.device = block_length, device
        self.top = np.full(slots, -1, dtype=np.int64)
        """How many of the most probable tokens the slot's request wants at each position; -1 if it
        wants no log-probabilities."""
        self._buffers: tuple[Tensor, ...] = ()
        """(S * L, ...): log-probability and rank of the token, log-probabilities and ids of the
        most probable ones."""

    def assign(self, slot: int, top: int) -> None:
        """Begin a request in this slot."""
        self.top[slot] = top
        if top >= 0 and not self._buffers:
            places = len(self.top) * self.block_length
            self._buffers = (
                torch.zeros(places, device=self.device),
                torch.zeros(places, dtype=torch.int64, device=self.device),
                torch.zeros(places, MOST_TOP, device=self.device),
                torch.zeros(places, MOST_TOP, dtype=torch.int64, device=self.device),
            )

    def release(self, slot: int) -> None:
        """Forget the slot's request."""
        self.top[slot] = -1

    def record(
        self,
        slots: np.ndarray,
        batch: SlotBatch,
        outcome: StepOutcome,
        logits: Tensor,
        offered: np.ndarray,
        suppress: int | None,
    ) -> None:
        """Record what a step commits. slots (B,); logits (N, V), of the first `offered` (B,)
        positions of each block.
        """
        wanting = np.flatnonzero(self.top[slots] >= 0)
        if not len(wanting):
            return
        length, starts = self.block_length, offered.cumsum() - offered
        columns = np.concatenate([np.arange(offered[row]) for row in wanting])
        owners = np.repeat(wanting, offered[wanting])
        rows, places, kept = upload(
            np.stack(
                [
                    starts[owners] + columns,
                    owners * length + columns,
                    slots[owners] * length + columns,
                ]
            ),
            self.device,
        ).unbind()
        chosen = outcome.step.x0.flatten().index_select(0, places)
        committed = outcome.committed.flatten().index_select(0, places)
        confidence = outcome.step.confidence.flatten().index_select(0, places)
        count = int(self.top[slots].max())
        ids, values = top_log_probabilities(logits, rows, count, suppress)
        ranks = ranks_of(logits, rows, chosen, suppress)
        new = (log_probabilities(confidence), ranks, values, ids)
        for buffer, found in zip(self._buffers, new, strict=True):
            part = buffer if buffer.ndim == 1 else buffer[:, : found.shape[1]]
            where = committed if buffer.ndim == 1 else committed.unsqueeze(1)
            part.index_copy_(0, kept, torch.where(where, found, part.index_select(0, kept)))

    def told(self, slots: np.ndarray, batch: SlotBatch, at: Tensor, tokens: Tensor) -> Told | None:
        """Those of the blocks of these slots (B,), for the columns `at` (B, L), which hold `tokens`
        (B, L); None if no request of them wants any.
        """
        top = int(self.top[slots].max(initial=-1))
        if top < 0:
            return None
        places = batch.index.unsqueeze(-1) * self.block_length + at
        own, ranks, values, ids = (buffer[places] for buffer in self._buffers)
        return Told(
            torch.cat([own.unsqueeze(-1), values[..., :top]], dim=-1),
            torch.cat([tokens.unsqueeze(-1), ids[..., :top]], dim=-1),
            ranks,
        )
