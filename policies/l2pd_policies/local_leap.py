"""LocalLeap: confident anchors, and a lower threshold near them."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import UpTo, policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy


@policy_options
class LocalLeap(UnmaskPolicy):
    """Unmask very confident positions (anchors), and fairly confident positions near an anchor.

    Anchors are masked positions with confidence >= `anchor_threshold`; within `radius` positions of
    one, `threshold` suffices.

    Source: LocalLeap, arXiv 2510.07081, defaults 0.9, 0.75 and 4.
    """

    row_options = frozenset({"anchor_threshold", "threshold"})

    anchor_threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.75
    radius: Annotated[int, Field(ge=0), UpTo("block")] = 4

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        anchors = step.masked & (step.confidence >= self.anchor_threshold)
        width = 2 * self.radius + 1
        reached = F.max_pool1d(anchors.float(), width, stride=1, padding=self.radius) > 0
        return anchors | (step.masked & reached & (step.confidence >= self.threshold))
