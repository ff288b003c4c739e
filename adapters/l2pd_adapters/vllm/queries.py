"""Where the queries of a forward pass lie among its tokens. Nothing here needs vLLM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def split_into_blocks(
    ends: np.ndarray, block_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make each block of a request's tokens a query of its own, the last one as long as what is
    left.

    ends: (N + 1,), where the tokens of N requests begin and end, from 0 on. Returns, for M blocks,
    the request that each is of, (M,); where they begin and end, (M + 1,) int32; and how many of
    the request's tokens lie behind each, (M,), which it does not see.
    """
    blocks = -(-np.diff(ends) // block_length)
    owner = np.repeat(np.arange(len(blocks)), blocks)
    ordinal = np.arange(len(owner)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    begin = ends[owner] + ordinal * block_length
    end = np.minimum(begin + block_length, ends[owner + 1])
    return owner, np.append(begin, ends[-1]).astype(np.int32), ends[owner + 1] - end


def hidden_rows(
    tokens: int,
    starts: Tensor,
    *,
    offered: Tensor,
    logits_indices: Tensor,
    blocks: Tensor,
    columns: Tensor,
) -> Tensor:
    """(tokens,) int64: which row of the hidden states stands in for each, so that the last rows of
    a request, of which vLLM computes the logits, are those of the block that is being decoded.

    starts: (N + 1,), where the tokens of N requests begin and end. offered: (N,), rows of logits of
    each. For each of these rows: logits_indices, where vLLM reads it; blocks, the first position of
    its request's block in the sequence; columns, which position of the block its logits predict.
    """
    rows = torch.arange(tokens, device=starts.device)
    begin = torch.repeat_interleave(starts[:-1], offered, output_size=len(logits_indices))
    rows[logits_indices] = begin + blocks + columns
    return rows
