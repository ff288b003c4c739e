"""LLaDA's low-confidence remasking: a fixed number of tokens per step."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.errors import PolicyOptionError
from l2pd_plugins.options import UpTo, policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_plugins.selection import top_k


@policy_options
class FixedSchedule(UnmaskPolicy):
    """Unmask the k most confident positions of each step, with k from a schedule set in advance.

    `tokens_per_step` sets k. `steps` distributes that many steps evenly over the canvas; in a block
    of m masks and S steps, each step commits floor(m / S) tokens, and the first m mod S steps one
    more. Without either option it commits one token per step: the slowest and best decode, with
    which every other policy is compared.

    Source: LLaDA, arXiv 2502.09992 (low-confidence remasking), and
    `get_num_transfer_tokens` of its code. That code requires `steps` to be a multiple of the number
    of blocks; here any number is distributed in proportion to positions. A step whose share is 0
    commits one token.
    """

    counts_commits = True
    row_options = frozenset({"steps", "tokens_per_step"})

    steps: Annotated[int, Field(ge=1), UpTo("canvas")] | None = None
    tokens_per_step: Annotated[int, Field(ge=1), UpTo("canvas")] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.tokens_per_step is not None:
            raise PolicyOptionError(
                f"FixedSchedule: steps={self.steps} and tokens_per_step={self.tokens_per_step} "
                "exclude each other; give one"
            )
        if self.steps is None and self.tokens_per_step is None:
            self.tokens_per_step = 1

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        return {"masks_at_start": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        return top_k(self.score(step), step.masked, self._count(step, state))

    def score(self, step: DenoisingStep) -> Tensor:
        """(B, L): the score by which positions are ordered, highest first."""
        return step.confidence

    def _count(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor | int:
        if self.steps is None:
            assert self.tokens_per_step is not None
            return self.tokens_per_step
        first = step.step_index == 0
        masks = torch.where(first, step.masked.sum(-1), state["masks_at_start"])
        state["masks_at_start"] = masks
        canvas = step.canvas_length.unsqueeze(-1)
        start = step.block_index.unsqueeze(-1) * step.masked.shape[1]
        end = torch.minimum(start + step.masked.shape[1], canvas)
        before, after = (self.steps * at // canvas for at in (start, end))
        return self.share(step, masks, (after - before).clamp(min=1).squeeze(-1))

    def share(self, step: DenoisingStep, masks: Tensor, steps: Tensor) -> Tensor:
        """(B,): number of tokens to commit in this step, for blocks that start with `masks` masks
        and take `steps` steps.
        """
        return masks // steps + (step.step_index < masks % steps)
