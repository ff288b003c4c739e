"""Values that policies compute from the logits, beyond the step's statistics."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from l2pd_plugins.policy import DenoisingStep


def memory_of(device: torch.device) -> float:
    """Total memory of the device in bytes; infinity if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


def probability_of(step: DenoisingStep, tokens: Tensor) -> Tensor:
    """Probabilities (B, L, K) float32 of tokens (B, L, K) int64; negative ids have probability 0.

    They follow from x0's probability and the difference of the logits, without a pass over the
    vocabulary.
    """
    logits = step.logits.gather(-1, tokens.clamp(min=0)).float()
    of_x0 = step.logits.gather(-1, step.x0.unsqueeze(-1)).float()
    return ((logits - of_x0).exp() * step.confidence.unsqueeze(-1)).masked_fill(tokens < 0, 0)


def without_mask_token(step: DenoisingStep) -> Tensor:
    """The logits (B, L, V) in float32, with -inf for the mask token.

    A negative mask token id means that the model has none.
    """
    rows, length, _ = step.logits.shape
    mask_token = torch.where(step.masked, step.tokens, -1).amax(-1).view(rows, 1, 1)
    column = mask_token.clamp(min=0).expand(rows, length, 1)
    logits = step.logits.float()
    there = logits.gather(-1, column).masked_fill(mask_token >= 0, -torch.inf)
    return logits.scatter(-1, column, there)
