"""Fork-dLLM's threshold with the leftmost position as its fallback."""

from __future__ import annotations

from l2pd_plugins.options import policy_options
from l2pd_policies.confidence_threshold import ConfidenceThreshold


@policy_options
class LeftmostThreshold(ConfidenceThreshold):
    """Unmask every position whose confidence is at least `threshold`; else the leftmost mask.

    Source: Fork-dLLM (2026), University of Amsterdam, default 0.9. Its position-dependent
    temperature belongs to sampling and is not part of the policy.
    """

    progress = "leftmost_if_empty"
