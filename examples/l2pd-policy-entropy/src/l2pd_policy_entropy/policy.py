"""dParallel's entropy threshold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from l2pd_plugins import DenoisingStep, UnmaskPolicy, policy_options
from l2pd_plugins.selection import top_1


@policy_options
class EntropyThreshold(UnmaskPolicy):
    """Unmask every position whose entropy is below `limit` nats, and the one of lowest entropy.

    Source: dParallel, arXiv 2509.26488, with limits from 0.45 to 0.5 there; the default is 0.45.
    """

    requires = frozenset({"entropy"})

    limit: Annotated[float, Field(gt=0)] = 0.45

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        lowest = top_1(-step.entropy, step.masked)
        return lowest | (step.masked & (step.entropy < self.limit))
