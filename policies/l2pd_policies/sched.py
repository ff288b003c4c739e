"""SchED: ends a block once its predictions are sure enough for how far it is."""

from __future__ import annotations

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

    The margin is that between the two highest logits, its mean is over the block's present
    positions, committed ones included. The threshold falls linearly from `high` to `low` with the
    share of the block that is committed. Until then, the most confident position is taken.

    Source: SchED, arXiv 2512.02892, linear schedule; the end points are those of Prophet,
    arXiv 2508.19982 (7.5 and 2.5). The paper's span is the whole answer and its progress t / T;
    a policy sees one block, where both mean the same at one token per step.
    """

    requires = frozenset({"logits", "committed"})

    high: Annotated[float, Field(ge=0)] = 7.5
    low: Annotated[float, Field(ge=0)] = 2.5

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        best = without_mask_token(step).topk(2, dim=-1).values
        margin = torch.where(step.present, best[..., 0] - best[..., 1], 0)
        span = step.present.sum(-1).clamp(min=1)
        committed = 1 - step.masked.sum(-1) / span
        sure = margin.sum(-1) / span >= self.high + (self.low - self.high) * committed
        return step.masked & sure.unsqueeze(-1)
