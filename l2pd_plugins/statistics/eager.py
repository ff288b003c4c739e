"""The statistics in plain PyTorch, which works everywhere.

A few rows at a time pass through a small float32 buffer, which stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2pd_plugins.statistics._buffers import Results, empty_results

_CPU_BUFFER = 1 << 18
"""Elements of the float32 buffer on the CPU: as many as fit in one core's L2 cache."""

_GPU_SHARE = 250
"""On a GPU the buffer holds this fraction of the logits: two float32 ones stay under 2 % of the
memory of bf16 logits."""

_VECTORS = 128
"""A multiple of the elements per iteration of torch's vector loops, on any processor."""

_TILE = 512
"""Columns per tile of the search for the maximum."""


def eager_kernel(
    logits: Tensor,
    rows: Tensor | None,
    x0: Tensor | None,
    suppress: int,
    entropy: bool,
    margin: bool,
) -> Results:
    """The statistics as `row_statistics` describes them; suppress is -1 for no column."""
    count = len(logits) if rows is None else len(rows)
    # At least two rows: torch sums a single long row in a different order from several rows (it
    # splits the row over threads), and then a row's bits would depend on the number of rows.
    vocabulary = logits.shape[1]
    width = -(-vocabulary // _TILE) * _TILE
    room = _CPU_BUFFER
    if logits.device.type != "cpu":
        room = max(room, logits.numel() // _GPU_SHARE)
    chunk = max(2, min(room // width, count))
    lowest = 1 if suppress == 0 and vocabulary > 1 else 0
    buffer = torch.empty(chunk, width, dtype=torch.float32, device=logits.device)
    powers = torch.empty_like(buffer) if entropy else None

    def of_part(part: slice) -> tuple[Tensor | None, ...]:
        z = buffer[: max(part.stop - part.start, 2)]
        z[:, :vocabulary].copy_(
            logits[part] if rows is None else logits.index_select(0, rows[part].clamp(min=0))
        )
        # Whole tiles, the last one padded with -inf, which changes no maximum and no sum.
        z[:, vocabulary:].fill_(-torch.inf)
        if suppress >= 0:
            z[:, suppress].fill_(-torch.inf)
        found = _statistics(z, vocabulary, None if x0 is None else x0[part], powers, margin, lowest)
        size = part.stop - part.start
        return tuple(None if values is None else values.squeeze(1)[:size] for values in found)

    results: Results
    if 0 < count <= chunk:
        none = buffer.new_empty(0)
        tokens, *others = (none if v is None else v for v in of_part(slice(0, count)))
        results = (tokens, others[0], others[1], others[2])
    else:
        results = empty_results(logits, rows, entropy, margin)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            for result, values in zip(results, of_part(part), strict=True):
                if values is not None:
                    result[part] = values
    if rows is not None:
        for result in results:
            if len(result):
                result.masked_fill_(rows < 0, 0)
    return results


def _statistics(
    z: Tensor, vocabulary: int, x0: Tensor | None, powers: Tensor | None, margin: bool, lowest: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x0, confidence, entropy and margin, each (rows, 1), of z, (rows, width) float32, which is
    overwritten. z is -inf beyond the vocabulary. `powers` is a buffer for the entropy, or None
    without entropy; `lowest` is the first column that may be predicted.
    """
    # Whole vectors, so that torch computes every element in its vector loop.
    used = z[:, : -(-vocabulary // _VECTORS) * _VECTORS]
    top, best = _maximum(z, used)
    if lowest:  # the suppressed column 0 is the first of equals only in a row of all -inf
        best = best.clamp_(min=lowest)
    second = None
    if margin:
        z.scatter_(1, best, -torch.inf)
        second = z.amax(-1, keepdim=True)
        z.scatter_(1, best, top)
    used.sub_(top)
    picked = best
    if x0 is not None:
        given = x0.unsqueeze(1).expand(len(z), 1)
        picked = torch.where(given < 0, best, given)
    logit = z.gather(1, picked)
    entropy = None
    if powers is None:
        used.exp_()
        z[:, used.shape[1] :].zero_()  # exp(-inf)
        total = z.sum(-1, keepdim=True)
    else:
        e = torch.exp(z, out=powers[: len(z)])
        total = e.sum(-1, keepdim=True)
        # Clamp, since 0 * -inf would be NaN; such a token adds nothing to the entropy.
        mean = e.mul_(z.clamp_(min=-1e30)).sum(-1, keepdim=True) / total
        entropy = total.log() - mean
    confidence = logit.exp() / total
    difference = None if second is None else -torch.expm1(second - top) / total
    return picked, confidence, entropy, difference


def _maximum(z: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of z and its first index, each (rows, 1); it lies in `used`, the first
    columns of z.

    Torch's argmax over a long row is many times slower than its vectorised amax, so the tile that
    holds the maximum is found first, and only that tile is searched.
    """
    if z.shape[1] == _TILE:
        return used.amax(-1, keepdim=True), used.argmax(-1, keepdim=True)
    tiles = z.view(len(z), -1, _TILE)
    top, tile = tiles.amax(-1).max(-1, keepdim=True)
    within = tiles.gather(1, tile.unsqueeze(-1).expand(-1, 1, _TILE)).squeeze(1).argmax(-1)
    return top, tile * _TILE + within.unsqueeze(1)
