"""Fast-dLLM's confidence threshold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy


@policy_options
class ConfidenceThreshold(UnmaskPolicy):
    """Unmask every position whose confidence is at least `threshold`; else the most confident one.

    Source: Fast-dLLM, arXiv 2505.22618 (confidence-aware parallel decoding), default
    0.9. Its code computes the confidence by a float64 softmax; here it is float32.
    """

    row_options = frozenset({"threshold"})

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        return step.masked & (step.confidence >= self.threshold)
