from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins.selection import leftmost, ranks, top_1, top_k


@st.composite
def scores(draw):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    number = st.one_of(
        st.floats(-3, 3, width=16), st.just(float("nan")), st.just(float("-inf")), st.just(0.5)
    )
    value = draw(st.lists(number, min_size=rows * length, max_size=rows * length))
    chosen = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    return torch.tensor(value).view(rows, length), torch.tensor(chosen).view(rows, length)


@given(scores(), st.integers(0, 13))
def test_top_k_is_what_sorting_gives(case, k):
    score, candidates = case
    picked = top_k(score, candidates, k)
    for row in range(len(score)):
        places = [i for i in range(score.shape[1]) if candidates[row, i]]

        def key(i, row=row):
            value = float(score[row, i])
            return (-max(value, -1e38) if value == value else 1e38, i)

        wanted = sorted(places, key=key)[:k]
        assert picked[row].nonzero().flatten().tolist() == sorted(wanted)


@given(scores())
def test_top_1_is_the_first_of_top_k(case):
    score, candidates = case
    assert torch.equal(top_1(score, candidates), top_k(score, candidates, 1))


@given(scores())
def test_ranks_are_a_permutation_with_candidates_first(case):
    score, candidates = case
    found = ranks(score, candidates)
    for row in range(len(score)):
        assert sorted(found[row].tolist()) == list(range(score.shape[1]))
        count = int(candidates[row].sum())
        assert sorted(found[row][candidates[row]].tolist()) == list(range(count))


def test_k_per_row():
    score = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    picked = top_k(score, torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, 2]))
    assert picked.tolist() == [[False, True, False], [False, True, True]]


def test_leftmost():
    candidates = torch.tensor([[False, True, True], [False, False, False]])
    assert leftmost(candidates).tolist() == [[False, True, False], [False, False, False]]
