"""Blocks for testing policies: random logits, and a decode that records the tokens after each
step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import StepOutcome, denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.plugins import bind_policy
from l2pd_plugins.policy import ModelContext, UnmaskPolicy

VOCABULARY, MASK = 12, 11
_OFF = EndOfText("off", ())

Factory = Callable[[], UnmaskPolicy]


@dataclass(frozen=True)
class Bench:
    """Makes policies and decodes blocks of `length` positions with them."""

    factory: Factory
    length: int

    @property
    def model(self) -> ModelContext:
        """The model for which policies are prepared."""
        return ModelContext("kit", self.length, MASK, VOCABULARY)

    def policy(self) -> UnmaskPolicy:
        """A new policy, prepared for the bench's model."""
        return bind_policy(self.factory(), self.model)

    def start(
        self,
        policy: UnmaskPolicy | Sequence[UnmaskPolicy],
        rows: int,
        masks: int | None = None,
        seed: int | None = 0,
    ) -> BlockBatch:
        """Blocks with `masks` masks at their ends (all, by default), of one policy or of one policy
        per row. Without a seed, the rows have no generators.
        """
        tokens = torch.full((rows, self.length), MASK)
        tokens[:, : self.length - (self.length if masks is None else masks)] = 3
        return BlockBatch.start(
            tokens,
            [policy] * rows if isinstance(policy, UnmaskPolicy) else policy,
            mask_token_id=MASK,
            reference=torch.zeros_like(tokens),
            generators=None if seed is None else generators(rows, seed),
        )

    def logits(self, rows: int, step: int, seed: int = 0) -> Tensor:
        """(rows, L, V) float32 logits that change slowly from step to step. A row's logits depend
        on seed, row and step.
        """
        made = []
        for row in range(rows):
            base = torch.Generator().manual_seed(1000 * seed + row)
            noise = torch.Generator().manual_seed(1000 * seed + row + 100_000 * (step + 1))
            shape = (self.length, VOCABULARY)
            scale = 1 + 2 * (row % 4)
            made.append(
                torch.randn(shape, generator=base) * scale + torch.randn(shape, generator=noise) / 4
            )
        return torch.stack(made)

    def decode(
        self, policy: UnmaskPolicy, rows: int = 4, *, seed: int | None = 0, masks: int | None = None
    ) -> list[Tensor]:
        """Decode some blocks to their end; return the tokens (rows, L) after every step."""
        batch = self.start(policy, rows, masks, seed)
        history = []
        for step in range(self.length):
            take_step(batch, self.logits(rows, step, seed or 0))
            history.append(batch.tokens)
        return history


def take_step(batch: BlockBatch, logits: Tensor) -> StepOutcome:
    """One denoising step, with end of text off."""
    return denoising_step(batch, logits, end_of_text=_OFF)


def generators(rows: int, seed: int) -> list[torch.Generator]:
    """One generator per row, so that a row's draws do not depend on its batch."""
    return [torch.Generator().manual_seed(1000 * seed + row) for row in range(rows)]


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two decodes left the same tokens after every step."""
    return len(left) == len(right) and all(map(torch.equal, left, right))
