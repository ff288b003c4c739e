"""Fast-dLLM++'s rule of Frechet bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_plugins.selection import longest_prefix


@policy_options
class Frechet(UnmaskPolicy):
    """Unmask the n most confident positions, n the largest whose Frechet bounds differ enough.

    With c_(1) >= c_(2) >= ..., L_n = max(0, sum of c_(1..n) - (n - 1)) is a lower bound on the
    probability that all n predictions are right, and U_n = 1 - c_(n) an upper bound on the
    probability of another joint answer. n is admitted if L_n - U_n > `delta`.

    Source: Fast-dLLM++, arXiv 2606.02955, default delta 0.25.
    """

    row_options = frozenset({"delta"})

    delta: Annotated[float, Field(ge=0, lt=1)] = 0.25

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        return longest_prefix(
            step.confidence,
            step.masked,
            lambda c, n: (c.cumsum(-1) - (n - 1)).clamp(min=0) - (1 - c) > self.delta,
        )
