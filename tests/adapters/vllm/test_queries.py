"""Where queries and hidden states lie in vLLM's forward passes, without vLLM."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_adapters.vllm.queries import hidden_rows, split_into_blocks


@given(lengths=st.lists(st.integers(0, 25), min_size=1, max_size=6), block=st.integers(1, 9))
def test_each_block_is_a_query_that_sees_itself_and_those_before(
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


def test_vllm_reads_the_block_where_it_looks_for_the_last_rows() -> None:
    """Three requests: of 10 tokens, block of 4 at 6; of 5, whose prompt is read; of 12, block at 0
    cut to 3. Logits of a position stand one row before it."""
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
