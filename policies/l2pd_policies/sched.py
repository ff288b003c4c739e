"""SchED: commits the whole block once its predictions are confident enough for its progress."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_policies.logit_reads import without_mask_token


@policy_options
class SchED(UnmaskPolicy):
    """Unmask the whole block once its mean logit margin reaches a threshold that falls with time.

    The margin is the difference of the two highest logits. Its mean is over the block's present
    positions, including committed ones. The threshold falls linearly from `high` to `low` with the
    share of the block that is committed. Before the threshold is reached, each step unmasks the
    most confident position.

    Source: SchED, arXiv 2512.02892, linear schedule; the end points are those of Prophet,
    arXiv 2508.19982 (7.5 and 2.5). In the paper the mean is over the whole answer and progress is t
    / T. A policy sees one block; there, both definitions of progress are equal at one token per
    step.
    """

    requires = frozenset({"logits", "committed"})
    row_options = frozenset({"high", "low", "fall"})

    high: Annotated[float, Field(ge=0)] = 7.5
    low: Annotated[float, Field(ge=0)] = 2.5

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        best = without_mask_token(step).topk(2, dim=-1).values
        margin = torch.where(step.present, best[..., 0] - best[..., 1], 0)
        span = step.present.sum(-1, keepdim=True).clamp(min=1)
        committed = 1 - step.masked.sum(-1, keepdim=True) / span
        sure = margin.sum(-1, keepdim=True) / span >= self.high + self.fall * committed
        return step.masked & sure

    @cached_property
    def fall(self) -> float:
        """By how much the threshold changes over the block; computed in float64."""
        return self.low - self.high
