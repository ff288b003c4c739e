"""The entropy-bounded sampler."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_plugins.selection import longest_prefix


@policy_options
class EBSampler(UnmaskPolicy):
    """Unmask the k positions of lowest entropy, k the largest whose entropies stay in a bound.

    The bound limits the loss from drawing the tokens independently: the sum of the k entropies
    (nats) minus the largest of them is at most `gamma`. One position always qualifies.

    Source: EB-Sampler, arXiv 2505.24857, with gamma from 0.01 to 0.1. SGLang's EBSampling uses
    0.15, DiffusionGemma 0.1, which is the default here.
    """

    requires = frozenset({"entropy"})
    row_options = frozenset({"gamma"})

    gamma: Annotated[float, Field(ge=0)] = 0.1

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        return entropy_bounded(step.entropy, step.masked, self.gamma)


def entropy_bounded(entropy: Tensor, masked: Tensor, gamma: float) -> Tensor:
    """bool (B, L): the rule of `EBSampler`; entropy (B, L) in nats, masked (B, L) bool."""
    # Sorted from low to high entropy: the last is the largest, and only those before it are summed.
    return longest_prefix(-entropy, masked, lambda h, _: (h - h.cumsum(-1)) <= gamma)
