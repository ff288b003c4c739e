"""The places of queries and hidden states in vLLM's forward passes, tested without vLLM."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from l2pd_adapters.vllm.queries import split_into_blocks, write_hidden_rows


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


KINDS = ("full", "prefix", "dual")


def rows_of(
    passes: list[tuple[int, int]], offered: list[int], blocks: list[int], shift: int
) -> tuple[Tensor, Tensor]:
    """The written rows, and those that vLLM samples from. passes: (first position, number of
    positions) of each request; offered: its rows of logits; blocks: where its block begins."""
    lengths = torch.tensor([length for _, length in passes])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    positions = torch.cat([torch.arange(first, first + length) for first, length in passes])
    sampled = [
        int(starts[i + 1]) - count + column
        for i, count in enumerate(offered)
        for column in range(count)
    ]
    logits_indices = torch.tensor(sampled, dtype=torch.int64)
    rows = torch.full((len(positions),), -7)
    write_hidden_rows(
        rows,
        starts,
        positions,
        offered=torch.tensor(offered),
        logits_indices=logits_indices,
        blocks=torch.tensor(blocks).repeat_interleave(torch.tensor(offered)),
        columns=torch.tensor([c for count in offered for c in range(count)]) - shift,
    )
    return rows, logits_indices


def test_the_block_is_in_the_rows_that_vllm_samples_from() -> None:
    """Three requests in full passes: one of 10 tokens with a block of 4 at 6; one of 5 tokens that
    still reads its prompt; one of 12 tokens with a block at 1 that is cut to 3. A position's logits
    are one row before it."""
    rows, sampled = rows_of([(0, 10), (0, 5), (0, 12)], [4, 0, 3], [6, 5, 1], shift=1)
    assert rows[sampled].tolist() == [5, 6, 7, 8, 15, 16, 17]
    others = [at for at in range(27) if at not in sampled.tolist()]
    assert rows[others].tolist() == others


@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 30), st.sampled_from(["full", "prefix", "dual"]), st.integers(0, 9)
        ),
        min_size=1,
        max_size=5,
    ),
    length=st.integers(1, 6),
    shift=st.integers(0, 1),
)
def test_rows_of_partial_passes_beside_full_ones(
    requests: list[tuple[int, str, int]], length: int, shift: int
) -> None:
    """The i-th logits of a request come from the token before its block's i-th, or from that one,
    wherever the pass begins."""
    passes, blocks = [], []
    for block, kind, behind in requests:
        first = 0 if kind == "full" else block - shift
        end = block + length + (0 if kind == "dual" else behind)
        passes.append((first, end - first))
        blocks.append(block)
    rows, sampled = rows_of(passes, [length] * len(requests), blocks, shift)
    positions = [position for first, count in passes for position in range(first, first + count)]
    owners = [owner for owner, (_, count) in enumerate(passes) for _ in range(count)]
    wanted = [
        (owner, block + column - shift)
        for owner, block in enumerate(blocks)
        for column in range(length)
    ]
    assert [(owners[row], positions[row]) for row in rows[sampled].tolist()] == wanted


def test_passes_without_their_block_stay_inside_the_batch() -> None:
    """As in vLLM's warm-up on a GPU."""
    rows, sampled = rows_of([(0, 4), (0, 4)], [4, 4], [5, 5], shift=0)
    assert rows[sampled].min() >= 0
    assert rows[sampled].max() <= 7
