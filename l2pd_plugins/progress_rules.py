"""The progress rules: what a step commits besides the policy's selection, so that a block ends."""

from __future__ import annotations

import torch
from torch import Tensor

from l2pd_plugins.selection import leftmost, top_1


def progress_of(
    rule: str, selected: Tensor, confidence: Tensor, masked: Tensor, sound: Tensor
) -> Tensor:
    """bool (B, L): what the rule commits besides the selection.

    "argmax_if_empty": where a batch row selects nothing, its most confident masked position.
    "leftmost_if_empty": there its first one. "always_top1": the most confident one in any case.

    Args:
        rule: a policy's `progress`.
        selected, masked: (B, L) bool.
        confidence: (B, L) float32.
        sound: (B, L) bool, the masked positions whose confidence is a number.
    """
    if rule == "always_top1":
        return top_1(confidence, masked)
    empty = ~selected.any(-1, keepdim=True)
    if rule == "leftmost_if_empty":
        return empty & leftmost(torch.where(sound.any(-1, True), sound, masked))
    return empty & top_1(confidence, masked)
