"""Small tensor helpers that selection rules share. None of them reads a value back to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def ranks(score: Tensor, candidates: Tensor) -> Tensor:
    """Rank of every position by descending score among the candidates of its row, from 0.

    score (B, L) float, candidates (B, L) bool -> (B, L) int64. Of equal scores the leftmost comes
    first; NaN ranks after every number; non-candidates rank last.
    """
    lowest = torch.finfo(score.dtype).min
    score = score.nan_to_num(nan=lowest, neginf=lowest).masked_fill(~candidates, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    positions = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def top_1(score: Tensor, candidates: Tensor) -> Tensor:
    """bool (B, L): the candidate of each row with the highest score, the leftmost of equals."""
    lowest = torch.finfo(score.dtype).min
    score = score.nan_to_num(nan=lowest, neginf=lowest).masked_fill(~candidates, -torch.inf)
    best = torch.zeros_like(candidates).scatter_(-1, score.argmax(-1, keepdim=True), True)
    return best & candidates


def top_k(score: Tensor, candidates: Tensor, k: Tensor | int) -> Tensor:
    """bool (B, L): the k candidates of each row with the highest score; k is an int, (B,) or
    (B, 1).
    """
    if isinstance(k, int) and k == 1:
        return top_1(score, candidates)  # the same, without sorting
    limit = k.unsqueeze(-1) if isinstance(k, Tensor) and k.ndim == 1 else k
    return (ranks(score, candidates) < limit) & candidates


def leftmost(candidates: Tensor) -> Tensor:
    """bool (B, L): the first candidate of each row."""
    return candidates & (candidates.cumsum(-1) == 1)


def longest_prefix(
    score: Tensor, candidates: Tensor, condition: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """bool (B, L): the candidates with the n highest scores, for the largest admitted n.

    `condition` gets the scores (B, L) in descending order and n = 1..L, and returns bool (B, L):
    whether the prefix of length n is admitted. Positions with NaN are not candidates.
    """
    candidates = candidates & ~score.isnan()
    rank = ranks(score, candidates)
    ordered = torch.zeros_like(score).scatter_(-1, rank, score.masked_fill(~candidates, 0))
    length = torch.arange(1, score.shape[-1] + 1, device=score.device)
    admitted = condition(ordered, length) & (length <= candidates.sum(-1, keepdim=True))
    return (rank < (admitted * length).amax(-1, keepdim=True)) & candidates
