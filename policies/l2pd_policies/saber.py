"""Saber: adaptive acceleration, and backtracking."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import UpTo, options
from l2pd_plugins.policy import DenoisingStep, RemaskingPolicy
from l2pd_plugins.selection import top_k
from l2pd_policies.readings import probability_of


@options
class Saber(RemaskingPolicy):
    """Unmask what beats the tokens committed so far; mask again those that have lost most.

    The threshold is the mean confidence that the block's committed tokens had when they were
    committed. Of |D| tokens drafted by it, max(1, floor(|D| / `mu`)) earlier ones are masked again:
    those whose probability fell most since the step before.

    Source: Saber, arXiv 2510.18165. The default of `mu` is this project's. The core
    masks fewer again than were committed, so that every block ends.
    """

    requires = frozenset({"confidence", "logits", "committed"})

    mu: Annotated[int, Field(ge=1), UpTo("block")] = 8

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        shape = (batch_size, block_length)
        return {
            # NaN: not committed in this block.
            "at_commit": torch.full(shape, torch.nan, device=device),
            "probability": torch.full(shape, torch.nan, device=device),
            "drafted": torch.zeros(batch_size, dtype=torch.int64, device=device),
        }

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        at_commit = state["at_commit"].masked_fill(step.masked, torch.nan)
        known = ~at_commit.isnan()
        mean = at_commit.nan_to_num().sum(-1) / known.sum(-1)  # NaN, which nothing exceeds, if none
        draft = step.masked & (step.confidence > mean.unsqueeze(-1))
        state.update(at_commit=at_commit, drafted=draft.sum(-1))
        return draft

    def remask(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        earlier = ~state["at_commit"].isnan()
        now = probability_of(step, step.tokens.unsqueeze(-1)).squeeze(-1)
        count = (state["drafted"] // self.mu).clamp(min=1)
        back = top_k(state["probability"] - now, earlier, count)
        new = ~step.masked & step.present & ~earlier & (step.x0 == step.tokens)
        state["at_commit"] = torch.where(new, step.confidence, state["at_commit"])
        state["probability"] = now
        return back
