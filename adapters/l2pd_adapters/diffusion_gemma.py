"""Models whose canvas holds noise instead of masks: DiffusionGemma.

Nothing is committed before a canvas ends: every step decides about the whole canvas again.
"""

from __future__ import annotations

from l2pd_plugins import RemaskingPolicy, UnmaskPolicy
from l2pd_plugins.errors import L2PDError


def refuse_unsuitable_policy(policy: UnmaskPolicy) -> None:
    """Raise L2PDError for a policy whose rule relies on accepted tokens to stay."""
    reason = ""
    if isinstance(policy, RemaskingPolicy):
        reason = "it remasks committed tokens, and here none is committed"
    elif policy.edits:
        reason = "it overwrites committed tokens, and here none is committed"
    elif policy.counts_commits:
        reason = "it plans a number of tokens for each step, and here no token stays committed"
    elif "reference" in policy.requires:
        reason = "it needs a decode at one token per step, and this model has none"
    if reason:
        raise L2PDError(
            f"policy {policy.name!r} does not work on DiffusionGemma, whose canvas has no mask "
            f"token: {reason}"
        )
