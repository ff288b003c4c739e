"""The results of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""x0 (N,) int64, confidence, entropy and margin (N,) float32; (0,) if not requested."""


def empty_results(logits: Tensor, rows: Tensor | None, entropy: bool, margin: bool) -> Results:
    """Uninitialised tensors for the statistics of `rows` (None: of all rows of logits)."""
    count = logits.shape[0] if rows is None else rows.shape[0]

    def room(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=logits.device)

    return (
        room(count, torch.int64),
        room(count),
        room(count if entropy else 0),
        room(count if margin else 0),
    )
