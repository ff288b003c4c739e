"""Drawing x0 instead of taking the argmax, with one generator per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20


def sample_tokens(
    logits: Tensor,
    counts: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    warp: Callable[[Tensor], Tensor] | None = None,
    suppress: int | None = None,
) -> Tensor:
    """Draw a token per row of logits from softmax(warp(logits)): (N, V) -> (N,) int64.

    Args:
        counts: number of consecutive rows of logits for each generator; sums to N.
        generators: one per sequence, so that a sequence's draws do not depend on its batch.
        warp: float32 rows of logits -> the same, by temperature, top-k, top-p, ...; a row's result
            must not depend on the others.
        suppress: a token that is never drawn (the mask token).

    Uses the exponential race: argmax of p / e with e ~ Exp(1) is a draw from p. It runs in float32;
    LLaDA's code adds float64 Gumbel noise for the same distribution.
    """
    vocabulary = logits.shape[1]
    drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    # The chunk depends on V alone: a sequence's random stream must not depend on N.
    chunk = max(1, _CHUNK_ELEMENTS // vocabulary)
    start = 0
    for count, generator in zip(counts, generators, strict=True):
        for first in range(start, start + count, chunk):
            part = slice(first, min(first + chunk, start + count))
            scores = logits[part].to(torch.float32, copy=True)
            if suppress is not None:
                scores[:, suppress].fill_(-torch.inf)
            if warp is not None:
                scores = warp(scores)
            noise = torch.empty_like(scores).exponential_(generator=generator)
            found = (scores - noise.log_()).argmax(-1)
            if suppress is not None:
                # If only -inf or NaN is left, argmax may return any column, including this one.
                found = torch.where(found == suppress, int(suppress == 0), found)
            drawn[part] = found
        start += count
    return drawn
