"""Logits to x0, confidence, entropy and margin, in one pass and in float32.

A full softmax over a vocabulary of 150,000 is written to memory only to read one number per row.
Here a few rows at a time pass through a small float32 buffer, which stays in the cache: maximum,
log-sum-exp, and what else is required. Never float64, never a copy of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CPU_BUFFER = 1 << 19
"""Elements of the float32 buffer on the CPU: what two cores' L2 caches hold."""

_GPU_SHARE = 80
"""On a GPU the buffer holds this fraction of the logits, so that two of them stay under 5 % of
the memory of bf16 logits."""

_TILE = 512
"""Columns per tile of the search for the maximum."""


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of N rows of logits; each (N,). Entropy and margin are None unless required."""

    x0: Tensor
    """int64, the predicted token: the argmax (the first of equals), or the sampled token."""
    confidence: Tensor
    """float32, softmax probability of x0."""
    entropy: Tensor | None = None
    """float32, nats."""
    margin: Tensor | None = None
    """float32, p(top1) - p(top2)."""


def row_statistics(
    logits: Tensor,
    requires: frozenset[str] = frozenset({"confidence"}),
    suppress: int | None = None,
    *,
    x0: Tensor | None = None,
) -> RowStatistics:
    """Statistics of rows of logits, (N, V) of any float dtype -> (N,) each.

    Args:
        requires: of {"confidence", "entropy", "margin"}; other names are ignored.
        suppress: a token that cannot be predicted (the mask token), as if its logit were -inf.
        x0: (N,) tokens that were sampled, -1 for the argmax; without it x0 is the argmax.

    On the CPU a row's result does not depend on the other rows, to the bit. A row that holds NaN,
    or nothing but -inf, has NaN for confidence.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (rows, vocabulary), got shape {tuple(logits.shape)}")
    rows, vocabulary = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    confidence = torch.empty(rows, dtype=torch.float32, device=device)
    entropy = torch.empty_like(confidence) if "entropy" in requires else None
    margin = torch.empty_like(confidence) if "margin" in requires else None

    # Whole tiles, the last one padded with -inf, which changes no maximum and no sum.
    width = -(-vocabulary // _TILE) * _TILE
    # At least two rows: torch sums a single long row in another order than several (it splits the
    # row over threads), and then a row's bits would depend on how many rows stand beside it.
    room = _CPU_BUFFER if device.type == "cpu" else max(_CPU_BUFFER, logits.numel() // _GPU_SHARE)
    chunk = max(2, min(room // width, rows))
    buffer = torch.empty(chunk, width, dtype=torch.float32, device=device)
    powers = torch.empty_like(buffer) if entropy is not None else None
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        count = part.stop - start
        z = buffer[: max(count, 2)]
        z[:, :vocabulary].copy_(logits[part])
        z[:, vocabulary:].fill_(-torch.inf)
        if suppress is not None:
            z[:, suppress].fill_(-torch.inf)
        top, best = _maximum(z)
        if margin is not None:
            z.scatter_(1, best, -torch.inf)
            second = z.amax(-1, keepdim=True)
            z.scatter_(1, best, top)
        z.sub_(top)
        picked = best
        if x0 is not None:
            given = x0[part, None].expand(len(z), 1)
            picked = torch.where(given < 0, best, given)
        logit = z.gather(1, picked)
        if powers is None:
            total = z.exp_().sum(-1, keepdim=True)
        else:
            e = torch.exp(z, out=powers[: len(z)])
            total = e.sum(-1, keepdim=True)
            # The clamp: 0 * -inf would be NaN, and such a token adds nothing to the entropy.
            mean = e.mul_(z.clamp_(min=-1e30)).sum(-1, keepdim=True) / total
            entropy[part] = (total.log() - mean)[:count, 0]  # type: ignore[index]
        tokens[part] = picked[:count, 0]
        confidence[part] = (logit.exp() / total)[:count, 0]
        if margin is not None:
            margin[part] = (-torch.expm1(second - top) / total)[:count, 0]
    return RowStatistics(tokens, confidence, entropy, margin)


def _maximum(z: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row and its first index, each (rows, 1).

    Torch's argmax over a long row is many times slower than its vectorised amax, so the tile that
    holds the maximum is found first, and only that tile is searched.
    """
    tiles = z.view(len(z), -1, _TILE)
    top, tile = tiles.amax(-1).max(-1, keepdim=True)
    within = tiles.gather(1, tile.unsqueeze(-1).expand(-1, 1, _TILE)).squeeze(1).argmax(-1)
    return top, tile * _TILE + within.unsqueeze(1)
