"""The input signals of the filter: cheap features of a position, without another forward pass."""

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
    "taken",
    "like_left",
    "like_second_left",
    "surer",
    "surer_doubt",
    "open",
    "step",
)
"""Channels, in order.

About the position itself: log_doubt: -log10(1 - confidence) / 6, which separates 0.99 from 0.9999;
confidence_before: one step earlier; stood: for how many steps the prediction has been the same, up
to 4, / 4; entropy: nats / 4, at most 1.

About the predicted token: outdone: a more confident masked position of the block predicts the same
token; echoes: how many other masked positions do, / 8, at most 1; taken: how many committed
positions do, / 4, at most 1; like_left, like_second_left: the position before, or the one before
that, does. If each item may occur only once, these signals show that two predictions cannot both be
right, which no marginal distribution shows.

About what would be committed together with it: surer: how many masked positions are more confident,
/ 16; surer_doubt: the sum x of their 1 - confidence, as x / (1 + x); open: the share of the block
that is masked; step: steps already taken in the block, up to 8, / 8."""

STOOD_LIMIT = 4
STEP_LIMIT = 8


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
    step_index: Tensor,
) -> Tensor:
    """step_index (B,), all others (B, L) -> (B, L, C) float32, 0 at positions that are not
    present.
    """
    # Pairs (B, L, L): [b, i, j] compares position i with position j of the block.
    same = (x0.unsqueeze(-1) == x0.unsqueeze(-2)) & masked.unsqueeze(-1)
    open_too = masked.unsqueeze(-1) & masked.unsqueeze(-2)
    surer = open_too & (confidence.unsqueeze(-2) > confidence.unsqueeze(-1))
    surer_doubt = (surer * (1 - confidence).unsqueeze(-2)).sum(-1)
    echoes = ((same & open_too).sum(-1) - 1).clamp(min=0)
    taken = (same & (present & ~masked).unsqueeze(-2)).sum(-1)
    open_share = masked.sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp(min=1)
    step = (step_index.float() / STEP_LIMIT).clamp(max=1).unsqueeze(-1).expand_as(confidence)
    channels = [
        masked.float(),
        present.float(),
        confidence,
        (1 - confidence).clamp(min=1e-6).log10() / -6,
        confidence_before,
        stood.float() / STOOD_LIMIT,
        margin,
        (entropy / 4).clamp(max=1),
        (same & surer).any(-1).float(),
        (echoes.float() / 8).clamp(max=1),
        (taken.float() / 4).clamp(max=1),
        _like_left(x0, present, 1),
        _like_left(x0, present, 2),
        surer.sum(-1).float() / 16,
        surer_doubt / (1 + surer_doubt),
        open_share.expand_as(confidence),
        step,
    ]
    return torch.stack(channels, dim=-1) * present.unsqueeze(-1)


def _like_left(x0: Tensor, present: Tensor, distance: int) -> Tensor:
    """(B, L) float32: whether the position `distance` to the left predicts the same token."""
    like = (x0 == x0.roll(distance, -1)) & present.roll(distance, -1)
    like[:, :distance] = False
    return like.float()


def how_long(x0: Tensor, x0_before: Tensor, stood: Tensor, first: Tensor) -> Tensor:
    """Steps for which the prediction has been the same: (B, L) int64; `first` (B,) bool marks rows
    at the first step of their block."""
    same = (x0 == x0_before) & ~first.unsqueeze(-1)
    return torch.where(same, (stood + 1).clamp(max=STOOD_LIMIT), 0)
