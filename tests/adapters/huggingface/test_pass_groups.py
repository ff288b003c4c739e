"""Rows are split into forward passes so that few computed columns are seen by no row."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from l2pd_adapters.huggingface.forward.pass_groups import PASS, share_passes

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(61, 2000)), min_size=1, max_size=9)


def cost(groups, first, last):
    return sum(PASS + len(g) * (max(last[i] for i in g) - min(first[i] for i in g)) for g in groups)


@given(spans, st.sampled_from([None, 1, 700, 5000]))
def test_every_row_is_in_one_group_and_groups_keep_the_limit(rows, limit):
    first, last = zip(*rows, strict=True)
    groups = share_passes(first, last, limit)
    assert sorted(row for group in groups for row in group) == list(range(len(rows)))
    for group in groups:
        columns = cost([group], first, last) - PASS
        assert limit is None or len(group) == 1 or columns <= limit


@given(st.lists(st.integers(61, 2000), min_size=1, max_size=7))
def test_the_split_is_the_cheapest_for_rows_that_begin_together(last):
    first = [0] * len(last)
    order = sorted(range(len(last)), key=lambda row: last[row])
    every = []
    for bits in range(2 ** (len(last) - 1)):  # all ways to cut the sorted rows
        cuts = [0, *(i + 1 for i in range(len(last) - 1) if bits >> i & 1), len(last)]
        every.append(cost([order[a:b] for a, b in pairwise(cuts)], first, last))
    assert cost(share_passes(first, last), first, last) == min(every)


def test_rows_that_see_the_same_columns_share_a_pass():
    assert share_passes([3] * 4, [300] * 4) == [[0, 1, 2, 3]]
    assert share_passes([0] * 4, [2000, 40, 2000, 40]) == [[1, 3], [0, 2]]
