"""The policy around the paper's filter."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep
from l2pd_policies.learn2pd.filter import UnmaskFilter
from l2pd_policies.learn2pd.monotone import MonotoneFilter
from l2pd_policies.learned.fallback import FallbackPolicy

VARIANTS = {
    None: (UnmaskFilter, "learn2pd"),
    "monotone": (MonotoneFilter, "learn2pd_monotone"),
}
"""The filter's class, and the folder of a model's own filter, of each variant."""


@policy_options
class Learn2PD(FallbackPolicy):
    """Unmask the positions whose prediction the paper's filter considers final.

    `filter` is a folder or hub id; the default is the filter in the model's folder. `threshold` is
    the probability that the filter has to exceed; the default is the filter's calibrated threshold.

    ``variant="monotone"``, which the paper does not have, is a filter for any block length that has
    the same confidences as inputs, but accepts a position the sooner the higher its own confidence,
    the others being the same. A filter is of one variant.

    Use a filter on prompts like those it was trained on. On other kinds of text it can ruin
    answers without a warning (docs/learned_policies.md). With ``fallback="eb_sampler"`` or
    ``fallback="confidence_threshold"``, which the paper does not have, blocks that look unlike all
    blocks of the training, and the rest of their answers, are decided by the rule of that policy,
    with `fallback_gamma` (0.02) or `fallback_threshold` (0.9).

    Source: Learn2PD, arXiv 2509.25188 (threshold 0.96 for LLaDA, 0.9 for Dream). The authors' code
    also commits the most confident position at every step (``progress="always_top1"``); the
    progress rule to use is recorded with the filter.
    """

    requires = frozenset({"committed"})
    filter_class = UnmaskFilter
    folder_name = "learn2pd"

    variant: Literal["monotone"] | None = None

    def __post_init__(self) -> None:
        # Class variables in other policies.
        vars(self)["filter_class"], vars(self)["folder_name"] = VARIANTS[self.variant]
        super().__post_init__()

    def inputs(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """(B, L) confidences. Positions that are not present have 0: the authors' padding. For the
        monotone variant (B, L, 2), with whether each position is masked.
        """
        if self.variant is None:
            return step.confidence
        return torch.stack((step.confidence, step.masked.float()), dim=-1)
