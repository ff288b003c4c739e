"""Rules that take the best positions in order for as long as a condition holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from l2pd_plugins.selection import ranks


def longest_prefix(
    score: Tensor, candidates: Tensor, condition: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """bool (B, L): the candidates with the n highest scores, n the largest that is admitted.

    `condition` gets the scores (B, L) from high to low and n = 1..L, and answers bool (B, L): is
    the prefix of length n admitted? NaN is no candidate.
    """
    candidates = candidates & ~score.isnan()
    rank = ranks(score, candidates)
    ordered = torch.zeros_like(score).scatter_(-1, rank, score.masked_fill(~candidates, 0))
    length = torch.arange(1, score.shape[-1] + 1, device=score.device)
    admitted = condition(ordered, length) & (length <= candidates.sum(-1, keepdim=True))
    return (rank < (admitted * length).amax(-1, keepdim=True)) & candidates
