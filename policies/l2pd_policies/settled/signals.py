"""The signals: what can be known of a position for nearly nothing."""

from __future__ import annotations

import torch
from torch import Tensor

SIGNALS = (
    "masked",
    "present",
    "confidence",
    "log_doubt",
    "confidence_before",
    "stood",
    "margin",
    "entropy",
    "outdone",
    "echoes",
)
"""Channels, in order. log_doubt: -log10(1 - confidence) / 6, which tells 0.99 from 0.9999;
confidence_before: one step earlier; stood: for how many steps the prediction has been the same, up
to 4, / 4; entropy: nats / 4, at most 1; outdone: a more confident masked position of the block
predicts the same token; echoes: how many other masked positions do, / 8, at most 1. Where each item
may stand once, those two tell what no marginal can: two tokens that cannot both be right."""

STOOD_LIMIT = 4


def signals(
    *,
    masked: Tensor,
    present: Tensor,
    confidence: Tensor,
    confidence_before: Tensor,
    stood: Tensor,
    margin: Tensor,
    entropy: Tensor,
    x0: Tensor,
) -> Tensor:
    """Everything (B, L) -> (B, L, C) float32, 0 where there is no position."""
    same = (x0.unsqueeze(-1) == x0.unsqueeze(-2)) & masked.unsqueeze(-2) & masked.unsqueeze(-1)
    outdone = (same & (confidence.unsqueeze(-2) > confidence.unsqueeze(-1))).any(-1)
    echoes = (same.sum(-1) - 1).clamp(min=0)
    channels = [
        masked.float(),
        present.float(),
        confidence,
        (1 - confidence).clamp(min=1e-6).log10() / -6,
        confidence_before,
        stood.float() / STOOD_LIMIT,
        margin,
        (entropy / 4).clamp(max=1),
        outdone.float(),
        (echoes.float() / 8).clamp(max=1),
    ]
    return torch.stack(channels, dim=-1) * present.unsqueeze(-1)


def how_long(x0: Tensor, x0_before: Tensor, stood: Tensor, first: Tensor) -> Tensor:
    """Steps for which the prediction has been the same: (B, L) int64; `first` (B,) bool marks rows
    at the first step of their block."""
    same = (x0 == x0_before) & ~first.unsqueeze(-1)
    return torch.where(same, (stood + 1).clamp(max=STOOD_LIMIT), 0)
