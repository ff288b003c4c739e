from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins.selection import leftmost, longest_prefix, ranks, top_1, top_k


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
def test_top_k_equals_sorting(case, k):
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


@given(st.integers(0, 99), st.integers(40, 300))
def test_the_leftmost_of_equal_scores_comes_first_in_a_long_row(seed, length):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(3, (2, length), generator=generator).float()
    found = ranks(score, torch.ones(2, length, dtype=torch.bool))
    for row in range(2):
        wanted = sorted(range(length), key=lambda i: (-float(score[row, i]), i))
        assert found[row].argsort().tolist() == wanted


@pytest.mark.parametrize("lowest", [-torch.inf, torch.nan, torch.finfo(torch.float32).min])
def test_the_lowest_score_ranks_before_non_candidates(lowest):
    score = torch.tensor([[0.9, lowest, 0.8]])
    candidates = torch.tensor([[False, True, False]])
    assert ranks(score, candidates)[0, 1] == 0
    assert top_1(score, candidates).tolist() == [[False, True, False]]
    nobody = torch.zeros_like(candidates)
    assert not top_1(score, nobody).any()


def test_nan_ranks_after_every_number():
    score = torch.tensor([[torch.nan, -0.5, -torch.inf, -2.0]])
    candidates = torch.ones(1, 4, dtype=torch.bool)
    assert ranks(score, candidates).tolist() == [[2, 0, 3, 1]]
    for k, picked in (
        (1, [1]),
        (2, [1, 3]),
        (torch.tensor([1]), [1]),
        (torch.tensor([3]), [0, 1, 3]),
    ):
        assert top_k(score, candidates, k)[0].nonzero().flatten().tolist() == picked
    assert top_1(score, candidates)[0].nonzero().flatten().tolist() == [1]


def test_k_per_row():
    score = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    picked = top_k(score, torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, 2]))
    assert picked.tolist() == [[False, True, False], [False, True, True]]


@given(scores())
def test_leftmost_is_only_the_first_candidate(case):
    _, candidates = case
    for row, found in zip(candidates.tolist(), leftmost(candidates).tolist(), strict=True):
        first = row.index(True) if True in row else -1
        assert found == [i == first for i in range(len(row))]


def test_results_stay_on_the_device_of_the_scores():
    score = torch.empty(2, 5, device="meta")
    candidates = torch.empty(2, 5, dtype=torch.bool, device="meta")
    k = torch.empty(2, dtype=torch.int64, device="meta")
    for found in (top_k(score, candidates, k), top_1(score, candidates), leftmost(candidates)):
        assert (found.device.type, found.shape) == ("meta", (2, 5))


def admitted_prefix(score, candidates, admits):
    """The best candidates of one row: as many as the longest admitted prefix has."""
    places = [i for i, chosen in enumerate(candidates) if chosen and score[i] == score[i]]
    best = sorted(places, key=lambda i: (-max(score[i], -1e38), i))
    lengths = [n for n in range(1, len(best) + 1) if admits([score[i] for i in best], n)]
    return sorted(best[: max(lengths, default=0)])


@given(scores(), st.integers(0, 6))
def test_the_longest_prefix_equals_trying_every_length(case, seed):
    """The condition admits some lengths and not others, whatever the scores are."""
    score, candidates = case
    admits = [(n * 7 + seed) % 3 != 0 for n in range(score.shape[1] + 1)]

    def condition(ordered, length):
        assert ordered.shape == score.shape
        return torch.tensor(admits)[length].expand_as(ordered)

    picked = longest_prefix(score, candidates, condition)
    for row in range(len(score)):
        expected = admitted_prefix(
            score[row].tolist(), candidates[row].tolist(), lambda _, n: admits[n]
        )
        assert picked[row].nonzero().flatten().tolist() == expected


@given(scores(), st.floats(-3, 3, width=16))
def test_the_condition_gets_the_scores_of_candidates_in_descending_order(case, least):
    score, candidates = case
    picked = longest_prefix(score, candidates, lambda ordered, length: ordered >= least)
    for row in range(len(score)):
        expected = admitted_prefix(
            score[row].tolist(), candidates[row].tolist(), lambda best, n: best[n - 1] >= least
        )
        assert picked[row].nonzero().flatten().tolist() == expected


def test_what_the_condition_is_given():
    """The scores of candidates first, 0 for the others, and the lengths 1 to L."""
    score = torch.tensor([[0.5, 0.9, torch.nan, 0.7, 0.3]])
    candidates = torch.tensor([[True, False, True, True, True]])
    given_to = []

    def condition(ordered, length):
        given_to.extend([ordered.tolist(), length.tolist()])
        return torch.ones_like(ordered, dtype=torch.bool)

    picked = longest_prefix(score, candidates, condition)
    assert given_to[0][0] == pytest.approx([0.7, 0.5, 0.3, 0, 0])
    assert given_to[1] == [1, 2, 3, 4, 5]
    assert picked.tolist() == [[True, False, False, True, True]]
