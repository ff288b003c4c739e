"""The places of queries and hidden states in vLLM's forward passes, tested without vLLM."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_adapters.vllm.queries import hidden_rows, split_into_blocks


@given(lengths=st.lists(st.integers(0, 25), min_size=1, max_size=6), block=st.integers(1, 9))
def test_each_block_is_a_query_that_sees_itself_and_earlier_blocks(
    lengths: list[int], block: int
) -> None:
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    expected = []
    for request, length in enumerate(lengths):
        for first in range(0, length, block):
            last = min(first + block, length)
            expected.append((request, int(ends[request]) + first, length - last))
    owner, borders, behind = split_into_blocks(ends, block)
    assert borders.dtype == np.int32
    found = zip(owner.tolist(), borders[:-1].tolist(), behind.tolist(), strict=True)
    assert list(found) == expected
    assert borders[-1] == sum(lengths)


def test_the_block_is_in_the_rows_that_vllm_samples_from() -> None:
    """Three requests: one of 10 tokens with a block of 4 at 6; one of 5 tokens that still reads its
    prompt; one of 12 tokens with a block at 0 that is cut to 3. A position's logits are one row
    before it."""
    starts = torch.tensor([0, 10, 15, 27])
    offered = torch.tensor([4, 0, 3])
    logits_indices = torch.tensor([6, 7, 8, 9, 24, 25, 26])
    rows = hidden_rows(
        30,
        starts,
        offered=offered,
        logits_indices=logits_indices,
        blocks=torch.tensor([6, 6, 6, 6, 1, 1, 1]),
        columns=torch.tensor([0, 1, 2, 3, 0, 1, 2]) - 1,
    )
    assert rows[logits_indices].tolist() == [5, 6, 7, 8, 15, 16, 17]
    others = [at for at in range(30) if at not in logits_indices.tolist()]
    assert rows[others].tolist() == others
