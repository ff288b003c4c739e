"""Models whose canvas holds noise where that of others holds masks: DiffusionGemma.

Nothing is committed before a canvas ends: every step decides about all of it anew.
"""

from __future__ import annotations

from l2pd_plugins import RemaskingPolicy, UnmaskPolicy
from l2pd_plugins.errors import L2PDError


def refuse_unsuitable_policy(policy: UnmaskPolicy) -> None:
    """Raise L2PDError for a policy whose rule has no meaning where nothing accepted stays."""
    reason = ""
    if isinstance(policy, RemaskingPolicy):
        reason = "it takes committed tokens back, and here none is committed"
    elif policy.edits:
        reason = "it overwrites committed tokens, and here none is committed"
    elif policy.counts_commits:
        reason = "it shares a canvas out over steps, and here every step begins anew"
    elif "reference" in policy.requires:
        reason = "it needs a decode at one token per step, and this model has none"
    if reason:
        raise L2PDError(
            f"policy {policy.name!r} does not work on DiffusionGemma, whose canvas has no mask "
            f"token: {reason}"
        )
