"""The queries of a forward pass: which of its tokens each contains. Nothing here needs vLLM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def split_into_blocks(
    ends: np.ndarray, block_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make each block of a request's tokens a separate query; the last one may be shorter.

    ends: (N + 1,), the boundaries of the tokens of N requests, starting with 0. Returns, for M
    blocks: the request of each, (M,); their boundaries, (M + 1,) int32; and the number of the
    request's tokens after each, (M,), to which it does not attend.
    """
    blocks = -(-np.diff(ends) // block_length)
    owner = np.repeat(np.arange(len(blocks)), blocks)
    ordinal = np.arange(len(owner)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    begin = ends[owner] + ordinal * block_length
    end = np.minimum(begin + block_length, ends[owner + 1])
    return owner, np.append(begin, ends[-1]).astype(np.int32), ends[owner + 1] - end


def write_hidden_rows(
    rows: Tensor,
    starts: Tensor,
    positions: Tensor,
    *,
    offered: Tensor,
    logits_indices: Tensor,
    blocks: Tensor,
    columns: Tensor,
) -> None:
    """Write to `rows`, (tokens,) int64: for each row, the row of hidden states to put there, so
    that the last rows of a request, for which vLLM computes the logits, are those of its current
    block. It is written in place: a CUDA graph reads it at the address that it was captured with.

    starts: (N + 1,), the boundaries of the tokens of N requests. positions: (tokens,), the place of
    each token in its sequence. offered: (N,), number of rows of logits of each request. For each of
    these rows: logits_indices, the row that vLLM reads; blocks, the first position of its request's
    block in the sequence; columns, the position of the block that its logits predict.
    """
    torch.arange(len(rows), out=rows)
    begin = torch.repeat_interleave(starts[:-1], offered, output_size=len(logits_indices))
    wanted = begin - positions[begin] + blocks + columns
    # vLLM's warm-up on a GPU schedules passes that do not contain the block.
    rows[logits_indices] = wanted.clamp(0, len(rows) - 1)
