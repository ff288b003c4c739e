"""Fast-dLLM's factor rule."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_plugins.selection import longest_prefix


@policy_options
class FastDLLMFactor(UnmaskPolicy):
    """Unmask the n most confident positions, n the largest with (n + 1) (1 - c_(n)) < `factor`.

    c_(n) is the n-th highest confidence. The more tokens are unmasked at once, the more confident
    each has to be.

    Source: Fast-dLLM, arXiv 2505.22618 (factor-based decoding), default
    factor 1. Its code compares with 1 - f / (n + 1) and is off by one at the first and the last
    position; here it is the paper's rule.
    """

    row_options = frozenset({"factor"})

    factor: Annotated[float, Field(gt=0)] = 1.0

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        return longest_prefix(
            step.confidence, step.masked, lambda c, n: (n + 1) * (1 - c) < self.factor
        )
